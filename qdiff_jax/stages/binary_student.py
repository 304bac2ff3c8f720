"""A network while its weights become binary: what is trained, what is fixed, how a step sees it.

The numbers are kept beside the network, by site; `student` makes of them parameters and a `quant` tree whose
weights are in their fake form. `decide_student` makes of them the state that an export takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qdiff_jax.quant.binary import BinaryWeight, second_basis
from qdiff_jax.quant.lsq import gradient_factor, learned, positive
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.sites import SiteQuant, flatten_sites, list_sites, nest_sites, side_of
from qdiff_jax.stages.block_groups import depth_groups, head_and_tail, value_shapes
from qdiff_jax.stages.quantize_phases import PRODUCTS, Phase, progressive, quantized_from, starts
from qdiff_jax.stages.stage import (
    Model,
    QuantState,
    kernel_at,
    leaves_by_path,
    replace_leaves,
    tuned_params,
)
from qdiff_jax.stages.train_time_scales import decide_trained


def split_student(
    model: Model,
    state: QuantState,
    two_bases: float,
    interval: int,
    phases: tuple[Phase, ...] | None,
    example: Mapping[str, Any],
) -> tuple[dict, dict]:
    """(trainable, frozen) of a state whose weights and activations have ranges. frozen: what `student` reads
    beside the trainables; its "params" are the model's own arrays, which are the teacher's too.

    trainable: "kernels" and "others" by path (a `rotation` is frozen), "steps" (sigma_I, or an LSQ step) and
    "second" (sigma_II) by site, "activations" (steps) by "site:operand". two_bases, interval: see
    `train_binary.BinaryTrainConfig`. phases: in place of `progressive`. example: {"x", "t", "y"}, of which
    only shapes matter. Raises ValueError for a weight without a range or an activation with a step table.
    """
    params = tuned_params(model.params, state.aux)
    shapes = value_shapes(model.program, params, example)
    two = set(head_and_tail(model.program, shapes, two_bases))
    if phases is None:
        phases = progressive(depth_groups(model.program, shapes), interval)
    begins = starts(phases, state.plan)
    flat, leaves = flatten_sites(state.quant), leaves_by_path(params)
    grids, second, factors = {}, {}, {}
    for entry in state.plan.quantized("weight"):
        grid = getattr(flat.get(entry.site), "rhs", None)
        if not isinstance(grid, QParams):
            raise ValueError(
                f"{entry.site} has no range to train from; run calibrate_weights first."
            )
        kernel = kernel_at(params, entry.site)
        grids[entry.site] = grid
        if grid.spec.grid != "binary":
            factors[f"{entry.site}:weight"] = gradient_factor(kernel.size, grid.qmax)
        elif entry.site.split("/")[0] in two:
            second[entry.site] = second_basis(kernel, grid)
    activations = _activations(state)
    sizes = _operand_sizes(model, example)
    for name, grid in activations.items():
        factors[name] = gradient_factor(sizes[name], grid.qmax)
    kernels = {f"{name}/kernel" for name in grids}
    # A rotation has no gradient, and decay alone would make it none.
    rotations = {path: leaf for path, leaf in leaves.items() if path.endswith("/rotation")}
    resting = {*kernels, *rotations}
    trainable = {
        "kernels": {path: leaf for path, leaf in leaves.items() if path in kernels},
        "others": {path: leaf for path, leaf in leaves.items() if path not in resting},
        "steps": {name: grid.scale for name, grid in grids.items()},
        "second": second,
        "activations": {name: grid.scale for name, grid in activations.items()},
    }
    frozen = {
        "params": model.params,
        "rotations": rotations,
        "grids": grids,
        "activations": activations,
        "factors": factors,
        "starts": {name: np.int32(step) for name, step in begins.items() if step > 0},
    }
    return trainable, frozen


def _activations(state: QuantState) -> dict[str, QParams]:
    flat, made = flatten_sites(state.quant), {}
    for entry in state.plan.quantized("input", *PRODUCTS):
        name = f"{entry.site}:{entry.operand}"
        site = flat.get(entry.site, SiteQuant())
        held = getattr(site, side_of(entry.operand))
        if not isinstance(held, QParams):
            raise ValueError(
                f"{name} holds a {type(held).__name__}, and one learned step for all timesteps is "
                "trained here; calibrate it with one range (calibrate_activations, per_step=())."
            )
        made[name] = held
    return made


def _operand_sizes(model: Model, example: Mapping) -> dict[str, int]:
    """{"site:operand": elements of one sample's tensor}."""
    sizes = {}
    for site in list_sites(model.module, example["x"], example["t"], example["y"]):
        for operand, shape in zip(site.operands, (site.lhs_shape, site.rhs_shape), strict=True):
            sizes[f"{site.name}:{operand}"] = int(np.prod(shape[1:]))
    return sizes


def student(trainable: Mapping, frozen: Mapping, step, gate) -> tuple[dict, dict]:
    """(params, quant) of the network at a step: what has begun by then is quantized, weights by their fake
    form. step: () int32; gate: () float32, whether second bases take part."""
    sites: dict[str, dict] = {}
    for name, grid in frozen["grids"].items():
        scale, start = trainable["steps"][name], frozen["starts"].get(f"{name}:weight")
        if grid.spec.grid == "binary":
            second = trainable["second"].get(name)
            begun = step >= (0 if start is None else start)
            rhs = BinaryWeight(positive(scale), second, gate, begun)
        else:
            factor = frozen["factors"][f"{name}:weight"]
            rhs = learned(grid.replace(scale=scale), gradient_factor=factor)
            rhs = rhs if start is None else quantized_from(rhs, step >= start)
        sites.setdefault(name, {})["rhs"] = rhs
    for name, grid in frozen["activations"].items():
        site, _, operand = name.rpartition(":")
        scale, factor = trainable["activations"][name], frozen["factors"][name]
        made = learned(grid.replace(scale=scale), gradient_factor=factor)
        if name in frozen["starts"]:
            made = quantized_from(made, step >= frozen["starts"][name])
        fields = sites.setdefault(site, {"product": operand in PRODUCTS})
        fields[side_of(operand)] = made
    quant = nest_sites({name: SiteQuant(**fields) for name, fields in sites.items()})
    leaves = {**frozen["rotations"], **trainable["others"], **trainable["kernels"]}
    return replace_leaves(frozen["params"], leaves), quant


def decide_student(state: QuantState, trained: Mapping, grids: Mapping[str, QParams]) -> QuantState:
    """The state of a trained network: codes of one basis, learned steps of the activations, every other
    parameter in aux["params"]."""
    state = decide_trained(state, trained, grids)
    flat = flatten_sites(state.quant)
    for name, scale in trained["activations"].items():
        site, _, operand = name.rpartition(":")
        side = side_of(operand)
        held = getattr(flat[site], side)
        flat[site] = flat[site].replace(**{side: held.replace(scale=positive(scale))})
    return state.replace(quant=nest_sites(flat))
