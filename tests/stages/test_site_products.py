"""Closed-form rounding beside a low-rank branch: what is multiplied, with what, and what it gains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.branch import LowRank, low_rank
from qdiff_jax.export.integer import check_executable
from qdiff_jax.export.qtensor import codes
from qdiff_jax.models.program import units_with_projections
from qdiff_jax.observe.selectors import CalibrationSet
from qdiff_jax.operators import DENSE, plain, same_conv
from qdiff_jax.quant.moments import rows_of
from qdiff_jax.quant.qparams import dynamic_qparams
from qdiff_jax.sites import Replacement, SiteQuant, flatten_sites, list_sites, nest_sites
from qdiff_jax.stages import unit_rounding
from qdiff_jax.stages.calibrate import ActivationConfig, calibrate_activations
from qdiff_jax.stages.closed_form import closed_form
from qdiff_jax.stages.group_grids import activation_spec, group_grids
from qdiff_jax.stages.layer_rounding import ClosedFormConfig
from qdiff_jax.stages.low_rank_branches import BranchConfig, low_rank_branches
from qdiff_jax.stages.progressive import unrounded
from qdiff_jax.stages.site_products import (
    bias_of_codes,
    multiplied,
    product_input,
    site_output,
)
from qdiff_jax.stages.stage import initial_state, run_stage
from qdiff_jax.stages.weights import calibrate_weights

from . import toy
from .chain import leaves_equal

SHIFT = 0.2785  # SiLU is never below its negative
STEPS = np.float32([0, 20, 40, 60])
SITES = tuple(toy.LAYERS)
CONFIG = ClosedFormConfig(walk_batch=64, check_samples=256)

CONV = same_conv(3)
CASES = {"dense": (DENSE, (5, 8), False), "conv": (CONV, (5, 6, 8), False)}
CASES["shifted"] = (DENSE, (5, 8), True)


def built(case):
    """(operator, x, params, site without codes) with a branch of rank 2 and a smoothing."""
    operator, shape, shifted = CASES[case]
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, *shape)), rng.standard_normal((3, 3, 8, 6))
    w = w if case == "conv" else w[0, 0]
    down = np.float16(rng.standard_normal((*w.shape[:-1], 2)))
    arrays = LowRank(
        down=jnp.asarray(down),
        up=jnp.asarray(rng.standard_normal((2, 6)), jnp.float16),
        smoothing=jnp.asarray(np.exp(rng.standard_normal(8)), jnp.float32),
        shift=jnp.float32(SHIFT) if shifted else None,
    )
    params = {"a": {"layer": {"kernel": jnp.float32(w), "bias": jnp.arange(6.0)}}}
    return operator, jnp.float32(x), params, SiteQuant(substitute=Replacement(arrays, low_rank))


@pytest.mark.parametrize("case", CASES)
def test_what_is_multiplied_is_the_same_function_in_full_precision(case):
    operator, x, params, site = built(case)
    made = multiplied(params, {"a": {"layer": site}})["a"]["layer"]
    wanted = plain(operator, x, *params["a"]["layer"].values())
    found = site_output(site, operator, x, made["kernel"], made["bias"])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert (bias_of_codes(site, made, made["kernel"]) is None) == (case != "shifted")


@pytest.mark.parametrize("case", CASES)
def test_the_output_is_the_quantized_rows_times_the_codes_and_the_branch(case):
    """Another kernel in place of R moves the output by rows times the change, whatever the quantizer is."""
    operator, x, params, site = built(case)
    top = (0.0, 15.0) if case == "shifted" else (-7.0, 7.0)
    site = site.replace(lhs=dynamic_qparams(activation_spec(4, case == "shifted"), *top))
    made = multiplied(params, {"a": {"layer": site}})["a"]["layer"]
    change = jnp.float32(np.random.default_rng(1).standard_normal(made["kernel"].shape))
    before, after = (
        site_output(site, operator, x, made["kernel"] + c, made["bias"]) for c in (0, change)
    )
    rows = rows_of(operator, product_input(site, x), change.shape)
    moved = jnp.matmul(rows, change.reshape(-1, 6), precision="highest")
    np.testing.assert_allclose((after - before).reshape(moved.shape), moved, rtol=0, atol=1e-3)


def calibration(seed=0, count=256) -> CalibrationSet:
    """Points whose coordinates are correlated, two of them ten times the others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 5)) @ np.random.default_rng(9).standard_normal((5, toy.POINT))
    x[:, [3, 10]] *= 10
    index = np.arange(count, dtype=np.int32) % 4
    none = np.zeros(count, np.int32)
    return CalibrationSet(np.float32(x), np.float32(20 * index), index, none, None, np.float32(x))


