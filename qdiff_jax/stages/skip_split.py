"""Splitting what reads a skip concatenation: a range of its own for each of the two maps.

In the up path of a U-Net a block reads a map h and a skip and works on [h, skip], whose parts have
spreads that differ by an order of magnitude. Their layers get one activation range and one scale per
output channel for each part, y = Q(h) Q(W_h) + Q(skip) Q(W_skip) + b.
Source: Q-Diffusion (Li et al. 2023), section 3.3, "shortcut-splitting quantization".

The split is a granularity of the quantizers, not another operator: rounding, learned steps, folding,
bundles and integer execution see two scales where there was one. Where the parts meet is read off
the block program, as the width of the first map that the block reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from absl import logging

from qdiff_jax.models.families import example_inputs
from qdiff_jax.models.program import Node, apply_unit, condition_nodes, make_unit
from qdiff_jax.policy import Entry, SitePlan
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.sites import flatten_sites
from qdiff_jax.stages.replan import replan
from qdiff_jax.stages.stage import Model, Stage

SPLITS = ("both", "shortcut", "none")


def skip_boundaries(
    program: Sequence[Node], params: Mapping, inputs: tuple, which: str = "both"
) -> dict[str, int]:
    """{site: width of the first part} of the layers that read two concatenated maps. From shapes alone.

    program, params: of the model. inputs: example (x, t, y), as the module takes them. which: "both"
    (every layer whose contraction axis is as long as both maps together: first convolution and
    shortcut of a residual block), "shortcut" (the 1x1 layers among them, which alone see the maps as
    they are: the official code's choice), or "none". Empty for a model without skips.

    Raises ValueError for another `which`.
    """
    if which not in SPLITS:
        raise ValueError(f"split {which!r} is unknown; use one of {SPLITS}.")
    found: dict[str, int] = {}
    if which == "none":
        return found
    conditions = {*condition_nodes(program), "t", "y"}
    shapes = dict(zip(("x", "t", "y"), inputs, strict=True))
    traced: dict = {}  # equal blocks on equal shapes are traced once
    for node in program:
        reads = tuple(shapes[name] for name in node.reads)
        key = (node.module, *(None if r is None else (r.shape, r.dtype) for r in reads))
        if key not in traced:
            traced[key] = _run(program, node, params, reads)
        output, sites = traced[key]
        shapes[node.name] = output
        maps = [shapes[name].shape for name in node.reads if name not in conditions]
        if len(maps) != 2 or any(len(shape) < 3 for shape in maps):
            continue
        for name, site in flatten_sites(sites).items():
            weight = site.rhs.shape
            if site.operator.kind not in ("conv", "dense") or weight[-2] != sum(
                s[-1] for s in maps
            ):
                continue
            if which == "shortcut" and any(size != 1 for size in weight[:-2]):
                continue
            found[f"{node.name}/{name}"] = maps[0][-1]
    return found


def _run(program, node, params, reads):
    """(shape of the node's value, its sites) when it reads values of these shapes."""
    unit = make_unit(node.name, program, (node.name,), keep=(node.name,))

    def forward(weights, *values):
        outputs, written = apply_unit(unit.signature, (weights,), ({},), values, mutable=["sites"])
        return outputs[0], written[0].get("sites", {})

    return jax.eval_shape(forward, params.get(node.name, {}), *reads)


def split_plan(plan: SitePlan, boundaries: Mapping[str, int]) -> SitePlan:
    """The plan with the inputs and weights of these sites split at their boundaries.

    Raises ValueError for an operand that is planned with another granularity than one range per
    activation tensor and one per output channel of a weight.
    """

    def changed(entry: Entry) -> Entry:
        if entry.site not in boundaries or entry.bits is None:
            return entry
        wanted, axis = ("channel", -2) if entry.operand == "weight" else ("tensor", -1)
        if entry.spec.granularity != wanted or entry.spec.dynamic:
            raise ValueError(
                f"{entry.site}:{entry.operand} is planned per {entry.spec.granularity}"
                f"{', dynamic' if entry.spec.dynamic else ''}, which has no split form; plan it per "
                f"{wanted} and static, or set split='none'."
            )
        spec: QuantSpec = dataclasses.replace(
            entry.spec, granularity="split", axis=axis, boundary=boundaries[entry.site]
        )
        return dataclasses.replace(entry, spec=spec, rule=f"{entry.rule}, split")

    return SitePlan(tuple(changed(entry) for entry in plan.entries))


def split_skips(model: Model, which: str = "both") -> Stage:
    """The stage that splits the plan; a model without skips is left as it is, and the log says so.

    which: see `skip_boundaries`. The report names the sites with their boundaries.
    """
    inputs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype),
        example_inputs(model.module.config),
    )
    boundaries = skip_boundaries(model.program, model.params, inputs, which)

    def change(plan: SitePlan) -> tuple[SitePlan, dict]:
        if not boundaries and which != "none":
            logging.info(
                "no block of this model reads two maps: there is no skip concatenation to split, and "
                "the method goes on without it."
            )
        return split_plan(plan, boundaries), {"split": dict(boundaries)}

    return replan("split_skips", change)
