"""On the shipped network: what splitting the skips and drawing the steps change, over seeds.

Source of the margins: on a small network h and skip have like ranges, so that a split must not hurt and
is not asked to help (its size is the subject of tests/quant/test_split.py, on synthetic parts).
"""

import jax
import numpy as np
import pytest

from qdiff_jax.eval import variant
from qdiff_jax.named_policies import policy
from qdiff_jax.observe.selectors import ndtc, one_step
from qdiff_jax.policy import make_plan
from qdiff_jax.stages.batch_ranges import BatchRangeConfig, calibrate_by_batch
from qdiff_jax.stages.skip_split import split_skips
from qdiff_jax.stages.stage import initial_state, run_stage
from qdiff_jax.stages.weights import calibrate_weights, round_to_nearest

from .test_orderings import (
    calibrated,
    predict,
    pytestmark,  # noqa: F401  # slow, and only with the shipped weights
    shipped,
    sites,
    trajectory,
    variables,
)

SPLIT_EPS = 1.02  # of the eps error without a split, round-to-nearest
NDTC_EPS = 1.0  # of the eps error calibrated at the noisiest step alone, mean over seeds


def nearest(w_bits, a_bits, which):
    model = shipped().model
    plan = make_plan(sites(), policy("official:qdiffusion", sites(), w_bits, a_bits))
    state = initial_state(plan, jax.random.key(3))
    for stage in (split_skips(model, which), calibrate_weights(model), round_to_nearest(model)):
        state = run_stage(stage, state)[0]
    return state


def eps_error(state, first=100):
    forced = variant.teacher_forced(predict(), variables(state), trajectory(first), None)
    return forced.rel_mse


@pytest.mark.parametrize("bits", [(4, 8), (8, 4)])
@pytest.mark.parametrize("which", ["shortcut", "both"])
def test_a_split_never_costs_more_than_its_margin(bits, which):
    errors = {w: eps_error(calibrated(nearest(*bits, w))) for w in ("none", which)}
    assert errors[which] <= SPLIT_EPS * errors["none"]


def test_ndtc_beats_calibrating_at_the_noisiest_step():
    """PTQ4DM, section 4.2: ranges seen at pure noise do not serve the image end."""
    start, errors = nearest(8, 8, "none"), {"ndtc": [], "noise": []}
    last = len(trajectory(0).t) - 1
    config = BatchRangeConfig(batch_size=32)
    for seed in range(3):
        key = jax.random.key(seed)
        sets = {
            "ndtc": ndtc(key, trajectory(0), count=64),
            "noise": one_step(key, trajectory(0), count=64, position=last),
        }
        for name, chosen in sets.items():
            state = run_stage(calibrate_by_batch(shipped().model, chosen, config), start)[0]
            errors[name].append(eps_error(state))
    assert np.mean(errors["ndtc"]) < NDTC_EPS * np.mean(errors["noise"])
