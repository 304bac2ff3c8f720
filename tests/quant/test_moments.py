"""Second moments against NumPy on the explicit rows, and the least squares that follow from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_jax.operators import DENSE, QK, Operator, plain, same_conv
from qdiff_jax.quant.moments import (
    chunk_moments,
    cross_moment,
    hessian,
    layer_loss,
    merge,
    positions,
    refit_bias,
    rows_of,
)

from .aim import aimed

STRIDED = Operator("conv", (2, 2), ((0, 1), (0, 1)))


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("operator", "shape", "kernel"),
    [
        (same_conv(3), (2, 5, 6, 4), (3, 3, 4, 7)),
        (STRIDED, (2, 6, 8, 4), (3, 3, 4, 7)),
        (same_conv(1), (2, 5, 6, 4), (1, 1, 4, 7)),
        (DENSE, (2, 5, 4), (4, 7)),
        (DENSE, (2, 4), (4, 7)),
    ],
)
def test_rows_times_kernel_is_the_operator(operator, shape, kernel):
    x, w = draw(0, *shape), draw(1, *kernel)
    wanted = np.asarray(plain(operator, x, w, None)).reshape(2, -1, 7)
    rows = rows_of(operator, jnp.asarray(x), kernel)
    np.testing.assert_allclose(rows @ w.reshape(-1, 7), wanted, rtol=0, atol=1e-4)
    picks = positions(wanted.shape[1], max(1, wanted.shape[1] // 2), np.arange(2))
    some = rows_of(operator, jnp.asarray(x), kernel, jnp.asarray(picks))
    wanted = np.take_along_axis(wanted, picks[:, :, None], axis=1)
    np.testing.assert_allclose(some @ w.reshape(-1, 7), wanted, rtol=0, atol=1e-4)


def test_products_have_no_rows():
    with pytest.raises(ValueError, match="no weight"):
        rows_of(QK, jnp.zeros((1, 2, 3)), (3, 3))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(size=st.integers(1, 300), count=st.integers(1, 300), first=st.integers(0, 10_000))
def test_positions_are_different_and_inside(size, count, first):
    picks = positions(size, count, np.arange(first, first + 3))
    assert picks.shape == (3, min(size, count))
    assert (picks >= 0).all()
    assert (picks < size).all()
    assert all(len(set(row)) == len(row) for row in picks.tolist())


class TestMoments:
    x = draw(2, 60, 5) @ draw(3, 5, 5) + 7.0
    r = draw(4, 60, 3) + 0.3 * x[:, :3]
    w = np.abs(draw(5, 60))

    def parts(self, *cuts):
        edges = (0, *cuts, 60)
        chunks = [slice(a, b) for a, b in zip(edges, edges[1:])]
        return [
            chunk_moments(*(jnp.asarray(v[c]) for v in (self.x, self.r, self.w))) for c in chunks
        ]

    def whole(self, *cuts):
        first, *rest = self.parts(*cuts)
        for part in rest:
            first = merge(first, part)
        return first

    @pytest.mark.parametrize("cuts", [(), (20, 40), (1, 2, 59)])
    def test_weighted_and_centred_like_numpy(self, cuts):
        made = self.whole(*cuts)
        p = (self.w / self.w.sum()).astype(np.float64)
        mean, target = p @ self.x, p @ self.r
        x, r = self.x - mean, self.r - target
        np.testing.assert_allclose(made.mean, mean, rtol=1e-5)
        np.testing.assert_allclose(made.target_mean, target, rtol=1e-4)
        np.testing.assert_allclose(hessian(made), x.T @ (p[:, None] * x), rtol=0, atol=1e-4)
        np.testing.assert_allclose(cross_moment(made), x.T @ (p[:, None] * r), rtol=0, atol=1e-4)
        plain_h = self.x.T @ (p[:, None] * self.x)
        np.testing.assert_allclose(hessian(made, centred=False), plain_h, rtol=1e-5)
        plain_c = self.x.T @ (p[:, None] * self.r)
        np.testing.assert_allclose(cross_moment(made, centred=False), plain_c, rtol=1e-4)

    def test_a_mean_far_from_zero_costs_no_digits(self):
        """Subtracting m m' from uncentred moments would lose them all in float32."""
        x = jnp.asarray(draw(6, 500, 4) + 3000.0)
        made = merge(*(chunk_moments(c, c[:, :1], jnp.ones(250)) for c in (x[:250], x[250:])))
        wanted = np.cov(np.asarray(x, np.float64).T, bias=True)
        np.testing.assert_allclose(hessian(made), wanted, rtol=0, atol=2e-3)

    def test_rows_of_no_weight_are_not_there(self):
        one = self.whole()
        nothing = chunk_moments(jnp.asarray(self.x), jnp.asarray(self.r), jnp.zeros(60))
        for a, b in zip(jax.tree.leaves(merge(one, nothing)), jax.tree.leaves(one)):
            np.testing.assert_array_equal(a, b)


class TestLeastSquares:
    """Target T = X W + b + R: everything compared with NumPy's least squares on the rows."""

    x = (draw(7, 300, 6) @ draw(8, 6, 6) + 1.5).astype(np.float32)
    w, b = draw(9, 6, 4), draw(10, 4)
    r = (0.5 * draw(11, 300, 4) + np.sin(x[:, :4])).astype(np.float32)
    moments = chunk_moments(jnp.asarray(x), jnp.asarray(r), jnp.ones(300))

    def target(self):
        return (self.x @ self.w + self.b + self.r).astype(np.float64)

    def test_aim_without_ridge_is_the_exact_solution(self):
        ones = np.concatenate([self.x, np.ones((300, 1))], axis=1).astype(np.float64)
        solution = np.linalg.lstsq(ones, self.target(), rcond=None)[0]
        made = aimed(jnp.asarray(self.w), self.moments, ridge=0.0)
        np.testing.assert_allclose(made, solution[:-1], rtol=0, atol=2e-4)
        bias = refit_bias(jnp.asarray(self.b), jnp.asarray(self.w), made, self.moments)
        np.testing.assert_allclose(bias, solution[-1], rtol=0, atol=2e-3)

    def test_aim_without_a_bias(self):
        solution = np.linalg.lstsq(self.x.astype(np.float64), self.target() - self.b, rcond=None)[0]
        made = aimed(jnp.asarray(self.w), self.moments, ridge=0.0, centred=False)
        np.testing.assert_allclose(made, solution, rtol=0, atol=2e-4)

    def test_a_large_ridge_stays_at_the_weights(self):
        made = aimed(jnp.asarray(self.w), self.moments, ridge=1e6)
        np.testing.assert_allclose(made, self.w, rtol=0, atol=1e-4)

    def test_bias_is_the_exact_minimiser_for_any_rounding(self):
        rounded = np.round(self.w * 2) / 2
        bias = refit_bias(*(jnp.asarray(v) for v in (self.b, self.w, rounded)), self.moments)
        wanted = np.mean(self.target() - self.x @ rounded, axis=0)
        np.testing.assert_allclose(bias, wanted, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("centred", [True, False])
    def test_loss_without_passing_over_the_rows(self, centred):
        rounded = (np.round(self.w * 2) / 2).astype(np.float32)
        bias = self.b
        if centred:
            bias = refit_bias(*(jnp.asarray(v) for v in (self.b, self.w, rounded)), self.moments)
        e = self.target() - self.x @ rounded - np.asarray(bias)
        made = layer_loss(jnp.asarray(self.w), jnp.asarray(rounded), self.moments, centred=centred)
        np.testing.assert_allclose(made, np.mean(np.sum(e**2, axis=1)), rtol=1e-4)
