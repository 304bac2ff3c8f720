"""Low-rank updates: the two-convolution form is the merged kernel, B = 0 is no update, merging is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.export.qtensor import dequantize, from_codes
from qdiff_jax.operators import DENSE, Operator, plain
from qdiff_jax.quant.lora import (
    Update,
    init_low_rank,
    merged_codes,
    merged_weight,
    product,
    trained_grid,
)
from qdiff_jax.quant.quantizer import codes, fake_quant
from qdiff_jax.quant.quantizer import dequantize as values_of
from qdiff_jax.quant.ranges import weight_qparams
from qdiff_jax.quant.spec import QuantSpec

CHANNEL = QuantSpec(granularity="channel")
SHAPES = {"dense": (10, 7), "conv": (3, 3, 6, 7)}


def kernel(name, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(SHAPES[name]), jnp.float32)


def update(name, rank=4, size=3.0):
    drawn = init_low_rank(jax.random.key(3), SHAPES[name], rank)
    b = size * np.random.default_rng(5).standard_normal(drawn.b.shape)
    return drawn.replace(b=jnp.asarray(b, jnp.float32))


def test_a_convolution_and_a_1x1_behind_it_are_one_merged_kernel():
    x = np.random.default_rng(1).standard_normal((2, 8, 8, 6)).astype(np.float32)
    made = update("conv")
    operator = Operator("conv", (2, 2), ((1, 1), (1, 1)))
    inner = plain(operator, jnp.asarray(x), made.a, None)
    apart = plain(Operator("conv"), inner, made.b[None, None], None)
    merged = plain(operator, jnp.asarray(x), product(made), None)
    np.testing.assert_allclose(merged, apart, atol=1e-5)
    dense = update("dense")
    x = x.reshape(-1, 12)[:, :10]
    apart = plain(DENSE, plain(DENSE, x, dense.a, None), dense.b, None)
    np.testing.assert_allclose(plain(DENSE, x, product(dense), None), apart, atol=1e-5)


def test_the_contraction_is_exact_where_floats_are():
    """Small integers: no rounding anywhere, so a transposed axis or a tap out of place would show."""
    rng = np.random.default_rng(0)
    a = rng.integers(-4, 5, (3, 3, 6, 5))
    b = rng.integers(-4, 5, (5, 7))
    made = product(Update(jnp.float32(a), jnp.float32(b)))
    np.testing.assert_array_equal(made, np.einsum("klir,ro->klio", a, b))


@pytest.mark.parametrize("name", SHAPES)
def test_an_update_starts_from_nothing(name):
    made = init_low_rank(jax.random.key(0), SHAPES[name], 32)
    assert made.a.shape == (*SHAPES[name][:-1], 32)
    assert made.b.shape == (32, SHAPES[name][-1])
    bound = np.prod(SHAPES[name][:-1]) ** -0.5
    assert 0.9 * bound < float(jnp.abs(made.a).max()) <= bound
    assert float(jnp.std(made.a)) == pytest.approx(bound / np.sqrt(3), rel=0.1)
    np.testing.assert_array_equal(product(made), np.zeros(SHAPES[name]))
    assert not np.array_equal(made.a, init_low_rank(jax.random.key(1), SHAPES[name], 32).a)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_step_zero_is_the_naively_quantized_weight_bit_for_bit(name, bits):
    w = kernel(name)
    grid = weight_qparams(w, CHANNEL, bits, method="minmax")
    nothing = init_low_rank(jax.random.key(0), w.shape, 4)
    naive = fake_quant(grid, w)
    base = values_of(grid, codes(grid, w))
    np.testing.assert_array_equal(merged_weight(base, nothing, grid), naive)
    np.testing.assert_array_equal(merged_weight(w, nothing, grid), naive)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_merged_integers_are_the_trained_weight_bit_for_bit(name, bits):
    w = kernel(name)
    grid = weight_qparams(w, CHANNEL, bits, method="minmax")
    grid = grid.replace(scale=grid.scale * 1.01)  # as learned
    base, made = values_of(grid, codes(grid, w)), update(name)
    held = merged_codes(base, made, grid)
    assert (np.asarray(held) != np.asarray(codes(grid, w))).mean() > 0.01
    stored = from_codes(held, trained_grid(grid), bits)
    np.testing.assert_array_equal(dequantize(stored), jax.jit(merged_weight)(base, made, grid))


def test_both_factors_and_the_scale_get_gradients_and_the_zero_point_none():
    w = kernel("conv")
    grid = weight_qparams(w, CHANNEL, 4, method="minmax")

    def loss(made, grid):
        return jnp.sum(merged_weight(w, made, grid) ** 2)

    by_update, by_grid = jax.grad(loss, argnums=(0, 1))(update("conv"), grid)
    assert float(jnp.abs(by_update.a).min()) > 0
    assert float(jnp.abs(by_update.b).min()) > 0
    assert float(jnp.abs(by_grid.scale).min()) > 0
    np.testing.assert_array_equal(by_grid.zero_point, np.zeros(7))
    # At the start A has no say: B is 0.
    first, _ = jax.grad(loss, argnums=(0, 1))(init_low_rank(jax.random.key(0), w.shape, 4), grid)
    np.testing.assert_array_equal(first.a, np.zeros_like(first.a))
    assert float(jnp.abs(first.b).max()) > 0


def test_the_product_is_asked_for_in_full_precision():
    """Devices that round factors to fewer bits by default would merge other codes than were trained."""
    asked = str(jax.make_jaxpr(product)(update("conv")))
    assert "Precision.HIGHEST" in asked


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="rank at least 1"):
        init_low_rank(jax.random.key(0), (3, 4), 0)
