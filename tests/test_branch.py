"""The low-rank operator: fused as unfused, in integers as simulated, stored and lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.branch import LowRank, low_rank, smoothed
from qdiff_jax.eval.cost import network_cost
from qdiff_jax.export.bundle import load_bundle, save_bundle, stored_bytes
from qdiff_jax.export.integer import integer_accumulators, lowered_int_dots
from qdiff_jax.export.qtensor import codes as codes_of
from qdiff_jax.export.qtensor import from_codes
from qdiff_jax.operators import DENSE, Operator, same_conv
from qdiff_jax.quant import quantizer
from qdiff_jax.quant.qparams import dynamic_qparams, freeze, from_tensor
from qdiff_jax.sites import Replacement, Site, SiteQuant
from qdiff_jax.stages.group_grids import activation_spec, weight_spec

from .stages.chain import leaves_equal
from .tiny_unet import QUICK

RNG = np.random.default_rng(0)
SHIFT = 0.171875
CASES = {
    "dense": (DENSE, (2, 5, 12), (12, 6), False),
    "dense-shifted": (DENSE, (2, 5, 12), (12, 6), True),
    "conv": (same_conv(3), (1, 4, 4, 12), (3, 3, 12, 6), False),
    "conv-1x1": (Operator("conv"), (1, 3, 3, 12), (1, 1, 12, 6), True),
}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# The others compile as long and differ in what test_integer has.
RUN = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name == "dense-shifted" else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)


def ends(spec, bits=4):
    top = 2 ** (bits - 1) - 1 if spec.signed else 2**bits - 1
    return (-top if spec.signed else 0), top


def built(case):
    """(input, site, its operator's arrays, bias) with smoothing 3, branch of rank 2, groups of 4."""
    operator, x_shape, shape, shifted = case
    x = RNG.standard_normal(x_shape).astype(np.float32)
    if shifted:
        x = np.abs(x) - np.float32(0.1)
    a_spec, w_spec = activation_spec(4, unsigned=shifted), weight_spec(4)
    rest = RNG.standard_normal(shape).astype(np.float32)
    grid, integers = _nearest(w_spec, rest)
    weight = from_codes(np.asarray(integers), grid, 4)
    arrays = LowRank(
        jnp.asarray(RNG.standard_normal((*shape[:-1], 2)), jnp.float16),
        jnp.asarray(RNG.standard_normal((2, shape[-1])), jnp.float16),
        jnp.asarray(np.exp(RNG.standard_normal(shape[-2])), jnp.float32),
        jnp.float32(SHIFT) if shifted else None,
    )
    site = SiteQuant(dynamic_qparams(a_spec, *ends(a_spec)), weight)
    return x, site, arrays, jnp.asarray(RNG.standard_normal(shape[-1]), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _nearest(spec, weight):
    grid = from_tensor(spec, weight, *ends(spec))
    return grid, quantizer.codes(grid, weight)


def no_kernel():
    raise AssertionError("packed codes need no kernel")


def run(operator, x, site, arrays, bias):
    return low_rank(arrays, operator, x, no_kernel, bias, site)


def unfused(operator, x, site, arrays, bias):
    """(x / s) L1 L2 + Q((x + shift) / s) Q(R) + b in float64, L1 not yet divided by s."""

    def contract(x, w):
        if operator.kind == "dense":
            return x @ w
        x = np.pad(x, ((0, 0), *operator.padding, (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[:2], axis=(1, 2))
        return np.einsum("bhwcij,ijco->bhwo", windows, w)

    s = 1.0 / np.asarray(arrays.smoothing, np.float64)
    down, up = (np.asarray(v, np.float64) for v in (arrays.down, arrays.up))
    read = np.asarray(quantizer.fake_quant(site.lhs, smoothed(arrays, jnp.asarray(x))), np.float64)
    rest = np.asarray(quantizer.dequantize(site.rhs.qparams, _codes(site)), np.float64)
    branch = contract(x / s, down * s[:, None]) @ up
    return branch + contract(read, rest) + np.asarray(bias, np.float64)


def _codes(site):
    return codes_of(site.rhs)


@RUN
def test_the_fused_operator_is_the_formula_and_integers_are_the_simulation(case):
    operator = case[0]
    x, site, arrays, bias = built(case)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(x, site, arrays, bias):
        return [run(operator, x, site.replace(execute=on), arrays, bias) for on in (False, True)]

    simulated, executed = jax.device_get(both(x, site, arrays, bias))
    wanted = unfused(operator, x, site, arrays, bias)
    size = np.abs(wanted).max()
    assert np.abs(simulated - wanted).max() <= 1e-6 * size
    assert np.abs(executed - simulated).max() <= 1e-5 * size
    assert executed.dtype == np.float32


def test_the_integers_are_those_of_the_codes():
    operator, _, shape, _ = case = CASES["dense-shifted"]
    x, site, arrays, _ = built(case)

    @jax.jit
    def accumulated(x, site, arrays):
        moved = smoothed(arrays, x)
        codes = quantizer.codes(freeze(site.lhs, moved), moved)
        return codes, integer_accumulators(operator, moved, site.lhs, site.rhs)[0]

    codes, acc = jax.device_get(accumulated(x, site, arrays))
    assert codes.min() >= 0
    assert codes.max() == 15
    held = np.asarray(_codes(site), np.int64)
    for g in range(3):
        part = slice(4 * g, 4 * g + 4)
        np.testing.assert_array_equal(acc[g], codes[..., part].astype(np.int64) @ held[part])


def test_without_its_parts_the_operator_is_the_plain_site():
    x, site, _, bias = built(CASES["dense"])
    plain = quantizer.fake_quant(site.lhs, jnp.asarray(x)).reshape(-1, 12)
    plain = plain @ quantizer.dequantize(site.rhs.qparams, _codes(site))
    found = run(DENSE, jnp.asarray(x), site, LowRank(), bias)
    np.testing.assert_array_equal(found, plain.reshape(2, 5, 6) + bias[None, None])


@pytest.mark.parametrize("execute", [False, True])
def test_half_precision_inputs_stay_so(execute):
    x, site, arrays, bias = built(CASES["dense"])
    half = (jax.ShapeDtypeStruct(v.shape, jnp.bfloat16) for v in (x, bias))
    site = site.replace(execute=execute)
    found = jax.eval_shape(lambda x, bias: run(DENSE, x, site, arrays, bias), *half)
    assert found.dtype == jnp.bfloat16


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@EVERY
def test_every_platform_is_given_integer_products(case, platform):
    x, site, arrays, bias = built(case)

    def function(execute):
        return lambda *args: run(case[0], args[0], args[1].replace(execute=execute), *args[2:])

    args = (x, site, arrays, bias)
    # The branch stays in floating point.
    assert lowered_int_dots(function(True), *args, platforms=[platform]) == 1
    assert lowered_int_dots(function(False), *args, platforms=[platform]) == 0


def test_a_bundle_gives_the_operator_back(tmp_path):
    _, site, arrays, _ = built(CASES["conv"])
    held = site.replace(substitute=Replacement(arrays, low_rank))
    bare = site.replace(substitute=Replacement(LowRank(smoothing=arrays.smoothing), low_rank))
    quant = {"a": {"conv": held, "other": bare}}
    saved = dict(
        params={"a": {"conv": {"bias": jnp.zeros(6)}}},
        plan_json=[],
        model_config={"family": "unet_ddpm"},
        schedule_config={},
        sampler_config={},
        source={"sha256": "00"},
    )
    save_bundle(tmp_path / "bundle", quant=quant, **saved)
    loaded = load_bundle(tmp_path / "bundle").quant
    assert leaves_equal(loaded, quant)
    assert loaded["a"]["conv"].substitute.apply is low_rank
    kinds = stored_bytes(tmp_path / "bundle").by_kind
    assert kinds["branches"] == 2 * (arrays.down.size + arrays.up.size)

    def unknown(*args):
        del args

    quant["a"]["conv"] = site.replace(substitute=Replacement(arrays, unknown))
    with pytest.raises(TypeError, match="unknown is an operator that a bundle cannot hold"):
        save_bundle(tmp_path / "second", quant=quant, **saved)


def test_the_site_says_what_the_branch_costs():
    _, site, arrays, _ = built(CASES["conv"])
    place = Site("a/conv", *(CASES["conv"][i] for i in (0, 1, 2)))
    held = site.replace(substitute=Replacement(arrays, low_rank))
    plain, beside = (network_cost([place], {"a": {"conv": s}}) for s in (site, held))
    extra = 16 * (9 * 12 * 2 + 2 * 6)
    assert beside.macs == plain.macs + extra
    assert beside.bitops == plain.bitops + 16 * 16 * extra
    assert beside.by_site == plain.by_site
