"""Floating-point grids of 4 bits: their values, hardware's rounding, and which format suits what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.quant.floating import (
    format_of_least_error,
    format_of_spread,
    fp4_qparams,
    grid_values,
    nvfp4_qparams,
    spread,
)
from qdiff_jax.quant.qparams import QParams, dynamic_qparams, freeze, from_range
from qdiff_jax.quant.quantizer import codes, fake_quant
from qdiff_jax.quant.ranges import min_max
from qdiff_jax.quant.spec import QuantSpec, code_range

from ..tiny_unet import QUICK
from .dit_layer import layer, output_error, relative, turned

VALUES = {
    "e1m2": [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5],
    "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "e3m0": [0, 0.25, 0.5, 1, 2, 4, 8, 16],
}
# Relative error per row, and the ratio max / lower quartile in the median row.
SHAPES = {
    "uniform": ("e1m2", 0.071, 4.0),
    "gauss": ("e2m1", 0.1156, 10.9),
    "laplace": ("e2m1", 0.1489, 26.2),
    "student": ("e3m0", 0.1864, 41.6),
}
FORMATS = tuple(VALUES)
quantized = jax.jit(fake_quant, compiler_options=QUICK)
numbered = jax.jit(codes, compiler_options=QUICK)
measured = jax.jit(freeze, compiler_options=QUICK)


def unit(name) -> QParams:
    """The grid with scale 1."""
    top = VALUES[name][-1]
    return from_range(QuantSpec(grid=name), -top, top, -7, 7)


@pytest.mark.parametrize("name", FORMATS)
def test_the_values_of_a_format_are_its_codes(name):
    bits = int(name[1])
    np.testing.assert_array_equal(grid_values(bits), VALUES[name])
    values = np.array(VALUES[name])
    ratio = {"e1m2": 7, "e2m1": 12, "e3m0": 64}[name]
    assert values.max() / values[1] == ratio
    both = jnp.asarray(np.concatenate([-values[:0:-1], values]), jnp.float32)
    np.testing.assert_array_equal(numbered(unit(name), both), np.arange(-7, 8))
    np.testing.assert_array_equal(quantized(unit(name), both), both)


@pytest.mark.parametrize("name", FORMATS)
def test_every_value_goes_to_the_nearest_of_the_grid(name):
    x = np.random.default_rng(0).uniform(-20, 20, 4000).astype(np.float32)
    grid = np.concatenate([-np.array(VALUES[name])[:0:-1], VALUES[name]])
    nearest = grid[np.abs(x[:, None] - grid[None]).argmin(1)]
    np.testing.assert_array_equal(quantized(unit(name), x), nearest)


def test_e2m1_is_the_hardware_type_ties_included():
    values = np.array(VALUES["e2m1"])
    ties = (values[1:] + values[:-1]) / 2
    x = np.concatenate([np.linspace(-6, 6, 5001), ties, -ties]).astype(np.float32)
    hardware = jnp.asarray(x).astype(jnp.float4_e2m1fn).astype(jnp.float32)
    np.testing.assert_array_equal(quantized(unit("e2m1"), jnp.asarray(x)), hardware)


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_are_the_closed_form(name):
    top = VALUES[name][-1]
    x = jnp.linspace(-2.0, 2.0, 81) * top
    cotangent = jnp.cos(jnp.arange(81.0))
    grid, scale = unit(name), 0.9

    def loss(x, scale):
        return (fake_quant(grid.replace(scale=scale), x) * cotangent).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=QUICK)
    to_x, to_scale = gradient(x, jnp.float32(scale))
    ratio = np.asarray(x, np.float64) / scale
    inside = np.abs(ratio) <= top
    q = np.asarray(quantized(grid, jnp.asarray(ratio, jnp.float32)), np.float64)
    np.testing.assert_allclose(to_x, np.where(inside, cotangent, 0), rtol=1e-6)
    expected = np.where(inside, q - ratio, q) * np.asarray(cotangent)
    np.testing.assert_allclose(to_scale, expected.sum(), rtol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_the_rule_picks_the_format_of_least_error(name):
    best, error, ratio = SHAPES[name]
    x = layer().samples[name]
    rows = QuantSpec(granularity="channel", axis=-2)
    errors = {}
    for kind in FORMATS:
        spec = QuantSpec(grid=kind, granularity="channel", axis=-2)
        held = from_range(spec, *min_max(x, rows), -7, 7)
        errors[kind] = relative(quantized(held, jnp.asarray(x, jnp.float32)), x)
    assert min(errors, key=errors.get) == best
    assert errors[best] == pytest.approx(error, abs=0.001)
    found = float(np.median(spread(x, rows)))
    assert found == pytest.approx(ratio, abs=0.1)
    assert format_of_spread(found) == int(best[1])
    wanted = format_of_least_error(x, rows)
    assert np.mean(wanted == int(best[1])) > 0.5
    # A format of its own for each row is at least as good as the best one for all.
    mixed = {s: fp4_qparams(x, QuantSpec(grid="fp4", granularity="channel", axis=-2), s)
             for s in ("spread", "error", best)}  # fmt: skip
    found = {s: relative(quantized(q, jnp.asarray(x, jnp.float32)), x) for s, q in mixed.items()}
    assert found["error"] <= errors[best] * (1 + 1e-6)
    assert found[best] == pytest.approx(errors[best], rel=1e-5)
    assert found["spread"] <= 1.1 * found["error"]


def test_figures_of_the_layer_before_and_after_a_rotation():
    raw = error_of("e2m1", layer().x, layer().kernel)
    after = {name: error_of(name, *turned()) for name in FORMATS}
    assert raw == pytest.approx(0.4549, abs=0.002)
    wanted = {"e2m1": 0.1936, "e1m2": 0.2207, "e3m0": 0.3359}
    for name, value in wanted.items():
        assert after[name] == pytest.approx(value, abs=0.002), name
    assert min(after, key=after.get) == "e2m1"


def error_of(name, x, kernel) -> float:
    """Of the output: activations per token, weights per output channel."""
    seen = quantized(
        dynamic_qparams(QuantSpec(grid=name, granularity="token"), -7, 7),
        jnp.asarray(x, jnp.float32),
    )
    spec = QuantSpec(grid=name, granularity="channel")
    weight = from_range(spec, *min_max(kernel, spec), -7, 7)
    return output_error(seen, quantized(weight, jnp.asarray(kernel, jnp.float32)), layer().y)


class TestBlockScales:
    def kernel(self):
        return np.asarray(layer().kernel[:256, :64], np.float32)

    def test_nvfp4_scales_are_8_bit_numbers_of_which_the_largest_is_448(self):
        w = self.kernel()
        held = nvfp4_qparams(w)
        assert held.scale.shape == (16, 64)
        whole = np.abs(w).max() / (6 * 448)
        stored = np.asarray(held.scale, np.float64) / whole
        assert stored.max() == pytest.approx(448)
        eight = jnp.asarray(stored, jnp.float32).astype(jnp.float8_e4m3fn).astype(jnp.float32)
        np.testing.assert_allclose(stored, eight, rtol=1e-5)
        # What the hardware's types make of it.
        view = (w.reshape(16, 16, 64) / np.asarray(held.scale)[:, None]).clip(-6, 6)
        q = jnp.asarray(view).astype(jnp.float4_e2m1fn).astype(jnp.float32)
        expected = (q * held.scale[:, None]).reshape(w.shape)
        np.testing.assert_allclose(quantized(held, jnp.asarray(w)), expected, rtol=1e-6)

    def test_a_kernel_of_zeros_stays_one(self):
        held = nvfp4_qparams(np.zeros((32, 4), np.float32))
        np.testing.assert_array_equal(quantized(held, jnp.zeros((32, 4))), 0.0)
        small = 1e-25 * self.kernel()[:32, :4]
        assert relative(quantized(nvfp4_qparams(small), jnp.asarray(small)), small) < 0.1

    def test_mxfp4_scales_are_powers_of_two_and_hold_the_largest_value_of_a_block(self):
        spec = QuantSpec(grid="e2m1", granularity="group", axis=-2, group=32, scale_format="e8m0")
        w = self.kernel()
        held = from_range(spec, *min_max(w, spec), -7, 7)
        exponent = np.log2(np.asarray(held.scale))
        np.testing.assert_array_equal(exponent, np.round(exponent))
        top = np.abs(w).reshape(8, 32, 64).max(1)
        np.testing.assert_array_equal(exponent, np.floor(np.log2(top)) - 2)
        # Values beyond 6 are clipped to 6, at most a quarter of them away.
        assert relative(quantized(held, jnp.asarray(w)), w) < 0.15

    def test_finer_and_freer_scales_lose_less(self):
        w = self.kernel()
        fields = {"grid": "e2m1", "granularity": "group", "axis": -2}
        plain = {g: QuantSpec(group=g, **fields) for g in (16, 32)}
        powers = {g: QuantSpec(group=g, scale_format="e8m0", **fields) for g in (16, 32)}
        error = {
            name: relative(quantized(q, jnp.asarray(w)), w)
            for name, q in {
                "nvfp4": nvfp4_qparams(w),
                **{f"float {g}": from_range(s, *min_max(w, s), -7, 7) for g, s in plain.items()},
                **{f"power {g}": from_range(s, *min_max(w, s), -7, 7) for g, s in powers.items()},
            }.items()
        }
        assert error["float 16"] < error["float 32"]
        assert error["nvfp4"] < error["power 32"]
        assert error["nvfp4"] == pytest.approx(error["float 16"], rel=0.05)

    @pytest.mark.parametrize("scale_format", ["e4m3", "e8m0"])
    def test_scales_measured_at_run_time_are_stored_the_same_way(self, scale_format):
        spec = QuantSpec(
            grid="e2m1", granularity="group", group=16, dynamic=True, scale_format=scale_format
        )
        x = jnp.asarray(layer().x[:8, :64], jnp.float32)
        x = x.at[0].set(0.0).at[1].multiply(1e6)
        frozen = measured(dynamic_qparams(spec, -7, 7), x)
        kind = jnp.float8_e4m3fn if scale_format == "e4m3" else jnp.float8_e8m0fnu
        np.testing.assert_array_equal(frozen.scale, frozen.scale.astype(kind).astype(jnp.float32))
        assert np.isfinite(np.asarray(quantized(dynamic_qparams(spec, -7, 7), x))).all()
        assert np.isnan(np.asarray(quantized(dynamic_qparams(spec, -7, 7), x * jnp.nan))).all()


def test_what_a_float_grid_is_not_is_refused():
    assert QuantSpec(grid="e2m1") == QuantSpec(grid="e2m1", signed=True, symmetric=True)
    assert code_range(QuantSpec(grid="e3m0"), 4) == (-7, 7)
    with pytest.raises(ValueError, match="has 4 bits, got 8"):
        code_range(QuantSpec(grid="e2m1"), 8)
    with pytest.raises(ValueError, match="do not follow from a range"):
        from_range(QuantSpec(grid="fp4"), -1.0, 1.0, -7, 7)
    with pytest.raises(ValueError, match="grid 'fp4'"):
        fp4_qparams(np.ones((2, 2)), QuantSpec())
    with pytest.raises(ValueError, match="select is 'best'"):
        fp4_qparams(np.ones((2, 2)), QuantSpec(grid="fp4"), "best")
    with pytest.raises(ValueError, match="fp4_qparams got scale_format 'e4m3'"):
        fp4_qparams(np.ones((2, 2)), QuantSpec(grid="fp4", scale_format="e4m3"))
    with pytest.raises(ValueError, match="scale_format is 'fp8'"):
        QuantSpec(grid="e2m1", scale_format="fp8")
    with pytest.raises(ValueError, match="signed symmetric grid"):
        QuantSpec(scale_format="e4m3")
