"""The numeric half of a quantizer: how it follows from a range and how it meets a tensor."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qdiff_jax.quant.affine import reciprocal
from qdiff_jax.quant.spec import FLOATS, QuantSpec

SCALE_FLOOR = 1e-8  # an all-zero tensor would otherwise divide by zero


@struct.dataclass
class QParams:
    """Numbers of one quantizer; all leaves float32.

    Attributes:
      scale: tensor (); channel [C]; group along an axis other than the last [K/g, N] with N the
        last axis; group along the last axis [K/g]; split [2], of a weight [2, N]; dynamic: () gain
        on the measured range. Log grids: the largest value.
      zero_point: integers, shaped like scale.
      qmin, qmax: smallest and largest code, () or shaped like scale. Data, so that bits are data.
      spec: static.
      rows: static. True: the leading axis of every leaf is the batch axis of x (rows of a step
        table that were gathered for a batch of mixed timesteps).
    """

    scale: jax.Array
    zero_point: jax.Array
    qmin: jax.Array
    qmax: jax.Array
    spec: QuantSpec = struct.field(pytree_node=False)
    rows: bool = struct.field(pytree_node=False, default=False)


# Jitted so that calibrating layer after layer compiles once per shape, not once per operation.
@functools.partial(jax.jit, static_argnames="spec")
def scale_and_zero_point(spec: QuantSpec, lo, hi, qmin, qmax) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point for the range [lo, hi]; all arguments broadcast against each other.

    The range is first widened to contain 0, so that 0 has a code of its own. Uniform affine maps of
    the quantized U-Net literature: symmetric signed scale = max|x| / qmax, zero point 0; symmetric
    unsigned scale = hi / qmax, zero point 0; otherwise scale = (hi - lo) / (qmax - qmin), zero
    point = qmin - round(lo / scale), which always lies among the codes. Log grids: scale = hi.
    Floating-point grids: scale = max|x| / the grid's largest value, and in the place of a zero point the
    number of exponent bits. A range that is not finite gives a scale that is not finite, so that
    everything downstream becomes NaN.
    """
    if spec.grid in ("shifted", "affine_or_log2", "fp4", "binary"):
        raise ValueError(
            f"the numbers of the grid {spec.grid!r} do not follow from a range; build its QParams "
            "with quant.time_mlp, quant.softmax_grid, quant.floating or quant.binary."
        )
    lo, hi = jnp.minimum(lo, 0.0), jnp.maximum(hi, 0.0)
    if spec.grid in FLOATS:
        exponent_bits, largest = FLOATS[spec.grid]
        scale = _symmetric_scale(spec, jnp.maximum(-lo, hi), jnp.float32(largest))
        return scale, jnp.full_like(scale, exponent_bits)
    if spec.grid != "affine":
        scale = jnp.maximum(hi, SCALE_FLOOR)
        return scale, jnp.zeros_like(scale)
    if spec.symmetric:
        scale = _symmetric_scale(spec, jnp.maximum(-lo, hi) if spec.signed else hi, qmax)
        return scale, jnp.zeros_like(scale)
    scale = jnp.maximum((hi - lo) * reciprocal(qmax - qmin), SCALE_FLOOR)
    # qmin outside the rounding: a fused multiply-add inside it would decide ties by the compiler.
    return scale, jnp.clip(qmin - jnp.round(lo * reciprocal(scale)), qmin, qmax)


def _symmetric_scale(spec, top, largest):
    """The scale at which `top` takes the grid's largest value, as `spec.scale_format` stores it."""
    if spec.scale_format == "e8m0":
        exponent = jnp.frexp(top)[1] - jnp.frexp(largest)[1]
        # Powers that float8_e8m0fnu and a normal float32 both hold, and their reciprocals too.
        power = jnp.ldexp(jnp.ones_like(top), jnp.clip(exponent, -126, 126))
        return jnp.where(jnp.isfinite(top), power, top)
    scale = jnp.maximum(top * reciprocal(largest), SCALE_FLOOR)
    if spec.scale_format == "f16":
        return jnp.where(jnp.isfinite(scale), float16_scale(scale), scale)
    if spec.scale_format == "e4m3":
        # Beyond 448 the type has no value, and below 2^-9 none but 0.
        held = jnp.clip(scale, 2.0**-9, 448.0).astype(jnp.float8_e4m3fn).astype(jnp.float32)
        return jnp.where(jnp.isfinite(scale), held, scale)
    return scale


def float16_scale(scale: jax.Array) -> jax.Array:
    """The nearest scale of the format "f16", 2^-24 to 65504, in float32; of any shape, finite."""
    scale = jnp.clip(scale, 2.0**-24, 65504.0)
    # Below 2^-14 float16 is a grid of 2^-24; written out, as not every device has its subnormal numbers.
    small = jnp.round(scale * 2.0**24) * 2.0**-24
    # Not by a cast there and back, which compilers may leave out as excess precision.
    normal = jax.lax.reduce_precision(scale, exponent_bits=5, mantissa_bits=10)
    return jnp.where(scale < 2.0**-14, small, normal)


