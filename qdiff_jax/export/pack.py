"""Packing of signed integer codes into bytes, along the leading (contraction) axis.

A code of `bits` bits is held in a field of the next power-of-two width: 1, 2, 4 or 8 bits. Fields
narrower than a byte share one `uint8`: the code of the lowest index takes the lowest bits, so that
4-bit codes at an even index are the low nibble. The contraction axis is the one packed because an
integer product reads it contiguously per output channel, and because output channels then stay
addressable without unpacking. Storage is `uint8`, not `jnp.int4`: neither NumPy files nor
safetensors can hold a 4-bit dtype.

Every function takes NumPy or JAX arrays and answers in kind.
"""

import jax
import jax.numpy as jnp
import numpy as np


def field_width(bits: int) -> int:
    """Bits of storage one code takes: 1, 2, 4 or 8. Raises ValueError unless 1 <= bits <= 8."""
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(
            f"packed storage holds codes of 1 to 8 bits, got bits={bits!r}: "
            "keep wider tensors in floating point"
        )
    return next(width for width in (1, 2, 4, 8) if bits <= width)


def packed_size(size: int, bits: int) -> int:
    """Length of the packed axis for `size` codes: ceil(size / codes per byte)."""
    per_byte = 8 // field_width(bits)
    return -(-size // per_byte)


def check_range(codes: jax.Array | np.ndarray, low: int, high: int, what: str) -> None:
    """Raise ValueError if any of the concrete integers `codes` lies outside low..high."""
    if codes.size == 0:
        return
    smallest, largest = int(codes.min()), int(codes.max())
    if smallest < low or largest > high:
        raise ValueError(
            f"{what} lie in {smallest}..{largest}, outside {low}..{high}: "
            "store them with more bits, or clip them when quantizing"
        )


def pack(codes: jax.Array | np.ndarray, bits: int) -> jax.Array | np.ndarray:
    """Pack signed codes along axis 0.

    Args:
      codes: integers [K, ...] in -2^(bits-1)..2^(bits-1)-1.
      bits: 1 to 8.

    Returns:
      int8 [K, ...] for 5 to 8 bits; otherwise uint8 [ceil(K / codes per byte), ...], the unused
      fields of the last row zero.

    Raises ValueError for codes outside the range (when they are concrete: inside `jit` the values
    cannot be seen, and high bits would be dropped) and TypeError for codes that are not integers.
    """
    width = field_width(bits)
    if not np.issubdtype(codes.dtype, np.integer):
        raise TypeError(f"codes to pack must be integers, got {codes.dtype}")
    if codes.ndim == 0:
        raise ValueError("codes to pack need a leading axis, got a scalar")
    if not isinstance(codes, jax.core.Tracer):
        half = 1 << (bits - 1)
        check_range(codes, -half, half - 1, f"codes to pack in {bits} bits")
    if width == 8:
        return codes.astype(np.int8)
    xp = np if isinstance(codes, np.ndarray) else jnp
    per_byte = 8 // width
    rows = packed_size(codes.shape[0], bits)
    # Masked before the cast: the two's complement of a negative code is then a small non-negative.
    fields = (codes & ((1 << width) - 1)).astype(np.uint8)
    fields = xp.pad(
        fields, [(0, rows * per_byte - codes.shape[0])] + [(0, 0)] * (codes.ndim - 1)
    ).reshape(rows, per_byte, *codes.shape[1:])
    packed = fields[:, 0]
    for i in range(1, per_byte):
        packed = packed | (fields[:, i] << (width * i))
    return packed


def unpack(data: jax.Array | np.ndarray, bits: int, size: int) -> jax.Array | np.ndarray:
    """Inverse of `pack`: int8 [size, ...] from the packed rows.

    Raises ValueError if the dtype or the number of rows is not what `pack` gives for `size` codes
    of `bits` bits.
    """
    width = field_width(bits)
    dtype, rows = (np.int8 if width == 8 else np.uint8), packed_size(size, bits)
    if data.dtype != dtype or data.ndim == 0 or data.shape[0] != rows:
        raise ValueError(
            f"{size} codes of {bits} bits pack into {np.dtype(dtype).name} [{rows}, ...], "
            f"got {data.dtype} {list(data.shape)}"
        )
    if width == 8:
        return data
    xp = np if isinstance(data, np.ndarray) else jnp
    # Each field moves to the top of the byte, then an arithmetic shift brings its sign down.
    fields = [
        (data << (8 - width * (i + 1))).view(np.int8) >> (8 - width) for i in range(8 // width)
    ]
    codes = xp.stack(fields, axis=1).reshape(rows * len(fields), *data.shape[1:])
    return codes[:size]
