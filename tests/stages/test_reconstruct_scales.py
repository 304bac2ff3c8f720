"""Learned activation steps (BRECQ's second phase) and QDrop's mixed inputs."""

import dataclasses

import numpy as np
import pytest

from qdiff_jax.quant.timed import TimeIndexed
from qdiff_jax.sites import flatten_sites
from qdiff_jax.stages.calibrate import ActivationConfig, calibrate_activations
from qdiff_jax.stages.reconstruct import ReconstructConfig, reconstruct
from qdiff_jax.stages.stage import run_stage
from qdiff_jax.stages.weights import round_to_nearest

from . import chain

CALIBRATION = chain.calibration(per_step=16)
HELD_OUT = chain.calibration(per_step=16, seed=1)
SCALES = ReconstructConfig(
    steps=60,
    batch_size=16,
    scale_lr=2e-3,
    trains="scales",
    inputs="full_precision",
    p=2.4,
    walk_batch=32,
)
JOINT = ReconstructConfig(
    steps=30, batch_size=16, lr=4e-2, scale_lr=1e-3, trains="both", walk_batch=32
)


def stage(config, **options):
    return reconstruct(chain.model(), chain.UNITS, CALIBRATION, config, **options)


def calibrated(state, **options):
    config = ActivationConfig(batch_size=16, **options)
    work = calibrate_activations(chain.model(), CALIBRATION, chain.TIMESTEPS, config)
    return run_stage(work, state)[0]


@pytest.fixture(scope="module")
def start():
    """Nearest codes, and ranges averaged over batches, which clip: there is something to learn."""
    return calibrated(run_stage(round_to_nearest(chain.model()), chain.state())[0])


@pytest.fixture(scope="module")
def trained(start):
    return run_stage(stage(SCALES), start)


def sides(quant):
    """{"site:side": quantizer of an activation}."""
    return {
        f"{name}:{side}": getattr(site, side)
        for name, site in flatten_sites(quant).items()
        for side in (("lhs", "rhs") if site.product else ("lhs",))
    }


class TestActivationPhase:
    def test_nothing_but_scales_moves(self, start, trained):
        before, after = sides(start.quant), sides(trained[0].quant)
        assert set(before) == set(after)
        for name, quantizer in after.items():
            assert float(quantizer.scale) != float(before[name].scale), name
            same = quantizer.replace(scale=before[name].scale)
            assert chain.leaves_equal(same, before[name]), name

    def test_weights_stay_bit_for_bit(self, start, trained):
        before, after = flatten_sites(start.quant), flatten_sites(trained[0].quant)
        for name, site in after.items():
            if not site.product:
                assert chain.leaves_equal(site.rhs, before[name].rhs)

    def test_blocks_are_no_worse_on_samples_never_seen(self, start, trained):
        before = chain.block_errors(start.quant, HELD_OUT, SCALES.p)
        after = chain.block_errors(trained[0].quant, HELD_OUT, SCALES.p)
        assert np.mean(list(after.values())) <= 0.9 * np.mean(list(before.values()))

    def test_full_precision_inputs_cost_one_pass(self, trained):
        # With the two of the weights: three passes for all inputs and targets.
        assert trained[1]["network_passes"] == 1.0

    def test_interrupted_and_resumed_equals_uninterrupted(self, start, trained, tmp_path):
        config = dataclasses.replace(SCALES, save_seconds=0.0)
        killed = stage(config)
        carry = killed.init(start, tmp_path)
        for _ in range(5):
            carry = killed.run(carry, 25)
        assert (carry.position, carry.step) == (1, 50)
        state, _ = run_stage(stage(config), start, tmp_path, chunk=25)
        assert chain.leaves_equal(state.quant, trained[0].quant)

    def test_step_tables_keep_their_calibrated_ranges(self):
        nearest = run_stage(round_to_nearest(chain.model()), chain.state())[0]
        start = calibrated(nearest, per_step=chain.TEMPORAL)
        state, report = run_stage(stage(dataclasses.replace(SCALES, steps=2)), start)
        tables = {n: q for n, q in sides(state.quant).items() if isinstance(q, TimeIndexed)}
        assert len(tables) == 3
        for name, table in tables.items():
            assert chain.leaves_equal(table, sides(start.quant)[name])
        assert [unit["trained"] for unit in report["units"]] == [False, True, True, True, True]

    def test_without_planned_activations_there_is_nothing_to_train(self):
        start = chain.state(a_bits=None)
        state, report = run_stage(stage(SCALES), start)
        assert chain.leaves_equal(state.quant, start.quant)
        assert not any(unit["trained"] for unit in report["units"])

    def test_scale_that_would_cross_zero_stays_positive(self, start):
        config = dataclasses.replace(SCALES, steps=3, scale_lr=10.0)
        state, _ = run_stage(stage(config), start)
        assert all(float(q.scale) > 0 for q in sides(state.quant).values())


@pytest.fixture(scope="module")
def begun():
    """Weights with ranges only, activations calibrated."""
    return calibrated(chain.state())


@pytest.fixture(scope="module")
def quantized(begun):
    return run_stage(stage(JOINT), begun)


class TestJoint:
    def test_codes_and_scales_are_both_trained(self, begun, quantized):
        flat = flatten_sites(quantized[0].quant)
        assert all(site.rhs.bits == 4 for site in flat.values() if not site.product)
        before = sides(begun.quant)
        assert all(
            float(q.scale) != float(before[name].scale)
            for name, q in sides(quantized[0].quant).items()
        )

    def test_mixing_with_probability_one_is_the_quantized_stream(self, begun, quantized):
        config = dataclasses.replace(JOINT, inputs="mixed", input_prob=1.0)
        state, report = run_stage(stage(config), begun)
        assert chain.leaves_equal(state.quant, quantized[0].quant)
        for ours, theirs in zip(report["units"], quantized[1]["units"], strict=True):
            assert ours["first_loss"] == theirs["first_loss"]
            assert ours["last_loss"] == theirs["last_loss"]

    def test_mixing_with_probability_zero_is_full_precision(self, begun):
        plain = dataclasses.replace(JOINT, steps=8, inputs="full_precision")
        mixed = dataclasses.replace(plain, inputs="mixed", input_prob=0.0)
        reached = []
        for config in (plain, mixed):
            work = stage(config)  # two units: the second is the first with quantized inputs
            reached.append(chain.run_until(work, work.init(begun, None), 2))
        assert chain.leaves_equal(reached[0].state.quant, reached[1].state.quant)
        assert [carry.quantized.passes > 0 for carry in reached] == [False, True]