def from_range(spec: QuantSpec, lo, hi, qmin, qmax) -> QParams:
    """QParams whose codes qmin..qmax cover [lo, hi].

    Args:
      spec: a static (not dynamic) spec.
      lo, hi: arrays of the shape that `QParams.scale` has for this granularity.
      qmin, qmax: numbers, or arrays that are scalar or shaped like lo.

    Raises:
      ValueError: spec is dynamic; build those with `dynamic_qparams`.
    """
    if spec.dynamic:
        raise ValueError(
            "from_range got a dynamic QuantSpec, whose range is measured at run time; "
            "build it with dynamic_qparams(spec, qmin, qmax)."
        )
    lo, hi, qmin, qmax = (jnp.asarray(v, jnp.float32) for v in (lo, hi, qmin, qmax))
    scale, zero_point = scale_and_zero_point(spec, lo, hi, qmin, qmax)
    return QParams(scale=scale, zero_point=zero_point, qmin=qmin, qmax=qmax, spec=spec)


def from_tensor(spec: QuantSpec, x: jax.Array, qmin, qmax) -> QParams:
    """QParams of the min-max range of x itself, traceable; any static granularity but "split".

    Args:
      spec: static; per tensor, channel or group.
      x: any shape that the spec fits.
      qmin, qmax: numbers or scalars.
    """
    view = grouped(spec, x)
    kept = _kept_axes(spec, x.shape)
    axes = tuple(axis for axis in range(view.ndim) if axis not in kept)
    return from_range(spec, view.min(axis=axes), view.max(axis=axes), qmin, qmax)


def refuse_stored_format(spec: QuantSpec, done: str) -> None:
    """Raise ValueError for a scale of a stored format (f16, e4m3, e8m0) that is `done`: it would leave it."""
    if spec.scale_format is not None:
        raise ValueError(
            f"a scale of the format {spec.scale_format!r} cannot be {done}: the result has no such format any "
            "more; plan this operand with float32 scales (scale_format=None)."
        )


def dynamic_qparams(spec: QuantSpec, qmin, qmax, gain=1.0) -> QParams:
    """QParams of a dynamic quantizer: the codes, and a gain () on the range to be measured."""
    if not spec.dynamic:
        raise ValueError("dynamic_qparams got a static QuantSpec; build it with from_range.")
    if spec.scale_format is not None and np.any(np.asarray(gain) != 1.0):
        refuse_stored_format(spec, "multiplied by a gain")
    gain, qmin, qmax = (jnp.asarray(v, jnp.float32) for v in (gain, qmin, qmax))
    return QParams(scale=gain, zero_point=jnp.zeros_like(gain), qmin=qmin, qmax=qmax, spec=spec)


def grouped(spec: QuantSpec, x: jax.Array) -> jax.Array:
    """x with the grouped axis cut in two, [.., K/g, g, ..]; x itself without groups."""
    if spec.group is None:
        return x
    axis = x.ndim + spec.axis
    if axis < 0 or x.shape[axis] % spec.group:
        raise ValueError(
            f"groups of {spec.group} do not divide axis {spec.axis} of a tensor of shape "
            f"{x.shape}; choose a group that divides it."
        )
    return x.reshape(*x.shape[:axis], -1, spec.group, *x.shape[axis + 1 :])


def freeze(qparams: QParams, x: jax.Array) -> QParams:
    """Write the range of x into a dynamic quantizer; a static one is returned as it is.

    Result leaves broadcast against `grouped(spec, x)` and the granularity becomes "cell", so that
    `dequantize(freeze(q, x), codes(q, x))` equals `fake_quant(q, x)`. The measured range takes no
    gradient; the gain does.
    """
    spec = qparams.spec
    if not spec.dynamic:
        return qparams
    view = grouped(spec, jax.lax.stop_gradient(x)).astype(jnp.float32)
    if spec.granularity == "tensor":
        axes = tuple(range(view.ndim))
    elif spec.granularity == "channel":
        axes = tuple(a for a in range(view.ndim) if a != view.ndim + spec.axis)
    elif spec.granularity == "token":
        axes = (view.ndim - 1,)
    else:
        axes = (x.ndim + spec.axis + 1,)
    gain = _per_row(qparams.scale, qparams.rows, view.ndim, x.shape)
    qmin = _per_row(qparams.qmin, qparams.rows, view.ndim, x.shape)
    qmax = _per_row(qparams.qmax, qparams.rows, view.ndim, x.shape)
    lo = view.min(axis=axes, keepdims=True)
    hi = view.max(axis=axes, keepdims=True)
    scale, zero_point = scale_and_zero_point(spec, lo, hi, qmin, qmax)
    # A gain on the range is a gain on the scale; on lo and hi it could fuse differently each time.
    scale = gain * scale
    frozen = dataclasses.replace(spec, granularity="cell", dynamic=False)
    return QParams(scale=scale, zero_point=zero_point, qmin=qmin, qmax=qmax, spec=frozen)


