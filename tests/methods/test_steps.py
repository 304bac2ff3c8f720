"""What the optimizer steps of the methods owe: the same after a kill, with another key another result, on
eight devices the same codes. The checks of every outcome are those of `test_methods`."""

import jax
import numpy as np
import pytest

from qdiff_jax.export.qtensor import QTensor, codes
from qdiff_jax.sites import flatten_sites
from qdiff_jax.stages.stage import run_stage

from ..stages.chain import leaves_equal
from .cases import (
    CASES,
    LEARNING,
    STEPS,
    begin,
    case_plan,
    finish,
    kill,
    method,
    model,
    outcome,
    plan,
    resume,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", LEARNING)
def test_killed_anywhere_and_resumed_equals_uninterrupted(name, late, tmp_path):
    kill(name, STEPS, tmp_path, CASES[name].late if late else 2)
    resumed = resume(name, STEPS, tmp_path).state
    whole = outcome(name, STEPS).state
    assert leaves_equal(resumed.quant, whole.quant)
    assert leaves_equal(resumed.aux, whole.aux)


@pytest.mark.parametrize(
    ("name", "stage", "reports"),
    [
        ("tcaq whole", "resample_1", 0),
        ("tcaq whole", "tcaq_round_1", 2),
        ("tdq", "reconstruct_time_scales", 4),
        ("qdiffusion", "brecq_activation_steps", 2),
        ("ptqd", "calibrate_correction", 1),
        ("closed_form", "tune", 1),
        ("binarydm", "train_binary", 6),
    ],
)
def test_killed_in_a_late_stage_and_resumed_equals_uninterrupted(name, stage, reports, tmp_path):
    kill(name, STEPS, tmp_path, reports, stage)
    resumed = resume(name, STEPS, tmp_path).state
    whole = outcome(name, STEPS).state
    assert leaves_equal(resumed.quant, whole.quant)
    assert leaves_equal(resumed.aux, whole.aux)


@pytest.mark.parametrize("name", ["brecq", "tfmq", "tdq", "ptq4dit", "efficientdm", "binarydm"])
def test_key_decides_the_minibatches(name):
    other = finish(method(name, STEPS), begin(case_plan(name), seed=6)).state.quant
    assert not leaves_equal(other, outcome(name, STEPS).state.quant)


@pytest.mark.parametrize(
    "name", ["brecq", "tfmq", "qdiffusion", "tdq", "tcaq", "closed_form", "ptq4dit"]
)
def test_eight_devices_give_the_codes_of_one(name):
    """Closed-form rounding: the same codes, bit for bit, for its sums are dealt out in fixed chunks.

    Reconstruction: at least 999 in 1,000. The gradient of a minibatch is a sum over devices, added in
    another order than on one, so that soft roundings differ in their last bits; a code can differ only
    where its rounding ends that close to its threshold, and then activations after it see other values.
    """
    devices = finish(method(name, STEPS, devices=8), begin(case_plan(name))).state
    made, alone = (weights(state.quant) for state in (devices, outcome(name, STEPS).state))
    assert made.keys() == alone.keys()
    equal = np.concatenate([(made[site] == alone[site]).ravel() for site in made])
    assert equal.mean() >= (1.0 if name == "closed_form" else 0.999)


def test_channel_factors_have_changed_parameters():
    """Without which the checks of leaves that a method has tuned would have nothing to look at."""
    tuned = outcome("tcaq whole", STEPS).state.aux["params"]
    assert any(path.endswith("/divisor") for path in tuned)
    assert any(path.endswith("/kernel") for path in tuned)


def weights(quant) -> dict[str, np.ndarray]:
    """{site: codes} of every weight."""
    flat = jax.device_get(flatten_sites(quant))
    return {site: codes(held.rhs) for site, held in flat.items() if isinstance(held.rhs, QTensor)}


class TestTemporalBlock:
    def test_is_the_first_unit_and_its_codes_are_final(self):
        """What later units see of it never changes: stopped after one unit, the codes are the same."""
        stages = method("tfmq", STEPS).stages
        state, _ = run_stage(stages[0], begin(plan()))
        carry = stages[1].init(state, None)
        while carry.position < 1:
            carry = stages[1].run(carry, STEPS)
        assert carry.reports[0]["unit"] == "time"
        done = outcome("tfmq", STEPS).state.quant
        for node in model().program:
            if node.name == "temb" or node.name.endswith("_temb_proj"):
                for op, site in carry.state.quant[node.name].items():
                    assert leaves_equal(site.rhs, done[node.name][op].rhs)

    def test_margin_widens_every_table_but_its_own(self):
        flat = flatten_sites(outcome("tfmq faithful").state.quant)
        ranges = outcome("tfmq faithful").reports["calibrate_activations"]["ranges"]
        for name, margin in (("temb/dense_1:input", 1.0), ("mid_block_2/conv1:input", 1.5)):
            lo, hi = ranges[name]
            scale = margin * (np.maximum(hi, 0) - np.minimum(lo, 0)) / 255
            table = flat[name.split(":")[0]].lhs.table
            np.testing.assert_allclose(table.scale, scale, rtol=1e-5)

    def test_variants_share_their_weights(self):
        """Paper and code differ in activations alone here."""
        fixed, faithful = (outcome(n, STEPS).state.quant for n in ("tfmq", "tfmq faithful"))
        for site, held in flatten_sites(fixed).items():
            if isinstance(held.rhs, QTensor):
                assert leaves_equal(held.rhs, flatten_sites(faithful)[site].rhs)
