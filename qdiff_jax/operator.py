"""The static description of a linear operator, shared by models, simulation and integer execution."""

from __future__ import annotations

import dataclasses

KINDS = ("conv", "dense", "qk", "pv")


@dataclasses.dataclass(frozen=True)
class Operator:
    """What is multiplied with what; hashable, holds no array.

    kind: "conv" (NHWC x HWIO), "dense" ([..., K] x [K, N]), "qk" (y[b,n,m] = sum_c q[b,n,c] k[b,m,c])
    or "pv" (y[b,n,c] = sum_m p[b,n,m] v[b,m,c]). strides and padding (explicit pairs) are conv's.
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
