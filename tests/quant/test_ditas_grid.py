"""The weight grid of DiTAS' code: why smoothing costs it nothing, what it costs instead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.export import qtensor
from qdiff_jax.export.integer import integer_op
from qdiff_jax.operators import DENSE
from qdiff_jax.quant.ditas_grid import ditas_qparams
from qdiff_jax.quant.qparams import dynamic_qparams, from_range
from qdiff_jax.quant.quantizer import codes, fake_quant
from qdiff_jax.quant.ranges import min_max
from qdiff_jax.quant.spec import QuantSpec

from ..tiny_unet import QUICK
from .dit_layer import layer, relative

quantized = jax.jit(fake_quant, compiler_options=QUICK)
numbered = jax.jit(codes, compiler_options=QUICK)


def weight_error(qparams) -> float:
    kernel = layer().kernel
    return relative(quantized(qparams, jnp.asarray(kernel, jnp.float32)), kernel)


def test_factors_of_input_channels_pass_through_the_grid():
    """With powers of two, which float32 multiplies exactly, to the last bit."""
    kernel = jnp.asarray(layer().kernel, jnp.float32)
    s = np.exp2(np.round(np.log2(layer().factors))).astype(np.float32)[:, None]
    scaled = quantized(ditas_qparams(kernel * s), kernel * s)
    np.testing.assert_array_equal(scaled, quantized(ditas_qparams(kernel), kernel) * s)
    channel = QuantSpec(granularity="channel")
    other = [
        quantized(from_range(channel, *min_max(w, channel), 0, 15), w) for w in (kernel * s, kernel)
    ]
    assert relative(other[0], other[1] * s) > 0.05  # which a range per output channel does not have


def test_any_factors_in_the_error():
    """Rounding of the factors themselves moves single codes."""
    kernel = jnp.asarray(layer().kernel, jnp.float32)
    s = layer().factors.astype(np.float32)[:, None]
    scaled = numbered(ditas_qparams(kernel * s), kernel * s)
    same = np.asarray(scaled) == np.asarray(numbered(ditas_qparams(kernel), kernel))
    assert np.mean(same) > 0.9999


def test_its_gain_is_one_of_small_cells():
    kernel = layer().kernel
    cell = weight_error(ditas_qparams(kernel))
    channel = QuantSpec(granularity="channel")
    group = QuantSpec(granularity="group", axis=-2, group=32)
    wide, fine = (weight_error(from_range(s, *min_max(kernel, s), 0, 15)) for s in (channel, group))
    found = (cell, wide, fine)
    np.testing.assert_allclose(found, (0.0905, 0.3579, 0.0947), atol=0.002)


def test_the_code_leaves_out_the_topmost_level():
    w = jnp.asarray(np.linspace(-1.0, 1.0, 32, dtype=np.float32)[None])
    faithful, fixed = (ditas_qparams(w, faithful=f) for f in (True, False))
    assert float(faithful.scale[0, 0]) == pytest.approx(2 / 16)
    assert float(fixed.scale[0, 0]) == pytest.approx(2 / 15)
    error = [np.abs(np.asarray(quantized(q, w) - w)) for q in (faithful, fixed)]
    assert error[0][0, -1] == pytest.approx(2 / 16, rel=1e-5)
    assert error[1].max() <= 2 / 15 * (1 + 1e-5)


def test_no_integer_product_takes_it():
    kernel = layer().kernel[:64, :64]
    held = ditas_qparams(kernel)
    kernel = jnp.asarray(kernel, jnp.float32)
    packed = qtensor.from_codes(numbered(held, kernel), held, 4)
    stored = jax.jit(qtensor.dequantize, compiler_options=QUICK)(packed)
    np.testing.assert_array_equal(stored, quantized(held, kernel))
    activation = dynamic_qparams(QuantSpec(dynamic=True), 0, 255)
    with pytest.raises(ValueError, match="'cell'"):
        jax.eval_shape(lambda x: integer_op(DENSE, x, activation, packed), np.ones((2, 64)))
    with pytest.raises(ValueError, match="do not divide"):
        ditas_qparams(np.ones((4, 33)))
