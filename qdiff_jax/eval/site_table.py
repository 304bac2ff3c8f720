"""What policies do with every site of an architecture, and what the model then weighs and costs.

From shapes alone, so that the real sizes of published models take seconds and no memory. Sizes are those of
quantization papers: kernels at their bits, everything else in float32, one evaluation of the network on one
sample. Scales and zero points, which papers leave out, stand apart.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from qdiff_jax.eval.cost import FULL_BITS, planned_cost, site_macs
from qdiff_jax.export.qtensor import cell_bytes
from qdiff_jax.models.families import example_inputs, make_module, parameter_shapes
from qdiff_jax.models.program import node_at
from qdiff_jax.policy import Entry, SitePlan
from qdiff_jax.quant.cells import scale_shape
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.sites import Site, list_sites


class Treatment(NamedTuple):
    """What a policy does with one site. bits, granularity, rule: of its two operands, as in
    `SiteRow.operands`; 32 bits and granularity "" are full precision."""

    bits: tuple[int, int]
    granularity: tuple[str, str]
    rule: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class SiteRow:
    """One site, or `times` equal ones. operands: the weight and the input, q and k, or the softmax and v.
    shape: of the weight, or of both operands. parameters: kernel and bias; macs: of one sample; both of all
    `times`. treated: by name of the policy."""

    site: str
    operator: str
    operands: tuple[str, str]
    shape: str
    parameters: int
    macs: int
    treated: Mapping[str, Treatment]
    times: int = 1


class Totals(NamedTuple):
    """parameters: of the model; quantized: those in kernels below 32 bits. size: bytes of parameters at
    their bits, without scales; scales: bytes of those and of zero points, of weights and activations.
    bitops: of all sites; layer_bitops: of convolutions and dense layers alone. unquantized: how many of those
    keep a full-precision operand."""

    parameters: int
    quantized: int
    size: float
    scales: int
    bitops: float
    layer_bitops: float
    unquantized: int


@functools.cache
def architecture_sites(config: Any) -> tuple[Site, ...]:
    """Every site of the network that a family's config describes, for one sample; no array is made."""
    return list_sites(make_module(config), *jax.eval_shape(lambda: example_inputs(config)))


def site_rows(config: Any, plans: Mapping[str, SitePlan]) -> tuple[SiteRow, ...]:
    """A row for every site, in order of execution, with what each of the plans does there."""
    shapes = parameter_shapes(config)
    entries = {name: {(e.site, e.operand): e for e in plan.entries} for name, plan in plans.items()}

    def row(site: Site) -> SiteRow:
        left, right = site.operands
        operands = (right, left) if site.has_weight else (left, right)
        treated = {
            name: _treatment([of[site.name, operand] for operand in operands])
            for name, of in entries.items()
        }
        shape = _shape(site.rhs_shape)
        if not site.has_weight:
            shape = f"{_shape(site.lhs_shape[1:])}, {_shape(site.rhs_shape[1:])}"
        return SiteRow(
            site.name,
            site.operator.kind,
            operands,
            shape,
            _held(shapes, site) if site.has_weight else 0,
            site_macs(site),
            treated,
        )

    return tuple(row(site) for site in architecture_sites(config))


def totals(config: Any, sites: Sequence[Site], plan: SitePlan) -> Totals:
    """What the model comes to under a plan of these sites (`architecture_sites(config)`)."""
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes(config)))
    cost = planned_cost(sites, plan)
    by_name = {site.name: site for site in sites}
    quantized, saved, scales = 0, 0.0, 0
    for entry in plan.quantized():
        shape = by_name[entry.site].rhs_shape
        scales += cell_bytes(entry.spec) * _cells(entry, shape)
        if entry.operand == "weight":
            quantized += math.prod(shape)
            saved += math.prod(shape) * (FULL_BITS - entry.bits) / 8
    layers = [cost.by_site[site.name] for site in sites if site.has_weight]
    return Totals(
        parameters,
        quantized,
        parameters * FULL_BITS / 8 - saved,
        scales,
        cost.bitops,
        sum(macs * left * right for macs, left, right in layers),
        sum(FULL_BITS in (left, right) for _, left, right in layers),
    )


def collapse(rows: Sequence[SiteRow]) -> tuple[SiteRow, ...]:
    """Rows of one shape and one treatment, in blocks that differ in numbers alone, as one row each.

    It stands where the first stood; numbers of the block's name become "*".
    """
    groups: dict[Any, list[SiteRow]] = {}
    for row in rows:
        block, _, op = row.site.rpartition("/")
        name = f"{re.sub(r'[0-9]+', '*', block)}/{op}"
        key = (name, row.shape, row.macs, row.parameters, tuple(row.treated.items()))
        groups.setdefault(key, []).append(row)
    return tuple(
        dataclasses.replace(
            members[0],
            site=key[0] if len(members) > 1 else members[0].site,
            parameters=sum(row.parameters for row in members),
            macs=sum(row.macs for row in members),
            times=sum(row.times for row in members),
        )
        for key, members in groups.items()
    )


def granularity(spec: QuantSpec | None) -> str:
    """A spec in a few words; a plain affine grid with zero points goes without saying."""
    if spec is None:
        return ""
    words = [spec.granularity if spec.group is None else f"{spec.granularity} of {spec.group}"]
    words += [spec.grid] if spec.grid != "affine" else []
    words += [word for word in ("symmetric", "signed", "dynamic") if getattr(spec, word)]
    return " ".join(words)


def _treatment(entries: Sequence[Entry]) -> Treatment:
    return Treatment(
        tuple(FULL_BITS if e.bits is None else e.bits for e in entries),
        tuple("" if e.bits is None else granularity(e.spec) for e in entries),
        tuple(e.rule for e in entries),
    )


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _held(shapes: Mapping, site: Site) -> int:
    """Parameters of a site's layer: kernel and bias."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(node_at(shapes, site.name)))


def _cells(entry: Entry, shape: Sequence[int]) -> int:
    """How many scales an operand stores: none where they are measured at run time."""
    if entry.spec.dynamic:
        return 0
    return math.prod(scale_shape(entry.spec, shape)) if entry.operand == "weight" else 1