@functools.cache
def branched():
    """The toy at W4A4 in groups of 4, rank 2, one input shifted, with the nearest codes of the branches."""
    state = initial_state(toy.plan(16, 4, 4), jax.random.key(0))
    sites = list_sites(toy.module(16), *toy.example())
    branch = BranchConfig(rank=2, alpha=0.5, beta=0.5, iterations=3, rows=256, shift=SHIFT)
    for stage in (
        group_grids(sites, 4, unsigned=("net/l1",)),
        # Nothing is to be calibrated: it gives every input the quantizer that is measured at run time.
        calibrate_activations(toy.model(), calibration(), STEPS, ActivationConfig(batch_size=64)),
        calibrate_weights(toy.model(), method="minmax"),
        low_rank_branches(toy.model(), sites, calibration(), branch),
    ):
        state, _ = run_stage(stage, state)
    return state


def solve(store=None, **own):
    units = units_with_projections(toy.program(16))
    stage = closed_form(toy.model(), units, calibration(), ClosedFormConfig(**vars(CONFIG) | own))
    return run_stage(stage, unrounded(branched()), store)


@functools.cache
def solved():
    return solve()


@functools.cache
def forward():
    return jax.jit(toy.module(16).apply)


def estimate(quant, held) -> np.ndarray:
    return np.asarray(forward()({"params": toy.model().params, "quant": quant}, held.x, held.t))


def error(quant) -> float:
    held = calibration(1)
    return float(np.square(estimate(quant, held) - estimate({}, held)).mean())


def test_a_unit_with_branches_is_below_its_nearest_codes():
    state, report = solved()
    (unit,) = report["units"]
    assert not unit["fell_back"]
    assert unit["loss"] < 0.8 * unit["nearest_loss"]
    # Either side has the bias that makes up for the shift.
    for layer in unit["layers"].values():
        assert layer["loss"] <= layer["nearest_loss"] < 3 * layer["loss"]
    assert error(state.quant) < 0.8 * error(branched().quant)


def test_branches_grids_and_quantizers_stay_as_they_were():
    before, after = (flatten_sites(s.quant) for s in (branched(), solved()[0]))
    assert set(before) == set(after) == set(SITES)
    for name in SITES:
        assert leaves_equal(after[name].substitute, before[name].substitute)
        assert after[name].lhs.spec.dynamic
        assert leaves_equal(after[name].lhs, before[name].lhs)
        assert leaves_equal(after[name].rhs.qparams, before[name].rhs.qparams)
        assert (np.asarray(codes(after[name].rhs)) != np.asarray(codes(before[name].rhs))).any()
        assert np.abs(np.asarray(codes(after[name].rhs))).max() <= 7
        assert after[name].bias.shape == (16,)


def test_executed_in_integers_as_simulated():
    quant = solved()[0].quant
    executed = nest_sites({n: s.replace(execute=True) for n, s in flatten_sites(quant).items()})
    check_executable(executed)
    held = calibration(1, 64)
    simulated, integers = (estimate(q, held) for q in (quant, executed))
    # A code next to a rounding tie may fall either way.
    assert np.square(integers - simulated).mean() < 1e-4 * np.square(simulated).mean()


def test_a_finished_unit_is_read_back_with_its_biases(tmp_path, monkeypatch):
    state, _ = solve(tmp_path)
    assert leaves_equal(state.quant, solved()[0].quant)
    monkeypatch.setattr(unit_rounding, "round_layer", None)
    assert leaves_equal(solve(tmp_path)[0].quant, state.quant)


def test_what_falls_back_are_the_nearest_codes_that_the_branches_had(monkeypatch):
    """With the bias that makes up for the shift, though none is refitted."""

    def spoilt(*args):
        made = whole(*args)
        return made._replace(kernel=made.kernel + 1.0, codes=made.codes * 0)

    whole = unit_rounding.round_layer
    monkeypatch.setattr(unit_rounding, "round_layer", spoilt)
    state, report = solve()
    assert report["fell_back"] == ["net"]
    before, after = (flatten_sites(s.quant) for s in (branched(), state))
    for name in SITES:
        assert leaves_equal(after[name].rhs, before[name].rhs), name
        assert (after[name].bias is None) == (before[name].bias is None) == (name != "net/l1")
    np.testing.assert_allclose(after["net/l1"].bias, before["net/l1"].bias, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "own",
    [
        {"refit_bias": False},
        {"activations": False},
        {"target": "layer_fp_input"},
        {"target": "layer_quantized_input"},
        {"target": "layer_fp_output"},
        {"kronecker_sweeps": 2},
    ],
)
def test_other_targets_and_settings_know_of_the_branch_too(own):
    state, report = solve(**own)
    assert report["fell_back"] == []
    assert error(state.quant) < error(branched().quant)
