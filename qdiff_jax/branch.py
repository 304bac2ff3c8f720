"""A low-rank branch beside a quantized product, with smoothing at run time: an operator for `sites.op`.

    y = x L1 L2 + Q(x / s) Q(R) + b,    R = s (W - L1 L2)

Source: SVDQuant (Li et al. 2024, arXiv:2411.05007), section 4. 1/s is folded into L1 and into the quantizer of
the activation, so that both products read x itself and no layer before needs to be changed. Inputs with a
known lower bound (GELU's) are shifted by it, Q(x / s + shift / s) on unsigned codes; the site's bias makes up
for that. A convolution's L1 is a convolution with r outputs, L2 a dense layer on them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from qdiff_jax.export.integer import integer_op
from qdiff_jax.operators import DENSE, Operator, plain
from qdiff_jax.sites import SiteQuant, kernel_of, operand


@struct.dataclass
class LowRank:
    """Arrays of the operator `low_rank`; None for a part that is not used.

    down: L1 / s, a kernel with r outputs: [K, r] or HWIO. up: L2 [r, N]. Both float16, as they are stored.
    smoothing: 1 / s [C] float32, C the input channels. shift: () float32, what is added to the input of the
    quantized product.
    """

    down: jax.Array | None = None
    up: jax.Array | None = None
    smoothing: jax.Array | None = None
    shift: jax.Array | None = None


def low_rank(
    arrays: LowRank,
    operator: Operator,
    lhs: jax.Array,
    kernel: Callable[[], jax.Array],
    bias: jax.Array | None,
    site: SiteQuant,
) -> jax.Array:
    """The `sites.Replacement` of a conv or dense site: site.rhs quantizes R, site.lhs the smoothed input.

    With site.execute the quantized product is one of integers; the branch is floating point either way.
    """
    x = smoothed(arrays, lhs)
    if site.execute:
        y = integer_op(operator, x, site.lhs, site.rhs, bias).astype(lhs.dtype)
    else:
        weight = kernel_of(site.rhs, kernel).astype(lhs.dtype)
        y = plain(operator, operand(site.lhs, x).astype(lhs.dtype), weight, bias)
    if arrays.down is None:
        return y
    narrow = plain(operator, lhs, arrays.down.astype(lhs.dtype), None)
    return y + plain(DENSE, narrow, arrays.up.astype(lhs.dtype), None)


def remainder(arrays: LowRank, kernel: jax.Array) -> jax.Array:
    """R = s (W - L1 L2) of a kernel W, float32 of its shape: what the quantized product stands for."""
    rest = kernel.astype(jnp.float32)
    if arrays.down is not None:
        down = arrays.down.astype(jnp.float32).reshape(-1, arrays.down.shape[-1])
        product = jnp.matmul(down, arrays.up.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        rest = rest - product.reshape(kernel.shape)
    if arrays.smoothing is None:
        return rest
    return rest / arrays.smoothing.reshape((1,) * (rest.ndim - 2) + (-1, 1))


def unshifted(arrays: LowRank, bias: jax.Array | None, rest: jax.Array) -> jax.Array | None:
    """The bias [N] that makes up for the shift of what `rest` [.., C, N] is multiplied with; without a shift
    the bias as it is, which may be None."""
    if arrays.shift is None:
        return bias
    each = rest.sum(axis=tuple(range(rest.ndim - 2)))
    if arrays.smoothing is not None:
        each = each * arrays.smoothing[:, None]
    made_up = -arrays.shift * each.sum(axis=0)
    return made_up if bias is None else bias + made_up


def smoothed(arrays: LowRank, x: jax.Array) -> jax.Array:
    """(x + shift) / s, what the activation quantizer reads; float32, or float64 where x and the arrays are."""
    if x.dtype != jnp.float64:
        x = x.astype(jnp.float32)
    if arrays.shift is not None:
        x = x + arrays.shift
    if arrays.smoothing is not None:
        x = x * arrays.smoothing.reshape((1,) * (x.ndim - 1) + (-1,))
    return x
