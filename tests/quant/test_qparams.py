"""Ranges to scales, and the published error table of RTN on a DiT-sized linear layer."""

import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.quant.qparams import dynamic_qparams, from_range
from qdiff_jax.quant.quantizer import fake_quant
from qdiff_jax.quant.ranges import weight_qparams
from qdiff_jax.quant.spec import QuantSpec, code_range


def relative(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


@pytest.mark.parametrize(
    ("spec", "lo", "hi", "bits", "scale", "zero"),
    [
        (QuantSpec(), -1.0, 2.0, 4, 0.2, 5),
        (QuantSpec(), 1.0, 3.0, 4, 0.2, 0),  # zero is forced into the range
        (QuantSpec(), -3.0, -1.0, 4, 0.2, 15),
        (QuantSpec(signed=True), -1.0, 2.0, 4, 0.2, -3),
        (QuantSpec(symmetric=True, signed=True), -1.0, 2.1, 4, 0.3, 0),
        (QuantSpec(symmetric=True), -1.0, 3.0, 4, 0.2, 0),  # always-zero ignores the negative end
        (QuantSpec(), 0.0, 0.0, 4, 1e-8, 0),
        (QuantSpec(grid="log2"), 0.0, 0.8, 4, 0.8, 0),
    ],
)
def test_scale_and_zero_point_of_a_range(spec, lo, hi, bits, scale, zero):
    params = from_range(spec, lo, hi, *code_range(spec, bits))
    np.testing.assert_allclose(params.scale, scale, rtol=1e-6)
    assert float(params.zero_point) == zero


def test_bits_may_differ_from_channel_to_channel():
    spec = QuantSpec(granularity="channel")
    bits = np.array([2, 4, 8])
    params = from_range(spec, -jnp.ones(3), 2 * jnp.ones(3), jnp.zeros(3), 2.0**bits - 1)
    x = jnp.broadcast_to(jnp.linspace(-1, 2, 1001)[:, None], (1001, 3))
    levels = [len(np.unique(column)) for column in np.asarray(fake_quant(params, x)).T]
    assert levels == [4, 16, 256]


def test_balanced_levels_are_data():
    """2**b + 1 levels, -2**(b-1)..2**(b-1), need no spec of their own (BitsFusion)."""
    params = from_range(QuantSpec(symmetric=True, signed=True), -1.0, 1.0, -2, 2)
    x_hat = np.unique(fake_quant(params, jnp.linspace(-1, 1, 101)))
    np.testing.assert_array_equal(x_hat, [-1, -0.5, 0, 0.5, 1])


def test_all_positive_group_keeps_zero_in_its_range():
    """Clamping the zero point without forcing zero into the range clips the whole group: 0.908."""
    r = np.random.default_rng(0)
    r.standard_normal((64, 1152))
    w = (r.random((1, 128)) * 0.1 + 1.0).astype(np.float32)
    spec = QuantSpec(granularity="group", group=128, dynamic=True)
    x_hat = fake_quant(dynamic_qparams(spec, 0, 15), jnp.asarray(w))
    assert relative(x_hat, w) == pytest.approx(0.019, abs=0.001)


@pytest.fixture(scope="module")
def linear():
    """Activations with outlier channels and a weight [in, out], as in a DiT block."""
    r = np.random.default_rng(0)
    r.standard_normal((64, 1152))
    r.random((1, 128))
    x = r.standard_normal((2048, 1152)) * np.exp(0.4 * r.standard_normal(1152))
    x[:, r.choice(1152, 12, replace=False)] *= 40
    w = r.standard_normal((1152, 1152)) * 0.02 * np.exp(0.2 * r.standard_normal(1152))
    w[:, r.choice(1152, 6, replace=False)] *= 8
    x, w = x.astype(np.float32), np.ascontiguousarray(w.T.astype(np.float32))
    return x, w, x @ w


def weight(w, bits, symmetric, group=None, tensor=False):
    spec = QuantSpec(
        symmetric=symmetric,
        signed=symmetric,
        granularity="tensor" if tensor else "group" if group else "channel",
        axis=-2 if group else -1,
        group=group,
    )
    params = weight_qparams(w, spec, bits, method="minmax", narrow=symmetric)
    return np.asarray(fake_quant(params, jnp.asarray(w)))


def activation(x, bits, symmetric, group=None):
    spec = QuantSpec(
        symmetric=symmetric,
        signed=symmetric,
        granularity="group" if group else "token",
        group=group,
        dynamic=True,
    )
    params = dynamic_qparams(spec, *code_range(spec, bits, narrow=symmetric))
    return np.asarray(fake_quant(params, jnp.asarray(x)))


@pytest.mark.parametrize(
    ("w_bits", "a_bits", "group", "expected"),
    [(8, 8, None, 0.0724), (4, 8, None, 0.5787), (4, 4, None, 0.6417), (4, 4, 64, 0.2913)],
)
def test_nearest_rounding_of_weights_and_tokens(linear, w_bits, a_bits, group, expected):
    x, w, y = linear
    got = activation(x, a_bits, True, group) @ weight(w, w_bits, True, group)
    assert relative(got, y) == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize(
    ("symmetric", "group", "expected"),
    [
        (False, "tensor", 0.9246),
        (False, None, 0.4353),
        (False, 192, 0.2581),
        (False, 32, 0.1386),
        (True, "tensor", 0.9473),
        (True, None, 0.5747),
        (True, 128, 0.3190),
        (True, 32, 0.2270),
    ],
)
def test_nearest_rounding_of_four_bit_weights(linear, symmetric, group, expected):
    x, w, y = linear
    tensor = group == "tensor"
    got = x @ weight(w, 4, symmetric, None if tensor else group, tensor)
    assert relative(got, y) == pytest.approx(expected, abs=0.002)