def broadcast(qparams: QParams, x: jax.Array) -> tuple[jax.Array, ...]:
    """(scale, zero_point, qmin, qmax), each () or of the rank of `grouped(spec, x)`.

    Raises:
      ValueError: qparams is dynamic (call `freeze` first), or its shapes do not fit x.
    """
    if qparams.spec.dynamic:
        raise ValueError(
            "a dynamic quantizer has no scale of its own; call freeze(qparams, x) first."
        )
    leaves = (qparams.scale, qparams.zero_point, qparams.qmin, qparams.qmax)
    return tuple(_fit(leaf, qparams.spec, qparams.rows, x.shape) for leaf in leaves)


def _per_row(leaf, rows, ndim, shape):
    if leaf.ndim == 0:
        return leaf
    if not rows or leaf.ndim != 1 or leaf.shape[0] != shape[0]:
        raise ValueError(
            f"QParams leaf of shape {leaf.shape} (rows={rows}) does not fit a tensor of shape "
            f"{shape}; select the row of a step table before quantizing."
        )
    return leaf.reshape(leaf.shape + (1,) * (ndim - 1))


def _fit(leaf, spec, rows, shape):
    ndim = len(shape) + (spec.group is not None)
    if spec.granularity == "cell":
        if leaf.ndim not in (0, ndim):
            raise ValueError(f"measured QParams leaf {leaf.shape} does not fit a tensor {shape}.")
        return leaf
    if leaf.ndim <= int(rows):
        return _per_row(leaf, rows, ndim, shape)
    if spec.granularity == "split":
        return _spread(leaf, spec, rows, shape)
    kept = _kept_axes(spec, shape)
    target = [1] * ndim
    for axis, size in kept.items():
        target[axis] = size
    expected = tuple(kept.values())
    if rows:
        target[0] = shape[0]
        expected = (shape[0], *expected)
    if leaf.shape != expected:
        raise ValueError(
            f"QParams leaf of shape {leaf.shape} does not fit a tensor of shape {shape} with "
            f"granularity {spec.granularity!r} on axis {spec.axis} (rows={rows}): expected "
            f"{expected}. A leading step axis must be selected before quantizing."
        )
    return leaf.reshape(target)


def split_sizes(spec: QuantSpec, size: int) -> tuple[int, int]:
    """Lengths of the two parts of an axis of `size`. Raises ValueError if the second is empty."""
    if not 0 < spec.boundary < size:
        raise ValueError(
            f"a split at {spec.boundary} does not fit an axis of {size}: both parts must hold "
            "something; take the boundary from the values that are concatenated."
        )
    return spec.boundary, size - spec.boundary


def _spread(leaf, spec, rows, shape):
    """A leaf of two parts along the split axis, repeated over each part: it broadcasts against x."""
    axis = len(shape) + spec.axis
    target = [1] * len(shape)
    target[axis] = 2
    expected = (2,) if spec.axis == -1 else (2, shape[-1])
    if spec.axis != -1:
        target[-1] = shape[-1]
    if rows:
        target[0] = shape[0]
        expected = (shape[0], *expected)
    if leaf.shape != expected:
        raise ValueError(
            f"QParams leaf of shape {leaf.shape} does not fit a tensor of shape {shape} split on axis "
            f"{spec.axis} (rows={rows}): expected {expected}. A leading step axis must be selected "
            "before quantizing."
        )
    parts = jnp.split(leaf.reshape(target), 2, axis=axis)
    sizes = split_sizes(spec, shape[axis])
    return jnp.concatenate(
        [jnp.repeat(part, size, axis=axis) for part, size in zip(parts, sizes, strict=True)], axis
    )


def _kept_axes(spec, shape) -> dict[int, int]:
    """Axes of the (grouped) view along which a static scale varies, with their sizes."""
    axis = len(shape) + spec.axis
    if spec.granularity == "tensor":
        return {}
    if spec.granularity == "channel":
        return {axis: shape[axis]}
    if shape[axis] % spec.group:
        raise ValueError(
            f"groups of {spec.group} do not divide axis {spec.axis} of a tensor of shape {shape}."
        )
    kept = {axis: shape[axis] // spec.group}
    if spec.axis != -1:
        kept[len(shape)] = shape[-1]  # the last axis of the view, which has one axis more
    return kept
