"""Block-diagonal Hessians: the blocks of the whole one, each part rounded alone, and when they are taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.quant.hessian_size import hessian_parts, rounding_cost
from qdiff_jax.quant.moments import (
    aimed,
    chunk_moments,
    hessian,
    layer_loss,
    merge,
)
from qdiff_jax.quant.qparams import from_range
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.stages.layer_rounding import ClosedFormConfig, round_layer

PARTS, SIZE, OUT, ROWS = 3, 8, 5, 200


def rows(seed=0):
    rng = np.random.default_rng(seed)
    mix = np.eye(PARTS * SIZE) + 0.3 * rng.standard_normal((PARTS * SIZE, PARTS * SIZE))
    x = rng.standard_normal((ROWS, PARTS * SIZE)) @ mix + 0.5
    r = 0.1 * rng.standard_normal((ROWS, OUT))
    return (jnp.asarray(v, jnp.float32) for v in (x, r, rng.uniform(0.5, 2.0, ROWS)))


def made(parts):
    x, r, weights = rows()
    half = ROWS // 2
    chunks = [slice(0, half), slice(half, ROWS)]
    return merge(*(chunk_moments(x[c], r[c], weights[c], parts) for c in chunks))


def kernel():
    return jnp.asarray(np.random.default_rng(1).standard_normal((1, 3, SIZE, OUT)), jnp.float32)


@pytest.mark.parametrize("centred", [True, False])
def test_a_stack_holds_the_diagonal_blocks_of_the_whole(centred):
    whole, stack = hessian(made(1), centred), hessian(made(PARTS), centred)
    assert stack.shape == (PARTS, SIZE, SIZE)
    for g in range(PARTS):
        own = slice(g * SIZE, (g + 1) * SIZE)
        np.testing.assert_allclose(stack[g], whole[own, own], rtol=2e-5, atol=1e-5)


def test_the_loss_is_that_of_the_whole_without_what_parts_share():
    stack, w = made(PARTS), kernel()
    change = 0.1 * jnp.sign(w)
    apart = jnp.asarray(jax.scipy.linalg.block_diag(*stack.spread))
    whole = stack.replace(spread=apart)
    np.testing.assert_allclose(
        layer_loss(w, w + change, stack), layer_loss(w, w + change, whole), rtol=1e-5
    )
    np.testing.assert_allclose(
        aimed(w, stack, ridge=0.0), aimed(w, whole, ridge=0.0), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("target", ["layer_quantized_input", "block_fp_output"])
def test_parts_are_rounded_as_layers_of_their_own(target):
    config = ClosedFormConfig(target=target)
    grid = from_range(
        QuantSpec(granularity="channel"), -2.5 * np.ones(OUT), 2.5 * np.ones(OUT), 0, 7
    )
    w, bias, stack = kernel(), jnp.zeros(OUT), made(PARTS)
    found = round_layer(w, bias, grid, stack, config)
    for g in range(PARTS):
        own = slice(g * SIZE, (g + 1) * SIZE)
        alone = stack.replace(mean=stack.mean[own], spread=stack.spread[g], cross=stack.cross[own])
        single = round_layer(w[:, g : g + 1], bias, grid, alone, config)
        np.testing.assert_array_equal(found.codes[:, g : g + 1], single.codes)
    assert float(found.loss) < float(found.nearest_loss)


def test_coordinate_descent_asks_for_the_whole():
    grid = from_range(
        QuantSpec(granularity="channel"), -2.5 * np.ones(OUT), 2.5 * np.ones(OUT), 0, 7
    )
    with pytest.raises(ValueError, match="hessian_mib"):
        round_layer(kernel(), jnp.zeros(OUT), grid, made(PARTS), ClosedFormConfig(sweeps=1))


@pytest.mark.parametrize(
    ("shape", "limit", "parts"),
    [
        ((3, 3, 320, 320), 2048, 1),
        ((3, 3, 2560, 1280), 2048, 9),
        ((3, 3, 2560, 1280), 512, 36),
        ((5120, 1280), 2048, 1),
        ((16384, 64), 2048, 4),
    ],
)
def test_the_fewest_parts_that_fit_are_taken(shape, limit, parts):
    assert hessian_parts(shape, limit) == parts
    assert rounding_cost(shape, 0, parts).bytes <= limit << 20


def test_a_layer_that_never_fits_is_an_error():
    with pytest.raises(ValueError, match="hessian_mib"):
        hessian_parts((3, 3, 2**20, 8), 1)


def test_taps_save_what_the_docstring_says():
    whole, taps = (rounding_cost((3, 3, 2560, 1280), 0, parts) for parts in (1, 9))
    assert whole.bytes == 8 * 4 * 23_040**2
    assert whole.bytes == 9 * taps.bytes
    factors = [rounding_cost((3, 3, 2560, 0), 0, parts).multiply_adds for parts in (1, 9)]
    assert factors[0] == pytest.approx(81 * factors[1], rel=1e-6)
