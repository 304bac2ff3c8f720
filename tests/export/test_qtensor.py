"""A packed weight is the simulated weight, to the last bit, in fewer bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_jax.export import qtensor
from qdiff_jax.quant import quantizer
from qdiff_jax.quant.qparams import QParams, dynamic_qparams, from_range
from qdiff_jax.quant.spec import QuantSpec, code_range

KERNEL = (3, 3, 4, 5)

SPECS = {
    "tensor-asym": QuantSpec(),
    "channel-asym": QuantSpec(granularity="channel"),
    "channel-sym": QuantSpec(granularity="channel", symmetric=True, signed=True),
    "signed-asym": QuantSpec(granularity="channel", signed=True),
    "group": QuantSpec(granularity="group", axis=-2, group=2),
    "log2": QuantSpec(grid="log2", zero_code=True),
}


def weight_and_qparams(spec, bits, shape=KERNEL, seed=0):
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if spec.grid != "affine":
        w = np.abs(w)
    if spec.granularity == "tensor":
        lo, hi = w.min(), w.max()
    elif spec.granularity == "channel":
        flat = w.reshape(-1, shape[-1])
        lo, hi = flat.min(0), flat.max(0)
    else:
        cut = w.reshape(-1, shape[-2] // spec.group, spec.group, shape[-1])
        lo, hi = cut.min((0, 2)), cut.max((0, 2))
    return jnp.asarray(w), from_range(spec, lo, hi, *code_range(spec, bits))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_dequantized_storage_is_the_fake_quantized_weight_bit_for_bit(spec, bits):
    w, qparams = weight_and_qparams(spec, bits)
    codes = quantizer.codes(qparams, w)
    packed = qtensor.from_codes(codes, qparams, bits)
    assert packed.shape == KERNEL
    assert np.array_equal(np.asarray(qtensor.codes(packed)), np.asarray(codes))
    expected = np.asarray(quantizer.fake_quant(qparams, w))
    assert np.array_equal(np.asarray(qtensor.dequantize(packed)), expected)
    assert np.array_equal(np.asarray(jax.jit(qtensor.dequantize)(packed)), expected)
    assert len(np.unique(expected)) > 2  # a degenerate grid would satisfy the above too


@settings(deadline=None, max_examples=25, derandomize=True)
@given(bits=st.integers(1, 8), k=st.integers(1, 9), n=st.integers(1, 4), signed=st.booleans())
def test_stored_bytes_are_counted_as_held(bits, k, n, signed):
    qparams = QParams(
        jnp.ones((n,)), jnp.zeros((n,)), jnp.float32(-1), jnp.float32(1),
        QuantSpec(granularity="channel", signed=signed),
    )  # fmt: skip
    packed = qtensor.from_codes(np.zeros((k, n), np.int32), qparams, bits)
    width = {1: 1, 2: 2, 3: 4, 4: 4}.get(bits, 8)
    assert packed.nbytes == -(-k * width // 8) * n + 2 * 4 * n
    assert packed.data.dtype == (np.int8 if width == 8 else np.uint8)


def test_unsigned_codes_are_stored_shifted_to_signed():
    _, qparams = weight_and_qparams(QuantSpec(), 8, (2, 1))
    packed = qtensor.from_codes(np.array([[0], [255]]), qparams, 8)
    assert np.asarray(packed.data).tolist() == [[-128], [127]]
    assert np.asarray(qtensor.signed_codes(packed)).dtype == np.int8


@pytest.mark.parametrize(("signed", "bad"), [(False, 16), (False, -1), (True, 8), (True, -9)])
def test_codes_outside_the_bits_are_an_error(signed, bad):
    _, qparams = weight_and_qparams(QuantSpec(signed=signed), 4, (2, 1))
    with pytest.raises(ValueError, match="outside"):
        qtensor.from_codes(np.array([[0], [bad]]), qparams, 4)


def test_what_cannot_be_stored_is_refused():
    _, qparams = weight_and_qparams(SPECS["channel-asym"], 4)
    with pytest.raises(TypeError, match="must be integers"):
        qtensor.from_codes(np.zeros(KERNEL, np.float32), qparams, 4)
    with pytest.raises(ValueError, match="does not fit"):
        qtensor.from_codes(np.zeros((2, 3), np.int32), qparams, 4)
    dynamic = dynamic_qparams(QuantSpec(dynamic=True), 0, 15)
    with pytest.raises(ValueError, match="static quantizer"):
        qtensor.from_codes(np.zeros((2, 3), np.int32), dynamic, 4)
    with pytest.raises(ValueError, match="static quantizer"):
        qtensor.from_codes(np.zeros((2, 3), np.int32), qparams.replace(rows=True), 4)
