"""Hadamard matrices of every order a transformer needs, the rotation they give, and what it is worth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.quant.hadamard import (
    hadamard,
    hadamard_factors,
    paley,
    random_rotation,
    rotate,
    rotate_rows,
    unrotate,
)
from qdiff_jax.quant.qparams import dynamic_qparams, from_range
from qdiff_jax.quant.quantizer import fake_quant
from qdiff_jax.quant.ranges import min_max
from qdiff_jax.quant.spec import QuantSpec

from ..tiny_unet import QUICK
from .dit_layer import SIZE, dense_rotation, layer, output_error, relative, smoothing, turned

TOKEN = QuantSpec(granularity="token", symmetric=True, signed=True)
CHANNEL = QuantSpec(granularity="channel", symmetric=True, signed=True)
turn, turn_back, turn_rows = (
    jax.jit(f, compiler_options=QUICK) for f in (rotate, unrotate, rotate_rows)
)
FACTORS = {64: (64, 1), 72: (2, 36), 384: (32, 12), 768: (64, 12), 1024: (1024, 1), 1152: (32, 36)}
FACTORS |= {1536: (128, 12), 3072: (256, 12), 4096: (4096, 1), 4608: (128, 36)}


@pytest.mark.parametrize("order", FACTORS)
def test_rows_are_orthogonal_at_every_order_of_the_transformers(order):
    left, right = hadamard_factors(order)
    assert (len(left), len(right)) == FACTORS[order]
    for factor in (left, right):
        while len(factor) > 1024:  # [[a, a], [a, -a]] is orthogonal if a is
            half = len(factor) // 2
            a, b, c, d = (q for rows in np.split(factor, 2) for q in np.split(rows, 2, axis=1))
            assert (a == b).all() & (a == c).all() & (a == -d).all()
            factor = factor[:half, :half]
        size = len(factor)
        assert set(np.unique(factor)) <= {-1, 1}
        product = factor.astype(np.float32) @ factor.astype(np.float32).T  # whole numbers: exact
        np.testing.assert_array_equal(product, size * np.eye(size))
    # H H' = (A A') (x) (B B') = n I, of the whole matrix where it is small.
    if order <= 384:
        whole = hadamard(order).astype(np.int32)
        np.testing.assert_array_equal(whole @ whole.T, order * np.eye(order, dtype=np.int32))


@pytest.mark.parametrize("order", [4, 12, 20, 28, 36, 44, 60, 72, 76])
def test_both_of_paleys_constructions(order):
    matrix = paley(order).astype(np.int32)
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order, dtype=np.int32))


@pytest.mark.parametrize("order", [0, -4, 6, 18, 92, 2.5])
def test_orders_out_of_reach_are_refused(order):
    with pytest.raises(ValueError, match="Hadamard matrix"):
        hadamard_factors(order)


def test_signs_that_do_not_fit_are_refused():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="do not divide"):
        random_rotation(key, 48, 32)
    signs = random_rotation(key, 48, 12)
    assert signs.shape == (4, 12)
    assert set(np.unique(signs)) == {-1, 1}
    with pytest.raises(ValueError, match="does not fit axis -1"):
        rotate(jnp.ones((2, 24)), signs)
    with pytest.raises(ValueError, match="does not fit axis -2"):
        rotate_rows(jnp.ones((24, 48)), signs)


@pytest.mark.parametrize(("channels", "block"), [(72, None), (48, 12), (16, None)])
def test_a_rotation_is_the_dense_matrix_and_its_inverse_undoes_it(channels, block):
    with jax.enable_x64(True):
        signs = random_rotation(jax.random.key(1), channels, block)
        rng = np.random.default_rng(0)
        x, w = rng.standard_normal((3, 5, channels)), rng.standard_normal((channels, 7))
        size = signs.shape[1]
        matrix = np.kron(np.eye(len(signs)), hadamard(size)) / np.sqrt(size)
        matrix = np.asarray(signs, np.float64).reshape(-1, 1) * matrix
        turned = turn(jnp.asarray(x), signs)
        assert turned.dtype == jnp.float64
        np.testing.assert_allclose(turned, x @ matrix, atol=1e-14)
        np.testing.assert_allclose(turn_back(turned, signs), x, atol=1e-14)
        rows = turn_rows(jnp.asarray(w), signs)
        np.testing.assert_allclose(rows, matrix.T @ w, atol=1e-14)
        assert relative(turned @ rows, x @ w) < 2e-15
    assert rotate(jnp.asarray(x, jnp.float32), signs.astype(jnp.float32)).dtype == jnp.float32


def test_kernels_of_convolutions_turn_with_their_input():
    signs = random_rotation(jax.random.key(2), 12)
    w = jnp.asarray(np.random.default_rng(3).standard_normal((3, 3, 12, 5)), jnp.float32)
    turned = turn_rows(w, signs)
    np.testing.assert_allclose(turned[1, 2], turn_rows(w[1, 2], signs), atol=1e-6)


def test_a_wide_rotation_keeps_length_and_comes_back():
    signs = random_rotation(jax.random.key(3), 4608)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 4608)), jnp.float32)
    turned = turn(x, signs)
    norms = [np.linalg.norm(v, axis=1) for v in (turned, x)]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    np.testing.assert_allclose(turn_back(turned, signs), x, atol=1e-5)
    assert relative(turned, x) > 1  # and it is not where it was


def test_it_costs_what_its_two_factors_cost():
    signs, x = random_rotation(jax.random.key(4), SIZE), jnp.zeros((1, SIZE))
    cost = jax.jit(rotate).lower(x, signs).cost_analysis()
    assert 2 * SIZE * (32 + 36) <= cost["flops"] < 2.2 * SIZE * (32 + 36)


class TestFixture:
    """Outlier channels, before and after. The reference rotates with the dense Paley matrix of order 1152
    (exact figures); the product of 32 and 36 is another rotation, judged by the same orderings."""

    @staticmethod
    @functools.cache
    def both(which: str):
        """(x R, R'W, s-scaled x R, R's W) in float64, R by `which`: "dense" or "factors"."""
        held, s = layer(), smoothing()
        scaled = (held.x / s, held.kernel * s[:, None])
        if which == "dense":
            matrix = dense_rotation()
            return [*turned(), scaled[0] @ matrix, matrix.T @ scaled[1]]
        pairs = []
        for x, w in ((held.x, held.kernel), scaled):
            with jax.enable_x64(True):
                signs = jnp.asarray(held.signs)[None]
                pairs += [
                    np.asarray(f(jnp.asarray(v), signs)) for f, v in ((turn, x), (turn_rows, w))
                ]
        return pairs

    @pytest.mark.parametrize("which", ["dense", "factors"])
    def test_the_layer_is_the_same_and_its_outliers_are_gone(self, which):
        held = layer()
        x, w, *_ = self.both(which)
        assert relative(x @ w, held.y) < 2e-15
        peaks = [np.abs(v).max() / np.sqrt(np.mean(v**2)) for v in (held.x, x)]
        assert peaks[0] == pytest.approx(67.4, abs=0.1)
        assert peaks[1] == pytest.approx(5.0, abs=0.05 if which == "dense" else 0.5)

    @pytest.mark.parametrize(("which", "share"), [("dense", 0.0), ("factors", 0.1)])
    def test_figures_at_8_and_4_bits(self, which, share):
        x, w, scaled_x, scaled_w = self.both(which)
        found = {
            "w8a8": layer_error(x, w, 8, 8),
            "w4a8": layer_error(x, w, 4, 8),
            "w4a4": layer_error(x, w, 4, 4),
            "scaled w4a4": layer_error(scaled_x, scaled_w, 4, 4),
        }
        wanted = {"w8a8": 0.0122, "w4a8": 0.1719, "w4a4": 0.2207, "scaled w4a4": 0.0660}
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=share, abs=0.002), name
        held, s = layer(), smoothing()
        scaled = layer_error(held.x / s, held.kernel * s[:, None], 4, 4)
        assert scaled == pytest.approx(0.2066, abs=0.002)
        # The two together are worth far more than either, which are worth about the same.
        assert found["scaled w4a4"] < 0.5 * min(scaled, found["w4a4"])
        assert found["w4a4"] == pytest.approx(scaled, rel=0.1)

    def test_rounding_before_and_after_the_rotation_is_three_times_worse(self):
        """ViDiT-Q's released code quantizes the weight, rotates it and quantizes it again."""
        held, s = layer(), smoothing()
        _, _, x, w = self.both("dense")
        twice = dense_rotation().T @ rounded_weight(held.kernel * s[:, None], 4).astype(np.float64)
        once = layer_error(x, w, 4, 8)
        assert once == pytest.approx(0.0466, abs=0.002)
        assert layer_error(x, twice, 4, 8) == pytest.approx(0.1498, abs=0.002)


quantized = jax.jit(fake_quant, compiler_options=QUICK)


def rounded_weight(kernel, bits) -> np.ndarray:
    """Per output channel, codes +-(2^(b-1) - 1)."""
    top = 2.0 ** (bits - 1) - 1
    qparams = from_range(CHANNEL, *min_max(kernel, CHANNEL), -top, top)
    return np.asarray(quantized(qparams, jnp.asarray(kernel, jnp.float32)))


def layer_error(x, kernel, w_bits, a_bits) -> float:
    """Of the output, activations per token."""
    top = 2.0 ** (a_bits - 1) - 1
    seen = quantized(dynamic_qparams(TOKEN, -top, top), jnp.asarray(x, jnp.float32))
    return output_error(seen, rounded_weight(kernel, w_bits), layer().y)
