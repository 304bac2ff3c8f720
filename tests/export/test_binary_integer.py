"""Binary weights multiplied as integers: activations added and subtracted, exactly as in the simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.export.integer import (
    check_executable,
    integer_accumulators,
    integer_op,
    lowered_has_int_dot,
    simulated_op,
)
from qdiff_jax.export.qtensor import from_codes
from qdiff_jax.operators import DENSE, same_conv
from qdiff_jax.policy import ACTIVATION, BINARY_WEIGHT
from qdiff_jax.quant import quantizer
from qdiff_jax.quant.binary import single_basis
from qdiff_jax.quant.qparams import from_range
from qdiff_jax.quant.spec import QuantSpec

SPLIT = QuantSpec(granularity="split", boundary=2)
CASES = {
    "dense": (DENSE, (3, 5, 11), (11, 4), ACTIVATION, 8),
    "conv, zero point and padding": (same_conv(3), (2, 5, 5, 3), (3, 3, 3, 4), ACTIVATION, 4),
    "per tensor": (DENSE, (3, 11), (11, 4), ACTIVATION, 4),
    "split input": (DENSE, (3, 5), (5, 4), SPLIT, 8),
}


def operands(case, spec=BINARY_WEIGHT):
    operator, x_shape, w_shape, x_spec, bits = case
    rng = np.random.default_rng(0)
    x = rng.standard_normal(x_shape).astype(np.float32) + np.float32(0.4)
    w = rng.standard_normal(w_shape).astype(np.float32)
    ends = (-1.3, 2.1) if x_spec is not SPLIT else (np.float32([-1, -2]), np.float32([2, 3]))
    grid = single_basis(w, spec)
    weight = from_codes((w >= 0).astype(np.int32), grid, 1)
    return operator, x, from_range(x_spec, *ends, 0, 2**bits - 1), w, weight


@pytest.mark.parametrize("name", CASES)
def test_signs_times_codes_are_exactly_the_simulation_in_integers(name):
    spec = QuantSpec(grid="binary") if name == "per tensor" else BINARY_WEIGHT
    operator, x, grid, w, weight = operands(CASES[name], spec)

    @jax.jit
    def everything(x, grid, weight):
        given = (operator, x, grid, weight)
        held = quantizer.codes(grid, x)
        return held, integer_accumulators(*given), integer_op(*given), simulated_op(*given)

    held, (acc, _, right), y, simulated = jax.device_get(everything(x, grid, weight))
    held = held.astype(np.int64)
    signs = np.where(w >= 0, 1, -1)
    zero = np.asarray(grid.zero_point, np.int64)
    if name == "split input":
        parts = (slice(0, 2), slice(2, 5))
        sums = [(held[..., p] - z) @ signs[p] for p, z in zip(parts, zero)]
    else:
        sums = [whole(operator, held - zero, signs)]
    assert acc.dtype == np.int32
    np.testing.assert_array_equal(acc, sums)
    np.testing.assert_array_equal(np.ravel(right[0]), np.ravel(weight.qparams.scale))
    np.testing.assert_allclose(y, simulated, rtol=1e-5, atol=1e-5)
    check_executable({"lhs": grid, "rhs": weight})


def whole(operator, x, w):
    """The operator on int64, padding with zeros."""
    if operator.kind == "dense":
        return x @ w
    x = np.pad(x, ((0, 0), *operator.padding, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[:2], axis=(1, 2))
    return np.einsum("bhwcij,ijco->bhwo", windows, w)


def test_the_product_is_one_of_int8_matrices():
    operator, x, grid, _, weight = operands(CASES["dense"])
    assert lowered_has_int_dot(lambda x, w: integer_op(operator, x, grid, w), x, weight)


def test_an_activation_on_the_binary_grid_is_refused():
    operator, x, _, _, weight = operands(CASES["per tensor"], QuantSpec(grid="binary"))
    with pytest.raises(ValueError, match="'binary' are not proportional to values"):
        integer_op(operator, jnp.asarray(x), single_basis(x, QuantSpec(grid="binary")), weight)
