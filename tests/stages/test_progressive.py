"""Rounds of reconstruction: one rounding schedule cut into rounds, and weights that stay soft between."""

import dataclasses

import jax
import numpy as np
import pytest

from qdiff_jax.export.qtensor import QTensor, codes
from qdiff_jax.models.registry import predictor
from qdiff_jax.observe.quantization_noise import paired
from qdiff_jax.observe.trajectory import Trajectory, record_trajectories
from qdiff_jax.quant.rounding import SoftRounding, hard_codes
from qdiff_jax.sites import flatten_sites, nest_sites
from qdiff_jax.stages.deferred import deferred
from qdiff_jax.stages.progressive import (
    at_steps,
    reopened,
    resample,
    round_configs,
    unrounded,
)
from qdiff_jax.stages.reconstruct import reconstruct
from qdiff_jax.stages.stage import initial_state, run_stage
from qdiff_jax.stages.unit_steps import ReconstructConfig, step_inputs

from . import chain, toy

CONFIG = ReconstructConfig(steps=6, batch_size=8, lr=5e-2, schedule="cosine", walk_batch=16)


def whole(config, field, unit=0):
    """A field of the step inputs over all rounds."""
    parts = [step_inputs(c, chain.KEY, 32, unit, 0, c.steps) for c in config]
    return np.concatenate([getattr(part, field) for part in parts])


@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.9])
def test_rounds_share_one_rounding_schedule(warmup):
    one = ReconstructConfig(steps=100, warmup=warmup, lr=0.1)
    rounds = round_configs(dataclasses.replace(one, steps=50), 2, 0.5)
    assert [c.steps for c in rounds] == [50, 25, 25]
    for field in ("beta", "rounding_weight"):
        np.testing.assert_allclose(whole(rounds, field), whole((one,), field), rtol=1e-4)


def test_no_rounds_is_the_config_itself():
    assert round_configs(CONFIG, 0) == (CONFIG,)


def test_rounds_of_nothing_train_nothing():
    none = dataclasses.replace(CONFIG, steps=0)
    assert [c.steps for c in round_configs(none, 2)] == [0, 0, 0]


def test_the_papers_sizes_and_those_of_temporal_units():
    first, *later = round_configs(ReconstructConfig(temporal_steps=400), 2)
    assert (first.steps, first.temporal_steps) == (20_000, 400)
    assert {(c.steps, c.temporal_steps) for c in later} == {(5_000, 100)}
    with pytest.raises(ValueError, match="share"):
        round_configs(CONFIG, 1, 0.0)


def test_states_of_chosen_steps_are_all_there_and_shuffled():
    x = np.arange(24, dtype=np.float32).reshape(4, 6, 1)
    t = np.float32([1.0, 2.0, 3.0, 4.0])
    zeros = np.zeros(6, np.int32)
    trajectory = Trajectory(x, t, np.arange(4, dtype=np.int32), zeros, x, zeros, np.arange(6))
    made = at_steps(jax.random.key(0), trajectory, np.array([1, 3]))
    assert sorted(made.x.ravel()) == sorted(x[[1, 3]].ravel())
    assert not np.array_equal(made.x.ravel(), x[[1, 3]].ravel())
    np.testing.assert_array_equal(made.x.ravel() // 6, made.index)


class TestSoftBetweenRounds:
    def first(self, **options):
        stage = reconstruct(
            chain.model(), chain.UNITS, chain.calibration(), CONFIG, keep_alphas=True, **options
        )
        return stage, chain.state(4, None)

    def test_a_round_goes_on_from_the_alphas_of_the_last(self, tmp_path):
        stage, begun = self.first()
        state, _ = run_stage(stage, begun, tmp_path / "first")
        planned = {e.site for e in chain.plan(4, None).quantized("weight")}
        assert set(state.aux["alphas"]) == planned
        soft = reopened(state, chain.model().params)
        for name, site in flatten_sites(soft.quant).items():
            assert isinstance(site.rhs, SoftRounding)
            decided = flatten_sites(state.quant)[name].rhs
            np.testing.assert_array_equal(hard_codes(site.rhs), codes(decided))
            assert chain.leaves_equal(site.rhs.alpha, state.aux["alphas"][name])

        # A round that may not move leaves the codes, and the alphas, where they were.
        still = dataclasses.replace(CONFIG, steps=1, lr=0.0)

        def second(state):
            own = reconstruct(
                chain.model(), chain.UNITS, chain.calibration(seed=1), still, keep_alphas=True
            )
            return own, reopened(state, chain.model().params)

        after, report = run_stage(deferred("again", second), state)
        assert all(unit["trained"] for unit in report["units"])
        assert chain.leaves_equal(after.quant, state.quant)
        assert chain.leaves_equal(after.aux["alphas"], state.aux["alphas"])
        assert all(isinstance(s.rhs, QTensor) for s in flatten_sites(after.quant).values())

        # For a way of rounding that keeps nothing between rounds: the ranges that the codes were decided in.
        bias = np.ones(3, np.float32)
        refitted = nest_sites(
            {n: s.replace(bias=bias) for n, s in flatten_sites(state.quant).items()}
        )
        again = unrounded(state.replace(quant=refitted))
        assert chain.leaves_equal(again.quant, begun.quant)

        # Units that an earlier run has finished are read back with their alphas.
        resumed, _ = run_stage(self.first()[0], begun, tmp_path / "first")
        assert chain.leaves_equal((resumed.quant, resumed.aux), (state.quant, state.aux))


def test_the_quantized_sampler_meets_the_noise_of_the_recording():
    """A stochastic sampler that starts from twice the noise: a network that is not quantized repeats itself."""
    teacher, plan = toy.model(), toy.sampler(4, eta=1.0)
    plan, key = plan.replace(start_scale=np.float32(2.0)), jax.random.key(3)
    predict = predictor(teacher.module)
    variables = {"params": teacher.params, "quant": {}}
    made = record_trajectories(predict, variables, plan, key, range(3), shape=(toy.POINT,))
    begun = initial_state(toy.plan(16, 4, None), jax.random.key(0))
    gaps = {}
    for name, known in (("known", key), ("unknown", None)):
        source = paired(made, None, plan, toy.schedule(4), known)
        stage = resample(teacher, predict, source, np.arange(4), batch_size=3)
        state, report = run_stage(stage, begun)
        gaps[name] = report["gap"]
        np.testing.assert_allclose(state.aux["states"][-1], made.x[-1], rtol=1e-6)
    assert gaps["known"] < 1e-10
    assert gaps["unknown"] > 1e-2
