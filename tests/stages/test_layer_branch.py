"""One layer of SVDQuant: its parts alone, its errors against NumPy, the shift, and what it is compared on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.operators import DENSE, Operator, plain, same_conv
from qdiff_jax.quant import quantizer
from qdiff_jax.quant.qparams import dynamic_qparams, from_tensor
from qdiff_jax.quant.smoothing import GELU_SHIFT, exponents
from qdiff_jax.stages.group_grids import activation_spec, weight_spec
from qdiff_jax.stages.layer_branch import Codes, Grids, candidate_errors, fit, solve
from qdiff_jax.stages.layer_inputs import layer_rows

KEY = jax.random.key(0)
K, N, G = 16, 12, 4
ROUND = jax.jit(quantizer.fake_quant)
PLAIN = np.zeros(2, np.float32)
HALF = np.full(2, 0.5, np.float32)


@functools.cache
def layer(positive=False):
    """(rows [128, 1, K], kernel [K, N]); two input channels are thirty times the others."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((128, 1, K))
    if positive:
        x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    else:
        x[..., [3, 10]] *= 30
    w = rng.standard_normal((K, N)) * np.exp(0.5 * rng.standard_normal(K))[:, None]
    return np.float32(x), np.float32(w)


def grids(rank=0, unsigned=False, **own):
    return Grids(weight_spec(G), activation_spec(G, unsigned), rank, shifted=unsigned, **own)


def codes(unsigned=False, bits=4):
    top = 2 ** (bits - 1) - 1
    weight = (jnp.float32(-top), jnp.float32(top))
    return Codes(weight, (jnp.float32(0), jnp.float32(2**bits - 1)) if unsigned else weight)


def solved(rank, pair, unsigned=False, shift=0.0, **own):
    rows, kernel = layer(unsigned)
    magnitude = np.abs(rows + np.float32(shift)).max((0, 1))
    how = {key: own.pop(key) for key in ("stored_sums",) if key in own}
    given = (grids(rank, unsigned, **how), codes(unsigned))
    return solve(KEY, *given, rows, kernel, magnitude, jnp.float32(shift), pair, **own)


def stored_error(made, unsigned=False, shift=0.0):
    """The relative output error of a layer as it is stored, in float64."""
    rows, kernel = (v.astype(np.float64) for v in layer(unsigned))
    rows = rows[:, 0]
    inverse = np.ones(K) if made.smoothing is None else made.smoothing.astype(np.float64)
    grid = dynamic_qparams(activation_spec(G, unsigned), *codes(unsigned).activation)
    read = ROUND(grid, np.float32((rows + shift) * inverse))
    rest = made.codes * np.repeat(made.scale.astype(np.float64), G, axis=0)
    found = np.asarray(read, np.float64) @ rest
    if made.down is not None:
        found += rows @ made.down.astype(np.float64) @ made.up.astype(np.float64)
    if made.sums is not None:
        found -= shift * made.sums
    wanted = rows @ kernel
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def test_without_branch_and_smoothing_it_is_nearest_rounding_in_groups():
    made = solved(0, PLAIN)
    _, kernel = layer()
    grid = jax.jit(lambda w: from_tensor(weight_spec(G), w, -7, 7))(kernel)
    np.testing.assert_array_equal(made.codes, jax.jit(quantizer.codes)(grid, kernel))
    np.testing.assert_array_equal(made.scale, grid.scale)
    assert made.down is made.up is made.smoothing is made.sums is None
    assert np.isnan(made.errors[1])
    assert made.errors[0] == made.errors[2]
    np.testing.assert_allclose(made.errors[2], stored_error(made), rtol=1e-4)


