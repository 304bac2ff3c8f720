"""The operands of an integer product: int8 codes, integer zero points and scales, cut into groups.

Activations are quantized here and convolutions laid out as matrix products (im2col); what is
multiplied and how the zero points are removed is `export.integer`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qdiff_jax.export.qtensor import QTensor, code_shift, signed_codes
from qdiff_jax.operators import Operator
from qdiff_jax.quant import quantizer
from qdiff_jax.quant.qparams import QParams, broadcast, freeze

ACTIVATION_BITS = 8
_INT32_MAX = 2**31 - 1


class Operand(NamedTuple):
    """One operand of an integer product.

    codes: int8, shifted to signed. zero: int32 zero point, shifted; None where it is 0 by the spec,
    so that its correction is not even compiled. scale: float32. zero and scale have 1 along every
    axis they do not vary over.
    """

    codes: jax.Array
    zero: jax.Array | None
    scale: jax.Array


def operands(
    operator: Operator,
    lhs: jax.Array,
    lhs_qparams: QParams,
    rhs_quantizer: QTensor | QParams,
    rhs: jax.Array | None,
) -> tuple[Operand, Operand]:
    """Both operands of `operator`, every array led by an axis over groups of the contracted axis.

    Arguments and errors as for `integer.integer_op`. Convolutions come out as dense products.
    codes: conv and dense [G, ..., K/G] and [G, K/G, N]; qk and pv [1, B, ...] as given. zero and
    scale are [G, ...] and, without the leading axis, broadcast against the output.
    """
    if operator.kind in ("qk", "pv"):
        return _pair_operands(operator, lhs, lhs_qparams, rhs, rhs_quantizer)
    if not isinstance(rhs_quantizer, QTensor) or rhs is not None:
        raise ValueError(
            f"integer {operator.kind} needs its weight as a QTensor, got "
            f"{type(rhs_quantizer).__name__}: pack it with export.qtensor.from_codes"
        )
    shape = rhs_quantizer.shape
    if len(shape) != (4 if operator.kind == "conv" else 2) or lhs.shape[-1] != shape[-2]:
        raise ValueError(
            f"integer {operator.kind}: a weight of shape {shape} does not fit an input {lhs.shape}"
        )
    x = _activation(lhs_qparams, lhs, f"the input of {operator.kind}")
    w, weight_groups = _weight(rhs_quantizer)
    return _grouped(operator, x, w, weight_groups, rhs_quantizer)


def split_operands(
    operator: Operator, lhs: jax.Array, lhs_qparams: QParams, weight: QTensor
) -> list[tuple[Operand, Operand]]:
    """The operands of a conv or dense product whose contraction axis is split: one pair per part.

    Arguments as for `operands`, at least one of the two quantizers with granularity "split"; both, if
    they are, at one boundary. Each pair is that of a product of its own (one group), so that the two
    parts are accumulated apart and no product is longer than its part.
    """
    # A product of two activations has ranges on both sides, and no weight.
    right = weight.qparams if isinstance(weight, QTensor) else weight
    boundaries = {q.spec.boundary for q in (lhs_qparams, right) if q.spec.granularity == "split"}
    if operator.kind not in ("conv", "dense") or len(boundaries) != 1:
        raise ValueError(
            f"integer {operator.kind}: operands split at {sorted(boundaries)} cannot be multiplied "
            "part by part; split input and weight of a conv or dense layer at one boundary"
        )
    if "group" in (lhs_qparams.spec.granularity, right.spec.granularity):
        raise ValueError(
            f"integer {operator.kind}: one operand is split in two and the other cut into groups, "
            "which is not executed; cut both alike, or simulate this site"
        )
    if lhs.shape[-1] != weight.shape[-2]:
        raise ValueError(
            f"integer {operator.kind}: a weight of shape {weight.shape} does not fit an input "
            f"{lhs.shape}"
        )
    boundary = boundaries.pop()
    x = _activation(lhs_qparams, lhs, f"the input of {operator.kind}")
    w, _ = _weight(weight)
    kernel = w.codes.reshape(weight.shape)
    pairs = []
    for part, (start, stop) in enumerate(((0, boundary), (boundary, lhs.shape[-1]))):

        def of_part(leaf, axis, part=part):  # what does not vary over the parts serves both
            if leaf is None or leaf.shape[axis] == 1:
                return leaf
            return lax.slice_in_dim(leaf, part, part + 1, axis=axis)

        left = Operand(x.codes[..., start:stop], of_part(x.zero, -1), of_part(x.scale, -1))
        codes = kernel[..., start:stop, :]
        right = Operand(codes.reshape(-1, codes.shape[-1]), of_part(w.zero, 0), of_part(w.scale, 0))
        sized = weight.replace(shape=codes.shape)  # only its shape and bits are read
        pairs.append(_first(_grouped(operator, left, right, 1, sized)))
    return pairs


def is_split(*quantizers) -> bool:
    """Whether one of the operands' quantizers (`QParams` or `QTensor`) has two parts."""
    specs = (getattr(q, "qparams", q) for q in quantizers)
    return any(isinstance(q, QParams) and q.spec.granularity == "split" for q in specs)


