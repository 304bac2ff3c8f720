"""Linear operators: their static description and their full-precision form.

Shared by models, simulation and integer execution.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

KINDS = ("conv", "dense", "qk", "pv")


@dataclasses.dataclass(frozen=True)
class Operator:
    """What is multiplied with what; hashable, holds no array.

    kind: "conv" (NHWC x HWIO), "dense" ([..., K] x [K, N]), "qk" (y[..,n,m] = sum_c q[..,n,c] k[..,m,c])
    or "pv" (y[..,n,c] = sum_m p[..,n,m] v[..,m,c]); the leading axes are the batch and, if there are
    several, the heads. strides and padding (explicit pairs) are conv's.
    """

    kind: str
    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"Operator kind {self.kind!r} is unknown; use one of {list(KINDS)}.")


DENSE = Operator("dense")
QK = Operator("qk")
PV = Operator("pv")


def same_conv(size: int, stride: int = 1) -> Operator:
    """A square convolution padded symmetrically by size // 2, as torch's `padding=size // 2`."""
    pad = (size // 2, size // 2)
    return Operator("conv", (stride, stride), (pad, pad))


def plain(operator: Operator, lhs: jax.Array, rhs: jax.Array, bias: jax.Array | None) -> jax.Array:
    """The full-precision operator. conv: NHWC x HWIO; dense: [..., K] x [K, N]; qk, pv: batched."""
    if operator.kind == "conv":
        y = lax.conv_general_dilated(
            lhs,
            rhs,
            operator.strides,
            operator.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    elif operator.kind == "dense":
        # As one matrix: XLA's CPU backend contracts a weight gradient over several axes 5x slower.
        y = lax.dot(lhs.reshape(-1, lhs.shape[-1]), rhs).reshape(*lhs.shape[:-1], rhs.shape[-1])
    elif operator.kind == "qk":
        y = jnp.einsum("...nc,...mc->...nm", lhs, rhs)
    elif operator.kind == "pv":
        y = jnp.einsum("...nm,...mc->...nc", lhs, rhs)
    else:
        raise ValueError(f"Operator kind {operator.kind!r} is unknown; use one of {list(KINDS)}.")
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)
