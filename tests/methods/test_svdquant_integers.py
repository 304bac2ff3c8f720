"""SVDQuant in integers inside a network: site by site, and as it is lowered for accelerators.

By default on grids, branches and shifts put at every site of the small DiT by hand, in the slow tier on what
the method makes of it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.branch import LowRank, low_rank, smoothed
from qdiff_jax.export.integer import check_executable, integer_accumulators, lowered_int_dots
from qdiff_jax.export.qtensor import codes as held_codes
from qdiff_jax.export.qtensor import from_codes
from qdiff_jax.methods.svdquant import UNSIGNED
from qdiff_jax.observe.taps import Tap
from qdiff_jax.operators import DENSE
from qdiff_jax.quant.qparams import QParams, dynamic_qparams, freeze
from qdiff_jax.quant.quantizer import codes
from qdiff_jax.sites import Replacement, SiteQuant, flatten_sites, nest_sites
from qdiff_jax.stages.group_grids import group_plan
from qdiff_jax.stages.low_rank_branches import BranchConfig
from qdiff_jax.stages.stage import kernel_at
from qdiff_jax.stages.time_scales import tapped

from .. import tiny_dit
from ..tiny_unet import QUICK
from .cases import calibration, case_plan, model, outcome

STATES = pytest.mark.parametrize(
    "made", ["by hand", pytest.param("by the method", marks=pytest.mark.slow)]
)


def by_hand() -> dict[str, SiteQuant]:
    """Groups of 4 and W4A4 at every layer of the blocks, branch of rank 2 and smoothing drawn, fc2 shifted."""
    sites = tiny_dit.network(tiny_dit.CONFIG).sites
    plan = case_plan("svdquant dit", None, 4)
    plan, _ = group_plan(plan, sites, 4, unsigned=UNSIGNED)
    rng, made = np.random.default_rng(0), {}
    for entry in plan.quantized("weight"):
        kernel = np.asarray(kernel_at(model("dit").params, entry.site))
        groups = kernel.reshape(-1, 4, kernel.shape[-1])
        scale = np.float32(np.float16(np.abs(groups).max(1) / 7))
        held = np.clip(np.rint(groups / scale[:, None]), -7, 7).astype(np.int32)
        grid = QParams(jnp.asarray(scale), jnp.zeros_like(scale), *_ends(entry), entry.spec)
        weight, lhs = (
            from_codes(held.reshape(kernel.shape), grid, 4),
            plan.of(entry.site).get("input"),
        )
        made[entry.site] = SiteQuant(rhs=weight)
        if lhs is None:
            continue
        down, up = (
            jnp.asarray(rng.standard_normal(shape), jnp.float16)
            for shape in ((kernel.shape[0], 2), (2, kernel.shape[1]))
        )
        smoothing = jnp.asarray(np.exp(rng.standard_normal(kernel.shape[0])), jnp.float32)
        shift = None if lhs.spec.signed else jnp.float32(BranchConfig().shift)
        made[entry.site] = SiteQuant(
            dynamic_qparams(lhs.spec, *_ends(lhs)),
            weight,
            bias=jnp.asarray(rng.standard_normal(kernel.shape[1]), jnp.float32),
            substitute=Replacement(LowRank(down, up, smoothing, shift), low_rank),
        )
    return made


def _method():
    return outcome("svdquant dit", 0, None, 4).state  # W4A4


def _ends(entry):
    return tuple(jnp.float32(code) for code in entry.codes)


@functools.cache
def executed(made: str) -> dict[str, SiteQuant]:
    quant = by_hand() if made == "by hand" else flatten_sites(_method().quant)
    ready = {
        name: site.replace(execute=site.lhs is not None and site.rhs is not None)
        for name, site in quant.items()
    }
    check_executable(nest_sites(ready))
    return ready


@functools.cache
def inputs_of(made: str) -> dict[str, np.ndarray]:
    """What the network in full precision feeds every site that executes."""
    batch = {"x": calibration().x[:2], "t": calibration().t[:2], "y": calibration().y[:2]}
    taps = {n: SiteQuant(tap=Tap("value")) for n, site in executed(made).items() if site.execute}
    seen = tapped(
        model("dit").module, {"params": model("dit").params, "quant": nest_sites(taps)}, batch
    )
    return {n.removesuffix("/input/value"): v for n, v in flatten_sites(seen).items()}


# One program for all sites of equal shapes and grids.
@functools.partial(jax.jit, compiler_options=QUICK)
def _run(x, site, bias):
    arrays = site.substitute.arrays
    moved = smoothed(arrays, x)
    integers = codes(freeze(site.lhs, moved), moved)
    sums = integer_accumulators(DENSE, moved, site.lhs, site.rhs)[0]
    outputs = [
        low_rank(arrays, DENSE, x, None, bias, site.replace(execute=on)) for on in (False, True)
    ]
    return integers, sums, *outputs


@STATES
def test_every_layer_in_integers_is_its_simulation_on_equal_inputs(made):
    """Accumulators equal the sums of products of codes in unbounded integers, group by group; the outputs those
    of the simulated operator within 1e-4 of their largest."""
    ready, seen = executed(made), inputs_of(made)
    shifted = set()
    for name, x in seen.items():
        site = ready[name]
        bias = jnp.zeros(site.rhs.shape[-1]) if site.bias is None else site.bias
        integers, sums, simulated, found = jax.device_get(_run(x, site, bias))
        group = site.rhs.qparams.spec.group
        assert group == site.lhs.spec.group
        right = held_codes(jax.device_get(site.rhs)).astype(np.int64)
        left = integers.astype(np.int64)
        assert sums.dtype == np.int32
        assert len(sums) == len(right) // group > 1
        for g, total in enumerate(sums):
            part = slice(g * group, (g + 1) * group)
            np.testing.assert_array_equal(total, left[..., part] @ right[part], err_msg=name)
        assert np.abs(found - simulated).max() <= 1e-4 * np.abs(simulated).max(), name
        if site.substitute.arrays.shift is not None:
            shifted.add(name)
            assert left.min() >= 0
            assert left.max() > 7
    assert len(seen) == 2 * 4 - 2  # of two blocks; two operands are kept
    assert shifted == {"blocks_0/mlp_fc2", "blocks_1/mlp_fc2"}


@STATES
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_network_lowers_with_an_integer_product_for_every_site(platform, made):
    """None of them pretends; the branches, the weights of the modulation and all else stay floating point."""
    ready = executed(made)
    x, t = tiny_dit.inputs(tiny_dit.CONFIG, 2)
    given = x, t, np.zeros(2, np.int32)
    params, apply = model("dit").params, model("dit").module.apply
    executing = sum(site.execute for site in ready.values())
    assert executing == 6
    variables = {"params": params, "quant": nest_sites(ready)}
    assert lowered_int_dots(apply, variables, *given, platforms=[platform]) == executing
    idle = nest_sites({name: site.replace(execute=False) for name, site in ready.items()})
    simulated = {"params": params, "quant": idle}
    assert lowered_int_dots(apply, simulated, *given, platforms=[platform]) == 0
