"""A split operand in integers: two products, one per part, each with its own scales and zero points."""

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
from qdiff_jax.export.operands import split_operands
from qdiff_jax.export.qtensor import codes as stored_codes
from qdiff_jax.export.qtensor import from_codes
from qdiff_jax.operators import DENSE, QK, same_conv
from qdiff_jax.quant.qparams import from_range
from qdiff_jax.quant.quantizer import codes
from qdiff_jax.quant.ranges import weight_qparams
from qdiff_jax.quant.spec import QuantSpec

AT, K, N = 5, 8, 6
INPUT = QuantSpec(granularity="split", axis=-1, boundary=AT)
WEIGHT = QuantSpec(granularity="split", axis=-2, boundary=AT)
SIGNED = QuantSpec(granularity="split", axis=-2, boundary=AT, symmetric=True, signed=True)
CASES = {
    "1x1": (same_conv(1), (2, 4, 4, K), (1, 1, K, N)),
    "3x3": (same_conv(3), (2, 4, 4, K), (3, 3, K, N)),
    "stride": (same_conv(3, 2), (2, 5, 5, K), (3, 3, K, N)),
    "dense": (DENSE, (3, 7, K), (K, N)),
}


def parts(case, bits=4, spec=WEIGHT, lhs=INPUT):
    operator, x_shape, w_shape = CASES[case]
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in (x_shape, w_shape))
    x[..., AT:] = 20 * x[..., AT:] + 9  # another range and another zero point
    ends = [x[..., :AT], x[..., AT:]] if lhs is INPUT else [x]
    lo, hi = (np.float32([f(e) for e in ends]).squeeze() for f in (np.min, np.max))
    q_x = from_range(lhs, lo, hi, 0, 255)
    q_w = weight_qparams(w, spec, bits)
    return operator, x, q_x, from_codes(codes(q_w, w), q_w, bits)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("spec", [WEIGHT, SIGNED, QuantSpec(granularity="channel")])
def test_integers_equal_the_simulation(case, bits, spec):
    operator, x, q_x, tensor = parts(case, bits, spec)
    bias = np.linspace(-1, 1, N, dtype=np.float32)
    wanted = np.asarray(simulated_op(operator, x, q_x, tensor, bias))
    made = np.asarray(integer_op(operator, x, q_x, tensor, bias))
    np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    check_executable({"input": q_x, "weight": tensor})


def test_only_the_weight_may_be_split():
    operator, x, q_x, tensor = parts("3x3", lhs=QuantSpec())
    wanted = np.asarray(simulated_op(operator, x, q_x, tensor))
    made = np.asarray(integer_op(operator, x, q_x, tensor))
    np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_accumulators_of_the_parts_are_exact():
    _, x, q_x, tensor = parts("dense")
    made, left, right = integer_accumulators(DENSE, x, q_x, tensor)
    assert made.dtype == jnp.int32
    assert made.shape == (2, 3, 7, N)
    q, w = np.asarray(codes(q_x, x)).astype(np.int64), np.asarray(stored_codes(tensor))
    for i, cut in enumerate((slice(0, AT), slice(AT, K))):
        centred = q[..., cut] - int(q_x.zero_point[i])
        wanted = centred @ (w[cut].astype(np.int64) - np.asarray(tensor.qparams.zero_point[i], int))
        np.testing.assert_array_equal(made[i], wanted)
    whole = (np.asarray(made) * np.asarray(left) * np.asarray(right)).sum(0)
    np.testing.assert_allclose(integer_op(DENSE, x, q_x, tensor), whole, rtol=1e-5, atol=1e-4)


def test_each_part_is_a_product_of_int8():
    operator, x, q_x, tensor = parts("3x3")
    pairs = split_operands(operator, x, q_x, tensor)
    assert [pair[0].codes.shape[-1] for pair in pairs] == [9 * AT, 9 * (K - AT)]
    assert {leaf.codes.dtype for pair in pairs for leaf in pair} == {jnp.dtype("int8")}
    assert lowered_has_int_dot(lambda x: integer_op(operator, x, q_x, tensor), x)


def test_a_nan_spoils_its_sample_and_no_other():
    operator, x, q_x, tensor = parts("3x3")
    x[1, 0, 0, K - 1] = np.nan
    y = np.asarray(integer_op(operator, x, q_x, tensor))
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()


def test_what_cannot_be_executed_is_said_in_a_sentence():
    operator, x, q_x, tensor = parts("3x3")
    other = QuantSpec(granularity="split", axis=-1, boundary=3)
    wrong = from_range(other, jnp.full(2, -1.0), jnp.ones(2), 0, 255)
    with pytest.raises(ValueError, match=r"split at \[3, 5\] cannot be multiplied part by part"):
        integer_op(operator, x, wrong, tensor)
    with pytest.raises(ValueError, match="qk: operands split at"):
        integer_op(QK, x[:, 0], q_x, q_x, rhs=x[:, 0])
    grouped = from_range(
        QuantSpec(granularity="group", axis=-1, group=4), jnp.zeros(2), jnp.ones(2), 0, 255
    )
    with pytest.raises(ValueError, match="split in two and the other cut into groups"):
        integer_op(operator, x, grouped, tensor)
