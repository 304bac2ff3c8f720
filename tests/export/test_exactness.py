"""How far integers stay exact: zero points removed after the product, and integers held in floating point."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.export import qtensor
from qdiff_jax.export.integer import integer_accumulators, integer_op
from qdiff_jax.operators import DENSE
from qdiff_jax.quant import quantizer
from qdiff_jax.quant.qparams import broadcast, dynamic_qparams, freeze, from_range
from qdiff_jax.quant.ranges import min_max
from qdiff_jax.quant.spec import QuantSpec, code_range

from ..quant.dit_layer import layer, relative
from ..tiny_unet import QUICK

TOKEN = QuantSpec(granularity="token")
W_SPECS = {
    "symmetric": QuantSpec(granularity="channel", symmetric=True, signed=True),
    "asymmetric": QuantSpec(granularity="channel"),
    "groups": QuantSpec(granularity="group", axis=-2, group=128),
}


@functools.partial(jax.jit, compiler_options=QUICK)
def numbers(x, kernel, w_qparams):
    """(accumulators and scales), (codes, scale, zero point) of the activation, the weight's codes."""
    w_codes = quantizer.codes(w_qparams, kernel)
    held = qtensor.from_codes(w_codes, w_qparams, 8)
    qparams = dynamic_qparams(TOKEN, 0, 255)
    frozen = freeze(qparams, x)
    scale, zero, *_ = broadcast(frozen, x)
    product = integer_accumulators(DENSE, x, qparams, held)
    return product, (quantizer.codes(frozen, x), scale, zero), w_codes


@pytest.mark.parametrize("name", W_SPECS)
def test_zero_points_taken_out_of_the_sum_leave_the_simulated_product(name):
    """64 tokens of the fixture; floating point only multiplies the scales, in float64."""
    spec = W_SPECS[name]
    x, kernel = (jnp.asarray(v, jnp.float32) for v in (layer().x[:64], layer().kernel))
    grid = from_range(spec, *min_max(kernel, spec), *code_range(spec, 8))
    (acc, left, right), (seen, scale, zero), held = jax.tree.map(
        lambda v: np.asarray(v, np.float64), numbers(x, kernel, grid)
    )
    seen = (seen - zero) * scale
    w_scale, w_zero = (np.asarray(v, np.float64) for v in (grid.scale, grid.zero_point))
    if name == "groups":
        w_scale, w_zero = (np.repeat(v, 128, axis=0) for v in (w_scale, w_zero))
    kernel = (held - w_zero) * w_scale
    assert relative((acc * left * right).sum(0), seen @ kernel) < 2e-15
    assert np.abs(acc).max() < 2**31
    if name == "symmetric":
        assert np.any(zero != 0)  # or there would be nothing to take out


def test_no_layer_of_the_imagenet_transformer_overflows():
    assert 4608 * 127**2 < 7.5e7 < 2**31
    spec = QuantSpec(granularity="channel")
    kernel = jax.ShapeDtypeStruct((4608, 1152), jnp.float32)

    def run(x, kernel):
        qparams = from_range(spec, kernel.min(0), kernel.max(0), 0, 255)
        held = qtensor.from_codes(quantizer.codes(qparams, kernel), qparams, 8)
        return integer_op(DENSE, x, dynamic_qparams(TOKEN, 0, 255), held)

    x = jax.ShapeDtypeStruct((1, 4608), jnp.float32)
    assert jax.eval_shape(run, x, kernel).shape == (1, 1152)


def test_integers_that_8_bit_and_16_bit_floats_hold():
    small, codes = np.arange(-16, 17), np.arange(-128, 128)
    e4m3 = jnp.asarray(small, jnp.float32).astype(jnp.float8_e4m3fn).astype(jnp.float32)
    np.testing.assert_array_equal(e4m3, small)
    assert float(jnp.float32(17).astype(jnp.float8_e4m3fn).astype(jnp.float32)) != 17
    bf16 = jnp.asarray(codes, jnp.float32).astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(bf16, codes)


@pytest.mark.parametrize(
    ("left", "right", "length"),
    [(127, 7, 18872), (128, 8, 16384), (127, 127, 1040), (7, 7, 342392)],
)
def test_longest_product_that_float32_accumulates_exactly(left, right, length):
    """W4A8, W4A8 with all codes, W8A8, W4A4: operands in bfloat16, sums below 2^24. DiT-XL's longest
    contraction is 4608."""
    assert left * right * length <= 2**24 < left * right * (length + 1)

    @jax.jit
    def dot(x, w):
        return jax.lax.dot(x, w, preferred_element_type=jnp.float32)

    for more in (0, 1):
        shape = length + more
        x = jnp.full((1, shape), left, jnp.bfloat16)
        w = jnp.full((shape, 1), right, jnp.bfloat16)
        exact = float(dot(x, w)[0, 0]) == left * right * shape
        # One more product leaves an odd sum beyond 2^24, where float32 holds even numbers alone.
        assert exact or more
        assert not (exact and more and (left * right * shape) % 2)
