"""What one evaluation of a network costs: multiply-accumulates by site, and the bits they are done in.

BitOps, the unit in which quantized networks are compared, weigh a multiply-accumulate with the product of its
operands' widths: MACs x w_bits x a_bits, summed over sites; 32 stands for full precision. Norms, activation
functions and residual sums are not counted, as usual.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qdiff_jax.branch import LowRank
from qdiff_jax.export.qtensor import QTensor
from qdiff_jax.policy import SitePlan
from qdiff_jax.quant.binary import BinaryWeight
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.quant.rounding import SoftRounding
from qdiff_jax.quant.timed import TimeIndexed
from qdiff_jax.sites import Site, SiteQuant, flatten_sites

FULL_BITS = 32
BRANCH_BITS = 16


class Cost(NamedTuple):
    """Of one network evaluation on one sample. macs: multiply-accumulates of all sites; bitops: float,
    the mean over the rows of step tables where widths follow the step; by_site: site name -> (macs,
    left bits, right bits), mean bits."""

    macs: int
    bitops: float
    by_site: dict[str, tuple[int, float, float]]


def site_macs(site: Site) -> int:
    """Multiply-accumulates of one site for one sample, from the shapes of its operands.

    The leading axis of lhs_shape is the batch and is divided out. conv: output pixels x kh kw C_in C_out;
    dense: rows x K x N; qk, pv: every leading axis (heads) x n x m x c.
    """
    kind, lhs, rhs = site.operator.kind, site.lhs_shape, site.rhs_shape
    if kind == "conv":
        spatial = [
            (size + sum(pad) - kernel) // stride + 1
            for size, pad, kernel, stride in zip(
                lhs[1:3], site.operator.padding, rhs[:2], site.operator.strides, strict=True
            )
        ]
        return math.prod(spatial) * math.prod(rhs)
    if kind == "dense":
        return math.prod(lhs[1:-1]) * math.prod(rhs)
    # q [.., n, c] and k [.., m, c], or p [.., n, m] and v [.., m, c]: the last axis of the output is the
    # one of the right operand that is not contracted.
    return math.prod(lhs[1:]) * (rhs[-2] if kind == "qk" else rhs[-1])


def operand_bits(held: Any) -> np.ndarray:
    """The width of an operand: () float64, or [R] for a step table whose widths follow the step.

    held: what a `SiteQuant` holds for it; None is full precision. A weight whose binarization is being learned
    counts a bit for each basis that is there. Raises TypeError for something else.
    """
    if held is None:
        return np.float64(FULL_BITS)
    if isinstance(held, QTensor):
        return np.float64(held.bits)
    if isinstance(held, TimeIndexed):
        return _rows_of(held)
    if isinstance(held, BinaryWeight):
        bases = 1.0 + (0.0 if held.second is None else float(held.gate))
        return np.float64(bases if bool(held.on) else FULL_BITS)
    if isinstance(held, SoftRounding):
        held = held.qparams
    if isinstance(held, QParams):
        return _width(held).max()
    raise TypeError(f"a {type(held).__name__} is no operand whose bits are known.")


def _width(qparams: QParams) -> np.ndarray:
    levels = np.asarray(qparams.qmax, np.float64) - np.asarray(qparams.qmin, np.float64) + 1.0
    return np.ceil(np.log2(levels))


def _rows_of(held: TimeIndexed) -> np.ndarray:
    if isinstance(held.table, QTensor):
        return np.float64(held.table.bits)
    width = _width(held.table)
    if held.branched:
        width = width.max(axis=0)
    return width.reshape(len(width), -1).max(axis=1)


def network_cost(sites: Sequence[Site], quant: Mapping) -> Cost:
    """The cost of a model's sites with the quantizers of a quant tree (`load_bundle(...).quant`).

    A weight that the tree holds as codes counts with their bits; folded trees no longer know them, so pass
    the bundle's own. A site without an entry counts as full precision on both sides; an operator in place
    of a site's own (`SiteQuant.substitute`) counts as the site it replaces, and a low-rank branch beside it as
    16-bit products, which `by_site` leaves out.
    """
    held = flatten_sites(dict(quant))
    by_site: dict[str, tuple[int, float, float]] = {}
    bitops, branches = 0.0, 0
    for site in sites:
        entry = held.get(site.name, SiteQuant())
        left, right = operand_bits(entry.lhs), operand_bits(entry.rhs)
        macs = site_macs(site)
        bitops += macs * float(np.mean(left * right))
        by_site[site.name] = (macs, float(np.mean(left)), float(np.mean(right)))
        branches += branch_macs(site, entry)
    macs = sum(macs for macs, _, _ in by_site.values()) + branches
    return Cost(macs, bitops + branches * float(BRANCH_BITS**2), by_site)


def planned_cost(sites: Sequence[Site], plan: SitePlan) -> Cost:
    """The cost of a model's sites with the widths that a plan asks for, before anything is quantized."""
    bits = {(e.site, e.operand): FULL_BITS if e.bits is None else e.bits for e in plan.entries}
    by_site = {
        site.name: (site_macs(site), *(float(bits[site.name, o]) for o in site.operands))
        for site in sites
    }
    bitops = sum(macs * left * right for macs, left, right in by_site.values())
    return Cost(sum(macs for macs, _, _ in by_site.values()), bitops, by_site)


def branch_macs(site: Site, entry: SiteQuant) -> int:
    """Multiply-accumulates of the low-rank branch beside a site, for one sample; 0 without one."""
    arrays = getattr(entry.substitute, "arrays", None)
    if not isinstance(arrays, LowRank) or arrays.down is None:
        return 0
    rows = site_macs(site) // math.prod(site.rhs_shape)
    return rows * (math.prod(arrays.down.shape) + math.prod(arrays.up.shape))