def _first(stacked):
    return jax.tree.map(lambda leaf: leaf[0], stacked)


def _grouped(operator, x, w, weight_groups, rhs_quantizer):
    """`operands` of a conv or dense product from the codes of both sides."""
    shape, rank = rhs_quantizer.shape, x.codes.ndim
    groups = max(weight_groups, x.scale.shape[-1])
    if {weight_groups, x.scale.shape[-1]} - {1, groups}:
        raise ValueError(
            f"integer {operator.kind}: the weight has {weight_groups} groups and the input "
            f"{x.scale.shape[-1]} along the contracted axis; cut both alike, or only one"
        )
    per_tap = operator.kind == "conv" and x.scale.shape[1:3] != (1, 1)
    # What has a scale for each pixel meets another one at each tap: every tap is accumulated apart.
    cut = shape[0] * shape[1] if per_tap else 1
    taps = _patches(operator, x, shape) if operator.kind == "conv" else x.codes[..., None, :]
    # [..., T, C] -> [cut * G, ..., T / cut * C/G], and the weight's rows in the same order.
    lead, count = taps.shape[:-2], taps.shape[-2] // cut
    taps = taps.reshape(*lead, cut, count, groups, -1)
    width = count * taps.shape[-1]
    taps = jnp.moveaxis(taps, (-4, -2), (0, 1)).reshape(cut * groups, *lead, width)
    rows = w.codes.reshape(cut, count, groups, shape[-2] // groups, shape[-1])
    rows = jnp.moveaxis(rows, 2, 1).reshape(cut * groups, width, shape[-1])
    _require_headroom(width, (1 << rhs_quantizer.bits) - 1, operator.kind)

    def per_group(leaf, padding):  # [..., G or 1] -> [cut * G, ..., 1]
        if leaf is None:
            return None
        if not per_tap:
            leaf = jnp.moveaxis(leaf, -1, 0)[..., None]
            return jnp.broadcast_to(leaf, (groups, *leaf.shape[1:]))
        spread = jnp.broadcast_to(leaf, (*x.codes.shape[:3], leaf.shape[-1]))
        leaf = jnp.moveaxis(_windows(operator, spread, shape, padding), (-2, -1), (0, 1))
        leaf = jnp.broadcast_to(leaf, (cut, groups, *leaf.shape[2:]))
        return leaf.reshape(cut * groups, *leaf.shape[2:], 1)

    def per_channel(leaf):  # [G or 1, N or 1] -> [cut * G, 1.., N or 1]
        if leaf is None:
            return None
        leaf = jnp.broadcast_to(leaf, (cut, groups, leaf.shape[1]))
        return leaf.reshape(cut * groups, *(1,) * (rank - 1), leaf.shape[-1])

    # Beyond the border lie zeros, under any scale.
    left = Operand(taps, per_group(x.zero, 0), per_group(x.scale, 1))
    return left, Operand(rows, per_channel(w.zero), per_channel(w.scale))


def _pair_operands(operator, lhs, lhs_qparams, rhs, rhs_qparams):
    names = ("q", "k") if operator.kind == "qk" else ("the softmax output", "v")
    if rhs is None or not isinstance(rhs_qparams, QParams):
        raise ValueError(f"integer {operator.kind} needs {names[1]} and its QParams")
    left = _activation(lhs_qparams, lhs, names[0])
    right = _activation(rhs_qparams, rhs, names[1], contracted=-1 if names[1] == "k" else -2)
    if left.scale.shape[-1] != 1 or (names[1] == "k" and right.scale.shape[-1] != 1):
        raise ValueError(f"integer {operator.kind} cannot cut its contraction into groups")
    _require_headroom(lhs.shape[-1], 255, operator.kind)
    if operator.kind == "qk":  # scales of k vary along its rows, which are columns of the output
        right = right._replace(
            zero=None if right.zero is None else jnp.swapaxes(right.zero, -1, -2),
            scale=jnp.swapaxes(right.scale, -1, -2),
        )
    return jax.tree.map(lambda leaf: leaf[None], (left, right))


def _activation(qparams, x, name, contracted=-1):
    """int8 codes of x; zero and scale of x's rank, the contracted axis counting groups."""
    if not isinstance(qparams, QParams):
        raise ValueError(
            f"integer execution needs static or dynamic QParams for {name}, got "
            f"{type(qparams).__name__}: calibrate the site and select the step's row first"
        )
    require_affine(qparams, name)
    x = x.astype(jnp.float32)
    qparams = freeze(qparams, x)
    spec, shift = qparams.spec, code_shift(qparams, ACTIVATION_BITS)
    codes = (quantizer.codes(qparams, x) - shift).astype(jnp.int8)
    leaves = [lift(leaf, x.ndim + (spec.group is not None)) for leaf in broadcast(qparams, x)]
    if spec.group is not None:
        if spec.axis != -1 or contracted != -1:
            raise ValueError(
                f"integer execution cannot honour groups along axis {spec.axis} of {name}"
            )
        leaves = [leaf.squeeze(-1) for leaf in leaves]
    elif spec.granularity == "split":
        if contracted != -1 or spec.axis != -1:
            raise ValueError(f"integer execution cannot honour the split of {name}")
        # Spread over the channels here; each part's product needs one.
        ends = slice(spec.boundary - 1, spec.boundary + 1)
        leaves = [leaf if leaf.shape[-1] == 1 else leaf[..., ends] for leaf in leaves]
    elif leaves[0].shape[contracted] != 1:
        raise ValueError(
            f"the scale of {name} varies along the contracted axis, which no integer product can "
            "honour: fold it into the other operand, or quantize per tensor or per token"
        )
    scale, zero, qmin, qmax = leaves
    # A NaN has no code and would come out as a number: it spoils the output of its sample instead.
    spoilt = jnp.isnan(x).any(axis=tuple(range(1, x.ndim)), keepdims=True)
    low, high = -128 + shift, 127 + shift
    valid = (qmin >= low) & (qmax <= high) & (zero >= qmin) & (zero <= qmax) & ~spoilt
    return Operand(codes, *_integers(zero, scale, valid, shift, spec))


def _weight(qtensor):
    """(operand with codes [K, N], zero and scale [G or 1, N or 1]; the number of groups).

    Of a binary weight the codes are its signs, -1 and +1, so that its accumulator is a sum of activations
    added and subtracted."""
    spec, shape = qtensor.qparams.spec, qtensor.shape
    if spec.grid == "binary" and spec.axis == -1:
        signs = 2 * signed_codes(qtensor) + jnp.int8(1)  # stored as -1 and 0
        return Operand(signs, None, lift(qtensor.qparams.scale, 2)), 1
    require_affine(qtensor.qparams, "the weight")
    fits = {
        "tensor": True,
        "channel": spec.axis == -1,
        "group": spec.axis == -2,
        "split": spec.axis == -2,
    }
    if not fits.get(spec.granularity, False):
        raise ValueError(
            "integer execution takes weights per tensor, per output channel (axis -1), per group of "
            f"input channels or split among them (axis -2), got {spec.granularity!r} on axis {spec.axis}"
        )
    shift = code_shift(qtensor.qparams, qtensor.bits)
    scale, zero = lift(qtensor.qparams.scale, 2), lift(qtensor.qparams.zero_point, 2)
    low = shift - (1 << (qtensor.bits - 1))
    valid = (zero >= low) & (zero < low + (1 << qtensor.bits))
    groups = 1 if spec.group is None else shape[-2] // spec.group
    return Operand(signed_codes(qtensor), *_integers(zero, scale, valid, shift, spec)), groups


def _integers(zero, scale, valid, shift, spec):
    """(zero as shifted int32 or None, scale), the scale NaN where the integers would be wrong."""
    valid &= zero == jnp.round(zero)
    centred = spec.symmetric and shift == 0
    if centred:
        valid &= zero == 0
    scale = jnp.where(valid, scale, jnp.nan)
    return None if centred else zero.astype(jnp.int32) - shift, scale


def _patches(operator, x, kernel):
    """im2col of int8 codes: [B, H', W', T, C], taps in the order of HWIO."""
    codes = x.codes
    if x.zero is None or x.scale.shape[1:3] != (1, 1):
        return _windows(operator, codes, kernel, 0)
    inside = np.pad(np.ones(codes.shape[1:3], bool), operator.padding)[None, :, :, None]
    zero = x.zero.astype(jnp.int8)
    zero = jnp.repeat(zero, codes.shape[-1] // zero.shape[-1], axis=-1)
    padded = jnp.where(inside, _padded(operator, codes, 0), zero)
    return _windows(dataclasses.replace(operator, padding=((0, 0), (0, 0))), padded, kernel, 0)


def _padded(operator, x, value):
    if not np.any(operator.padding):
        return x
    config = [(0, 0, 0), *((lo, hi, 0) for lo, hi in operator.padding), (0, 0, 0)]
    return lax.pad(x, jnp.asarray(value, x.dtype), config)


def _windows(operator, x, kernel, value):
    """What each tap of a kernel HWIO reads of x [B, H, W, C], `value` beyond the border: static slices
    [B, H', W', T, C]."""
    (height, width), (down, across) = kernel[:2], operator.strides
    padded = _padded(operator, x, value)
    rows = (padded.shape[1] - height) // down + 1
    columns = (padded.shape[2] - width) // across + 1
    if rows < 1 or columns < 1:
        raise ValueError(f"integer conv: a kernel {kernel} does not fit an input {x.shape}")
    return jnp.stack(
        [
            padded[
                :, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * across + 1 : across
            ]
            for i in range(height)
            for j in range(width)
        ],
        axis=-2,
    )


def lift(leaf: jax.Array, ndim: int) -> jax.Array:
    """leaf with leading axes of size 1, up to rank ndim."""
    return leaf.reshape((1,) * (ndim - leaf.ndim) + leaf.shape)


def require_affine(qparams: QParams, name: str) -> None:
    """Raise ValueError unless codes of the grid are proportional to values up to a zero point."""
    if qparams.spec.grid != "affine":
        raise ValueError(
            f"{name}: codes of the grid {qparams.spec.grid!r} are not proportional to values, so "
            "they cannot be multiplied as integers; simulate this site, or use an affine grid"
        )


def _require_headroom(length, largest, kind):
    # Centred activations reach 255 in magnitude, centred weights 2^bits - 1.
    if length * 255 * largest > _INT32_MAX:
        raise ValueError(
            f"integer {kind}: a contraction of {length} could overflow int32; quantize the weight "
            "in groups of input channels, which cut the accumulation, or simulate this site"
        )
