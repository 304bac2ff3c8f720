"""On the shipped network, over seeds: what TDQ's networks, log2 attention and PAR's rounds are for.

The limits are the specification's proposals, loosened by a tenth for the few steps taken here.
"""

import dataclasses
import functools

import jax
import numpy as np

from qdiff_jax.eval import variant
from qdiff_jax.methods.registry import CalibrationSets, MethodSettings, build
from qdiff_jax.methods.tcaq import TcaqConfig
from qdiff_jax.methods.tdq import TdqConfig
from qdiff_jax.observe.quantization_noise import paired
from qdiff_jax.stages.calibrate import ActivationConfig
from qdiff_jax.stages.channel_factors import FactorConfig
from qdiff_jax.stages.reconstruct import ReconstructConfig
from qdiff_jax.stages.stage import fold_weights, initial_state, run_stage, tuned_params
from qdiff_jax.stages.time_scales import TimeScaleConfig

from . import test_orderings as shipped

pytestmark = shipped.pytestmark
SEEDS = (0, 1, 2)
TDQ_EPS = 1.0  # of shared ranges' teacher-forced eps error at W8A4, mean over seeds
FACTORS_EPS = 1.0  # of the eps error without channel factors at W6A6
PAR_ROLLOUT = 1.1  # of the rollout error after round 0 at W4A4

STEPS = ReconstructConfig(steps=60, temporal_steps=300, lr=1e-2, schedule="cosine", walk_batch=64)
NETWORKS = TimeScaleConfig(steps=60, lr=2e-3, dropout=0.0)


def settings(**parts):
    return MethodSettings(
        weights=STEPS,
        activations=ActivationConfig(),
        tdq=TdqConfig(scales=NETWORKS),
        tcaq=dataclasses.replace(TcaqConfig(), **parts),
    )


def sets():
    source = paired(shipped.trajectory(0), None, shipped.sampler(), shipped.shipped().schedule)
    found = shipped.calibration()
    return CalibrationSets(found, found, shipped.sampler().timesteps, paired=source)


@functools.cache
def outcome(name: str, w_bits: int, a_bits: int, seed: int, **parts):
    """(eps error, rollout error, reports by stage) of a method."""
    model = shipped.shipped().model
    plan = shipped.make_plan(
        shipped.sites(), shipped.policy("common", shipped.sites(), w_bits, a_bits)
    )
    state, reports = initial_state(plan, jax.random.key(seed)), {}
    for stage in build(name, model, sets(), settings(**parts)).stages:
        state, reports[stage.name] = run_stage(stage, state)
    params, quant = fold_weights(tuned_params(model.params, state.aux), state.quant)
    made = {"params": params, "quant": quant}
    forced = variant.teacher_forced(shipped.predict(), made, shipped.trajectory(100))
    drawn = shipped.samples(made)
    rollout = variant.rollout(shipped.full_precision_samples(), drawn, None)["rollout_mse"]
    return forced.rel_mse, rollout, reports


def mean(name, w_bits, a_bits, column, **parts):
    return np.mean([outcome(name, w_bits, a_bits, seed, **parts)[column] for seed in SEEDS])


def test_predicted_steps_beat_shared_ranges_at_four_bits():
    assert mean("tdq", 8, 4, 0) <= TDQ_EPS * mean("rtn", 8, 4, 0)


def test_channel_factors_help_at_six_bits():
    parts = {"daq": False, "rounds": 0}
    with_factors = mean("tcaq", 6, 6, 0, factors=FactorConfig(), **parts)
    assert with_factors <= FACTORS_EPS * mean("tcaq", 6, 6, 0, tcr=False, **parts)


def test_rounds_on_its_own_states_bring_the_states_together():
    parts = {"tcr": False, "daq": False}
    gaps = [
        [outcome("tcaq", 4, 4, seed, **parts)[2][f"resample_{i}"]["gap"] for i in (1, 2)]
        for seed in SEEDS
    ]
    first, second = np.mean(gaps, axis=0)
    assert second < first
    assert mean("tcaq", 4, 4, 1, **parts) <= PAR_ROLLOUT * mean("tcaq", 4, 4, 1, rounds=0, **parts)