def test_the_branch_and_its_alternation_lower_the_error():
    made = solved(3, HALF)
    assert made.errors[2] < 1.01 * made.errors[1] < 0.9 * made.errors[0]
    assert made.iterations >= 2
    assert (made.down.shape, made.up.shape) == ((K, 3), (3, N))
    assert made.down.dtype == made.up.dtype == np.float16
    assert np.abs(made.codes).max() == 7
    np.testing.assert_allclose(made.errors[2], stored_error(made), rtol=1e-3)
    again = solved(3, HALF)
    for ours, theirs in zip(vars(made).values(), vars(again).values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_a_full_rank_branch_leaves_nothing():
    # What float16 loses of the branch is in the codes.
    assert solved(N, HALF).errors[2] < 1e-4


def test_a_shifted_input_takes_unsigned_codes_and_the_bias_makes_up_for_it():
    shifted = solved(3, PLAIN, unsigned=True, shift=GELU_SHIFT)
    np.testing.assert_allclose(
        shifted.errors[2], stored_error(shifted, True, GELU_SHIFT), rtol=1e-3
    )
    rest = shifted.codes * np.repeat(shifted.scale, G, axis=0)
    np.testing.assert_allclose(shifted.sums, rest.sum(0), atol=1e-4)


@pytest.mark.slow
def test_the_sum_of_stored_weights_makes_up_better_than_that_of_full_precision():
    ours, official = (
        solved(3, PLAIN, unsigned=True, shift=GELU_SHIFT, stored_sums=stored)
        for stored in (True, False)
    )
    np.testing.assert_allclose(
        official.errors[2], stored_error(official, True, GELU_SHIFT), rtol=1e-3
    )
    assert ours.errors[2] < official.errors[2]


def test_candidates_are_compared_with_everything_on():
    rows, kernel = layer()
    magnitude = np.abs(rows).max((0, 1))
    pairs = exponents("fast")
    errors = candidate_errors(
        KEY, grids(3), codes(), rows, kernel[None], magnitude, jnp.float32(0), pairs
    )
    assert errors.shape == (10,)
    one_shot = solved(3, HALF, most=1).errors[1]
    (half,) = np.flatnonzero((pairs == 0.5).all(1))
    np.testing.assert_allclose(errors[half], one_shot, rtol=0.05)
    assert np.min(errors) < 0.8 * errors[0]


@pytest.mark.slow
def test_gptq_on_the_rest_lowers_the_error_where_inputs_have_something_in_common():
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((512, 1, K)) + 2 * rng.standard_normal((512, 1, 1))
    rows, kernel = np.float32(rows), layer()[1]
    given = (rows, kernel, np.abs(rows).max((0, 1)), jnp.float32(0), PLAIN)
    nearest, made = (
        solve(KEY, grids(3), codes(), *given, use_gptq=use_gptq) for use_gptq in (False, True)
    )
    np.testing.assert_array_equal(made.down, nearest.down)
    assert made.errors[2] < 0.95 * nearest.errors[2]


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_fitting_a_layer_lowers(platform):
    """A layer too large for an exact decomposition: no such device is needed."""

    def run(rows, kernel, magnitude, pair):
        how = Grids(weight_spec(G), activation_spec(G), 2)
        given = (codes(), rows, kernel, magnitude, jnp.float32(0), pair)
        return fit(KEY, how, *given, most=2).codes

    shapes = ((8, 1, 32), (1, 32, 24), (32,), (2,))
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    exported = jax.export.export(jax.jit(run), platforms=[platform])(*args)
    assert exported.platforms == (platform,)
    assert exported.mlir_module().count("stablehlo.while") >= 2


PLACES = {
    "conv": (same_conv(3), (2, 5, 4, 3), (3, 3, 3, 2)),
    "strided": (Operator("conv", (2, 1), ((0, 1), (0, 1))), (2, 6, 5, 3), (3, 3, 3, 2)),
    "dense": (DENSE, (2, 5, 3), (3, 2)),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_rows_of_a_layer_times_its_kernel_are_its_output(place):
    operator, shape, kernel_shape = place
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in (shape, kernel_shape))
    rows = layer_rows(operator, x, kernel_shape, 10_000)
    output = np.asarray(plain(operator, jnp.asarray(x), jnp.asarray(w), None)).reshape(-1, 2)
    found = np.einsum("ntc,tcm->nm", rows, w.reshape(-1, *kernel_shape[-2:]))
    np.testing.assert_allclose(found, output, atol=1e-5)
    some = layer_rows(operator, x, kernel_shape, 4, seed=1)
    assert some.shape == (4, *rows.shape[1:])
    assert all((rows == row).all((1, 2)).any() for row in some)
