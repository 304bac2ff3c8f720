"""`QTensor`: the decided integer codes of one weight, packed, and the grid that values them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qdiff_jax.export.pack import check_range, field_width, pack, packed_size, unpack
from qdiff_jax.quant.qparams import QParams, broadcast
from qdiff_jax.quant.quantizer import dequantize as dequantize_codes
from qdiff_jax.quant.spec import QuantSpec, implied_zero_point


@struct.dataclass
class QTensor:
    """A quantized weight as it is stored.

    Attributes:
      data: uint8 (1 to 4 bits) or int8 (5 to 8 bits), [ceil(K / codes per byte), N]. The codes are
        those of the weight flattened K-major to [K, N], N its last axis, and shifted to signed:
        unsigned codes q are held as q - 2^(bits-1), so that one signed product serves both.
      qparams: static `QParams` of the unshifted codes.
      shape: static; the shape of the weight (HWIO, or [in, out]).
      bits: static; 1 to 8.
    """

    data: jax.Array
    qparams: QParams
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    bits: int = struct.field(pytree_node=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, scales and zero points as bundles store them (padding included)."""
        return self.data.nbytes + self.qparams.scale.size * cell_bytes(self.qparams.spec)


def cell_bytes(spec: QuantSpec) -> int:
    """Bytes that bundles hold for one scale and its zero point, which takes none where the spec implies it."""
    return (2 if spec.scale_format == "f16" else 4) + 4 * (implied_zero_point(spec) is None)


def code_shift(qparams: QParams, bits: int) -> int:
    """What is subtracted from a code to make it signed: 2^(bits-1) for unsigned codes, else 0."""
    return 0 if qparams.spec.signed else 1 << (bits - 1)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(K, N) of a weight: every axis but the last is contracted."""
    if not shape:
        raise ValueError("a QTensor needs at least one axis, got a scalar")
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (shape[0], 1)


def from_codes(codes: jax.Array | np.ndarray, qparams: QParams, bits: int) -> QTensor:
    """Pack the codes of one weight.

    Args:
      codes: integers of the weight's shape, 0..2^bits-1, or -2^(bits-1)..2^(bits-1)-1 if the spec
        is signed.
      qparams: static; its shapes fit the weight.
      bits: 1 to 8. Independent of qmin and qmax: 5 levels, say, take 3 bits.

    Raises:
      ValueError: codes outside the range of the bits (when concrete), a dynamic or per-row
        quantizer, or shapes that do not fit. TypeError: codes that are not integers.
    """
    if qparams.spec.dynamic or qparams.rows:
        raise ValueError(
            "packed codes need one static quantizer, got a dynamic one or rows of a step table: "
            "a stored weight cannot depend on the input; fold what varies into the activation"
        )
    if not np.issubdtype(codes.dtype, np.integer):
        raise TypeError(f"codes must be integers, got {codes.dtype}: pass quantizer.codes(...)")
    broadcast(qparams, codes)  # raises unless the scales fit the weight
    shift = code_shift(qparams, bits)
    if not isinstance(codes, jax.core.Tracer):
        low = -(1 << (bits - 1)) + shift
        sign = "signed" if shift == 0 else "unsigned"
        check_range(codes, low, low + (1 << bits) - 1, f"{sign} codes of {bits} bits")
    matrix = codes.astype(np.int32).reshape(matrix_shape(codes.shape)) - shift
    return QTensor(jnp.asarray(pack(matrix, bits)), qparams, tuple(codes.shape), bits)


def check_storage(qtensor: QTensor) -> QTensor:
    """qtensor itself; raises ValueError unless its data are laid out as its shape and bits say.

    A step table of packed weights has leading axes, which are allowed.
    """
    size, columns = matrix_shape(qtensor.shape)
    rows = packed_size(size, qtensor.bits)
    dtype = np.int8 if field_width(qtensor.bits) == 8 else np.uint8
    if qtensor.data.dtype != dtype or qtensor.data.shape[-2:] != (rows, columns):
        raise ValueError(
            f"a weight of shape {qtensor.shape} in {qtensor.bits} bits is stored as "
            f"{np.dtype(dtype).name} [{rows}, {columns}], got {qtensor.data.dtype} "
            f"{list(qtensor.data.shape)}"
        )
    return qtensor


def signed_codes(qtensor: QTensor) -> jax.Array:
    """The codes as an integer product reads them: int8 [K, N], shifted by `code_shift`."""
    return unpack(qtensor.data, qtensor.bits, matrix_shape(qtensor.shape)[0])


def codes(qtensor: QTensor) -> jax.Array:
    """The codes as the quantizer gave them: int32, of the weight's shape."""
    shift = code_shift(qtensor.qparams, qtensor.bits)
    return (signed_codes(qtensor).astype(jnp.int32) + shift).reshape(qtensor.shape)


def dequantize(qtensor: QTensor) -> jax.Array:
    """The weight in float32: bit for bit what the quantizer's `dequantize` gives for the codes."""
    return dequantize_codes(qtensor.qparams, codes(qtensor))
