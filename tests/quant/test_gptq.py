"""GPTQ and coordinate descent: the acceptance figures of the fixture, and what must hold on any layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.quant.gptq import (
    coordinate_descent,
    gptq,
    inverse_factor,
    kronecker_descent,
    ordered_factor,
    round_with_factor,
)
from qdiff_jax.quant.moments import Moments
from qdiff_jax.quant.qparams import from_range
from qdiff_jax.quant.quantizer import codes, dequantize
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.stages.layer_rounding import ClosedFormConfig, round_layer

CHANNEL = QuantSpec(granularity="channel")
GROUP = QuantSpec(granularity="group", axis=-2, group=8)
SYMMETRIC = {"symmetric": True, "signed": True}


def ranges(kernel, spec, bits=4):
    kernel = np.asarray(kernel)
    if spec.granularity == "group":
        view = kernel.reshape(*kernel.shape[:-2], -1, spec.group, kernel.shape[-1])
        axes = (*range(kernel.ndim - 2), kernel.ndim - 1)
    else:
        view = kernel
        axes = None if spec.granularity == "tensor" else tuple(range(kernel.ndim - 1))
    low, high = (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1) if spec.signed else (0, 2**bits - 1)
    return from_range(spec, view.min(axes), view.max(axes), low, high)


@functools.cache
def layer(size=48, columns=10, seed=0):
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((size, size)) * 0.3 + np.eye(size)
    x = (rng.standard_normal((400, size)) @ mix).astype(np.float32)
    w = rng.standard_normal((size, columns)).astype(np.float32)
    return jnp.asarray(w), jnp.asarray(x.T @ x / len(x))


def error(held, kernel, hessian, grid):
    d = np.asarray(dequantize(grid, held) - kernel, np.float64).reshape(-1, kernel.shape[-1])
    return float(np.sum(d * (np.asarray(hessian, np.float64) @ d)))


@pytest.mark.parametrize("spec", [CHANNEL, QuantSpec(), GROUP])
def test_identity_gives_nearest_codes(spec):
    w, _ = layer()
    grid = ranges(w, spec)
    held = gptq(w, 3.0 * jnp.eye(48), grid)
    np.testing.assert_array_equal(held.codes, codes(grid, w))
    assert float(held.damping) == pytest.approx(0.01)


def test_identity_on_a_convolution_in_groups():
    w = jnp.asarray(np.random.default_rng(1).standard_normal((3, 3, 16, 5)), jnp.float32)
    spec = QuantSpec(granularity="group", axis=-2, group=4)
    view = np.asarray(w).reshape(3, 3, 4, 4, 5)
    grid = from_range(spec, view.min((0, 1, 3)), view.max((0, 1, 3)), 0, 15)
    held = gptq(w, jnp.eye(144), grid)
    assert held.codes.shape == w.shape
    np.testing.assert_array_equal(held.codes, codes(grid, w))


def test_blocks_change_nothing_in_double_precision():
    w, h = layer()
    with jax.enable_x64(True):
        h64 = jnp.asarray(np.asarray(h, np.float64))
        grid = ranges(w, CHANNEL)
        whole = gptq(w, h64, grid, block=48).codes
        for block in (1, 7):  # 7 does not divide 48
            np.testing.assert_array_equal(gptq(w, h64, grid, block=block).codes, whole)


def test_sequential_definition():
    """Row by row in NumPy: round, divide by the diagonal of the factor, push the error on."""
    w, h = (np.asarray(v, np.float64) for v in layer())
    grid = ranges(w.astype(np.float32), CHANNEL)
    scale, zero = np.asarray(grid.scale, np.float64), np.asarray(grid.zero_point, np.float64)
    damped = h + 0.01 * np.mean(np.diag(h)) * np.eye(48)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, held = w.copy(), np.zeros_like(w)
    for k in range(48):
        held[k] = np.clip(np.round(left[k] / scale) + zero, 0, 15)
        e = (left[k] - (held[k] - zero) * scale) / upper[k, k]
        left[k:] -= np.outer(upper[k, k:], e)
    with jax.enable_x64(True):
        made = gptq(jnp.asarray(w), jnp.asarray(h), grid, act_order=False, block=16).codes
    np.testing.assert_array_equal(made, held)


def test_act_order_is_the_sequential_definition_on_permuted_rows():
    """Largest diagonal first; with one scale for each output the order of rows is free."""
    w, h = layer()
    grid = ranges(w, CHANNEL)
    order = np.argsort(-np.diag(np.asarray(h)), kind="stable")
    with jax.enable_x64(True):
        h64, w64 = (jnp.asarray(np.asarray(v, np.float64)) for v in (h, w))
        made = np.asarray(gptq(w64, h64, grid, act_order=True).codes)
        sorted_h = h64[order][:, order]
        wanted = np.asarray(gptq(w64[order], sorted_h, grid, act_order=False).codes)
    np.testing.assert_array_equal(made[order], wanted)
    assert (made != np.asarray(gptq(w, h, grid, act_order=False).codes)).any()


@pytest.mark.parametrize("spec", [CHANNEL, GROUP])
@pytest.mark.parametrize("bits", [2, 4])
def test_never_above_nearest_rounding(spec, bits):
    for seed in range(3):
        w, h = layer(seed=seed)
        grid = ranges(w, spec, bits)
        nearest = error(codes(grid, w), w, h, grid)
        held = gptq(w, h, grid).codes
        assert error(held, w, h, grid) < 0.8 * nearest
        assert int(held.min()) >= 0
        assert int(held.max()) <= 2**bits - 1


def test_singular_moments_raise_the_damping():
    w, _ = layer()
    x = np.random.default_rng(2).standard_normal((6, 48)).astype(np.float32) * 1e3
    h = jnp.asarray(x.T @ x)
    held = gptq(w, h, ranges(w, CHANNEL), damping=0.0)
    assert 0 < float(held.damping) < 1
    assert np.isfinite(error(held.codes, w, h, held.qparams))


def test_moments_that_are_not_finite_say_so():
    w, h = layer()
    assert np.isnan(gptq(w, h.at[0, 0].set(jnp.nan), ranges(w, CHANNEL)).damping)


def test_inputs_that_never_vary_are_rounded_to_nearest():
    w, h = layer()
    h = h.at[5].set(0.0).at[:, 5].set(0.0)
    grid = ranges(w, CHANNEL)
    np.testing.assert_array_equal(gptq(w, h, grid).codes[5], codes(grid, w)[5])


def test_factor_is_of_the_inverse():
    _, h = layer()
    upper, _ = jax.jit(inverse_factor)(h, 0.0)
    np.testing.assert_allclose(np.triu(upper), upper)
    upper = np.asarray(upper, np.float64)
    np.testing.assert_allclose(upper @ np.asarray(h, np.float64) @ upper.T, np.eye(48), atol=5e-3)


def test_new_bits_and_values_compile_nothing():
    w, h = layer()
    pieces = (ordered_factor, round_with_factor)
    gptq(w, h, ranges(w, CHANNEL))
    count = [piece._cache_size() for piece in pieces]
    gptq(w + 1, h * 2, ranges(w, CHANNEL, 3), damping=0.05)
    assert [piece._cache_size() for piece in pieces] == count


class TestDescent:
    def test_lowers_the_quadratic_and_stops_at_a_fixed_point(self):
        w, h = layer()
        grid = ranges(w, CHANNEL)
        nearest = codes(grid, w)
        once = coordinate_descent(nearest, w, h, grid, sweeps=3)
        assert error(once, w, h, grid) < 0.7 * error(nearest, w, h, grid)
        still = coordinate_descent(once, w, h, grid, sweeps=20)
        again = coordinate_descent(still, w, h, grid, sweeps=1)
        np.testing.assert_array_equal(again, still)
        assert error(still, w, h, grid) <= error(once, w, h, grid) * (1 + 1e-6)

    def test_kronecker_lowers_its_own_objective(self):
        w, h = layer()
        rng = np.random.default_rng(5)
        a = rng.standard_normal((200, 10)) @ (rng.standard_normal((10, 10)))
        g = jnp.asarray(a.T @ a / 200, jnp.float32)
        grid = ranges(w, CHANNEL)

        def objective(held):
            d = np.asarray(dequantize(grid, held) - w, np.float64)
            return np.trace(np.asarray(g, np.float64) @ d.T @ np.asarray(h, np.float64) @ d)

        start = gptq(w, h, grid).codes
        free = {"input_damping": 0.0, "output_damping": 0.0}
        made = kronecker_descent(start, w, h, g, grid, **free)
        assert objective(made) < 0.9 * objective(start)

    def test_kronecker_with_the_identity_is_plain_descent(self):
        w, h = layer()
        grid = ranges(w, CHANNEL)
        free = {"input_damping": 0.0, "output_damping": 0.0, "sweeps": 1}
        start = codes(grid, w)
        plain = coordinate_descent(start, w, h, grid, sweeps=1)
        made = kronecker_descent(start, w, h, jnp.eye(10), grid, **free)
        assert np.mean(np.asarray(plain) == np.asarray(made)) > 0.99


class TestFixture:
    """Correlated inputs through a 1152 x 1152 layer (seed 0, float64), weights in 4 symmetric bits.

    The figures are relative output errors of nearest rounding and of GPTQ from a reference in NumPy, whose
    groups take their ranges as they stand when a group is reached. Here ranges stand beforehand: measured
    0.0816, 0.0342 and 0.0273 in the rows' own order, and 0.0776, 0.0356 and 0.0283 in that of the diagonal.
    """

    @staticmethod
    @functools.cache
    def data():
        rng, n = np.random.default_rng(0), 1152
        rng.standard_normal((64, n)), rng.random((1, 128))
        x = rng.standard_normal((2048, n)) * np.exp(0.4 * rng.standard_normal(n))
        x[:, rng.choice(n, 12, replace=False)] *= 40
        w = rng.standard_normal((n, n)) * 0.02 * np.exp(0.2 * rng.standard_normal(n))
        w[:, rng.choice(n, 6, replace=False)] *= 8
        # What the reference draws in between for other tests.
        for shape in ((5, n), (4, 64), (64, n), n, (64, n), n, (4, 16, n), n):
            rng.standard_normal(shape)
        x = x @ (rng.standard_normal((n, n)) * 0.15 + np.eye(n))
        hessian = 2.0 * x.T @ x / len(x)
        return w.T.astype(np.float32), hessian

    def relative(self, grid, held):
        w, h = self.data()
        d = np.asarray(dequantize(grid, held), np.float64) - w
        return np.sqrt(np.sum(d * (h @ d)) / np.sum(w * (h @ w)))

    @pytest.mark.parametrize(
        ("group", "nearest", "reached"),
        [(None, 0.4739, 0.0817), (128, 0.2298, 0.0343), (64, 0.1792, 0.0272)],
    )
    def test_values(self, group, nearest, reached):
        w, h = (jnp.asarray(v, jnp.float32) for v in self.data())
        spec = QuantSpec(granularity="channel", **SYMMETRIC)
        if group is not None:
            spec = QuantSpec(granularity="group", axis=-2, group=group, **SYMMETRIC)
        grid, (inputs, outputs) = ranges(w, spec), w.shape
        zero = jnp.zeros
        moments = Moments(
            jnp.ones(()), zero(inputs), zero(outputs), h, zero((inputs, outputs)), zero(outputs)
        )
        for act_order in (False, True):
            config = ClosedFormConfig(target="layer_quantized_input", act_order=act_order)
            made = round_layer(w, zero(outputs), grid, moments, config)
            assert self.relative(grid, made.nearest) == pytest.approx(nearest, abs=0.002)
            limit = 0.002 if not act_order or group else 0.005
            assert self.relative(grid, made.codes) == pytest.approx(reached, abs=limit)
