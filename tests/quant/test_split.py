"""Two parts of the contraction axis with scales of their own: [h, skip] of a U-Net's up path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_jax.quant.qparams import QParams, from_range
from qdiff_jax.quant.quantizer import codes, dequantize, fake_quant
from qdiff_jax.quant.ranges import weight_qparams
from qdiff_jax.quant.rounding import hard_codes, soft_rounding, soft_weight
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.quant.timed import from_ranges, select, step_context

PLAIN = QuantSpec()
CHANNEL = QuantSpec(granularity="channel")


def activation(boundary):
    return QuantSpec(granularity="split", axis=-1, boundary=boundary)


def weight(boundary, **fields):
    return QuantSpec(granularity="split", axis=-2, boundary=boundary, **fields)


# The shape fixed, since every shape compiles; where it is cut, spreads and bits are drawn.
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    boundary=st.sampled_from([1, 4]),
    gain=st.floats(2**-10, 1e3, width=32),
    bits=st.integers(2, 8),
)
def test_each_part_is_quantized_as_if_it_were_alone(boundary, gain, bits):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 3, 5)).astype(np.float32)
    x[..., boundary:] *= np.float32(gain)
    parts = np.split(x, [boundary], axis=-1)
    lo, hi = (np.float32([f(p) for p in parts]) for f in (np.min, np.max))
    both = from_range(activation(boundary), lo, hi, 0, 2**bits - 1)
    alone = [from_range(PLAIN, a, b, 0, 2**bits - 1) for a, b in zip(lo, hi)]
    for function in (fake_quant, codes):
        wanted = [np.asarray(function(q, p)) for q, p in zip(alone, parts)]
        np.testing.assert_array_equal(function(both, x), np.concatenate(wanted, -1))
    np.testing.assert_array_equal(dequantize(both, codes(both, x)), fake_quant(both, x))


@pytest.mark.parametrize("shape", [(3, 3, 6, 4), (6, 4)])
@pytest.mark.parametrize("method", ["minmax", "mse", "mse2d"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_of_a_weight_are_those_of_its_parts(shape, method, symmetric):
    kernel = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    kernel[..., :2, :] *= 9
    grid = dict(symmetric=symmetric, signed=symmetric)
    both = weight_qparams(kernel, weight(2, **grid), 4, method=method)
    assert both.scale.shape == (2, 4)
    for i, part in enumerate(np.split(kernel, [2], axis=-2)):
        alone = weight_qparams(part, QuantSpec(granularity="channel", **grid), 4, method=method)
        np.testing.assert_array_equal(both.scale[i], alone.scale)
        np.testing.assert_array_equal(both.zero_point[i], alone.zero_point)


def test_rounding_learns_both_parts_and_starts_at_nearest():
    """The official regulariser sums over the first part alone; here alpha is one array over both."""
    kernel = np.random.default_rng(2).standard_normal((6, 4)).astype(np.float32)
    q = weight_qparams(kernel, weight(2), 4)
    soft = soft_rounding(jnp.asarray(kernel), q)
    np.testing.assert_array_equal(hard_codes(soft), codes(q, kernel))
    slope = jax.grad(lambda a: soft_weight(soft.replace(alpha=a)).sum())(soft.alpha)
    assert (np.abs(slope).reshape(6, 4).sum(1) > 0).all()


def test_scales_of_both_parts_take_gradients_of_their_own_part():
    x = np.random.default_rng(3).standard_normal((4, 5)).astype(np.float32)
    q = from_range(activation(2), jnp.full(2, -1.0), jnp.full(2, 1.0), 0, 15)

    def first(scale):
        return (fake_quant(q.replace(scale=scale), x)[:, :2] ** 2).sum()

    slope = jax.grad(first)(q.scale)
    assert slope[0] != 0
    assert slope[1] == 0


def test_step_tables_select_and_gather_rows_of_parts():
    lo, hi = -np.float32([[1, 2], [3, 4]]), np.float32([[1, 2], [3, 4]])
    table = from_ranges(activation(2), lo, hi, 0, 255, [10.0, 20.0], "step")
    x = np.random.default_rng(4).standard_normal((2, 5)).astype(np.float32)
    rows = [fake_quant(select(table, step_context(t, i)), x) for i, t in enumerate((10.0, 20.0))]
    mixed = select(table, step_context([20.0, 10.0], [1, 0]))
    np.testing.assert_array_equal(fake_quant(mixed, x), np.stack([rows[1][0], rows[0][1]]))


def test_what_cannot_be_a_split_is_refused():
    with pytest.raises(ValueError, match="needs `boundary`"):
        QuantSpec(granularity="split")
    with pytest.raises(ValueError, match="boundary is 3 but granularity is 'tensor'"):
        QuantSpec(boundary=3)
    with pytest.raises(ValueError, match="static"):
        QuantSpec(granularity="split", boundary=3, dynamic=True)
    q = from_range(activation(5), jnp.zeros(2), jnp.ones(2), 0, 15)
    with pytest.raises(ValueError, match="a split at 5 does not fit an axis of 5"):
        fake_quant(q, jnp.ones((2, 5)))
    wrong = QParams(*(jnp.ones(3) for _ in range(4)), activation(2))
    with pytest.raises(ValueError, match=r"leaf of shape \(3,\)"):
        fake_quant(wrong, jnp.ones((2, 5)))
    with pytest.raises(ValueError, match="quantiles are not taken of a split tensor"):
        weight_qparams(np.ones((4, 2), np.float32), weight(2), 4, method="percentile")


def gaussian(first_weight, ratio, channels=64, samples=2048, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, 2 * channels)).astype(np.float32)
    x[:, channels:] *= ratio
    w = rng.standard_normal((2 * channels, 32)).astype(np.float32)
    w[:channels] *= first_weight
    return x, w


def output_error(x, w, w_bits, a_bits, split):
    """(MSE of x @ w, MSE of the first half of x) under min-max activations and searched weights."""
    half = x.shape[1] // 2
    q_w = weight_qparams(w, weight(half) if split else CHANNEL, w_bits)
    if split:
        lo, hi = (np.float32([f(x[:, :half]), f(x[:, half:])]) for f in (np.min, np.max))
        q_x = from_range(activation(half), lo, hi, 0, 2**a_bits - 1)
    else:
        q_x = from_range(PLAIN, x.min(), x.max(), 0, 2**a_bits - 1)
    x_hat, w_hat = np.asarray(fake_quant(q_x, x)), np.asarray(fake_quant(q_w, w))
    small = np.square(x_hat[:, :half] - x[:, :half]).mean()
    return np.square(x_hat @ w_hat - x @ w).mean(), small


@pytest.mark.parametrize(
    ("w_bits", "a_bits", "least", "least_small"), [(4, 8, 10, 100), (8, 8, 10, 100), (4, 4, 4, 20)]
)
def test_acceptance_s1_unlike_parts_gain_an_order_of_magnitude(w_bits, a_bits, least, least_small):
    x, w = gaussian(first_weight=5.0, ratio=20.0)
    plain, small_plain = output_error(x, w, w_bits, a_bits, split=False)
    split, small_split = output_error(x, w, w_bits, a_bits, split=True)
    assert plain / split >= least
    assert small_plain / small_split >= least_small


@pytest.mark.parametrize("bits", [(4, 8), (8, 8), (4, 4)])
def test_acceptance_s2_like_parts_gain_nothing(bits):
    # Wide enough that the extremes of half the weights are nearly those of all.
    x, w = gaussian(first_weight=1.0, ratio=1.0, channels=512, samples=256)
    plain, split = (output_error(x, w, *bits, split=s)[0] for s in (False, True))
    assert abs(split / plain - 1) < 0.10
