"""EfficientDM's student: low-rank updates rounded together with the weight, activations by sampling step.

He et al. 2024, sections 3.2 to 3.4: W_eff = FQ(W0 + B A; delta_w) with W0 the naively quantized weight, kept
as integers; delta_w learned; every input quantized with the step's own scale and zero point (TALSQ). An
update smaller than half a step changes no code, and steps differ between layers by orders of magnitude, so
the rate of a layer's update is proportional to its mean delta_w (scale-aware LoRA). With Adam that must
multiply the update: a factor on the gradient would be normalised away.

Where an earlier stage has decided codes already, W0 is those, delta_w starts from their scale, and what the
site holds beside them (a low-rank branch, a refitted bias) stays as it is and is part of the network that is
trained.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.export.qtensor import QTensor, from_codes
from qdiff_jax.export.qtensor import codes as codes_of
from qdiff_jax.policy import ACTIVATIONS
from qdiff_jax.quant.lora import (
    Update,
    init_low_rank,
    merged_codes,
    merged_weight,
    trained_grid,
)
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.quant.quantizer import codes, dequantize
from qdiff_jax.quant.step_tables import (
    check_served,
    kept_among_codes,
    learns_zero_point,
    on_schedule,
    repeated,
    trained_rows,
)
from qdiff_jax.quant.timed import StepContext, TimeIndexed, locate
from qdiff_jax.runtime.remat import recomputed
from qdiff_jax.sites import SiteQuant, flatten_sites, nest_sites, side_of
from qdiff_jax.stages.finetune import Student
from qdiff_jax.stages.stage import (
    Model,
    QuantState,
    decide_codes,
    fold_weights,
    kernel_at,
    replace_kernels,
)

BASES = ("quantized", "full_precision")
RATES = ("scale_aware", "mean", "constant")
LABELS = ("lora", "scales", "base_scales", "tables")


@dataclasses.dataclass(frozen=True)
class QALoRAConfig:
    """rank: r of the updates. base: W0, "quantized" (the paper) or "full_precision". base_delta_shared: W0
    de-quantized with the learned delta_w, which both uses update (the official code's aliasing); otherwise
    W0 stays. zp_ste: zero points of activations are rounded in training; False trains free floats, as the
    code does, and rounds them at the end. talsq: activations by sampling step, else one learned pair for all.
    rates: factor of each layer's rate, "scale_aware" (its mean delta_w), "mean" (their mean, for all) or
    "constant" (1). subsample: tables on a shorter schedule, "interpolate" or "every"."""

    rank: int = 32
    base: str = "quantized"
    base_delta_shared: bool = False
    zp_ste: bool = True
    talsq: bool = True
    rates: str = "scale_aware"
    subsample: str = "interpolate"

    def __post_init__(self):
        for name, allowed in (
            ("base", BASES),
            ("rates", RATES),
            ("subsample", ("every", "interpolate")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"QALoRAConfig.{name} is {getattr(self, name)!r}; use one of {allowed}."
                )
        if self.rank < 1:
            raise ValueError(
                f"QALoRAConfig.rank is {self.rank}; an update has at least rank 1 (to train no updates, set "
                "lora=False)."
            )
        if self.base_delta_shared and self.base == "full_precision":
            raise ValueError(
                "base_delta_shared speaks of a quantized base: leave it out with base='full_precision'."
            )


def qalora(
    model: Model,
    config: QALoRAConfig,
    trained: np.ndarray,
    timesteps: np.ndarray,
    left_alone: Collection[str] = (),
) -> Student:
    """The student of a state whose weights have ranges or codes and whose activations have one quantizer each.

    trained: [S], timesteps of the trajectories. timesteps: [S'], the sampler's, which the tables of
    the result serve. left_alone: sites that are calibrated and nothing more. Its labels: "lora",
    "scales" (delta_w), "tables" (activations), and with base_delta_shared "base_scales". Raises ValueError
    for a schedule that tables of `trained` cannot serve, and `begin`, naming the site, for a weight without a
    range, for codes under base="full_precision", or an activation that has a step table already.
    """
    rows = np.zeros(1, np.float32)
    if config.talsq:
        rows = np.asarray(trained, np.float32)
        check_served(rows, np.asarray(timesteps, np.float32), config.subsample)

    def begin(state: QuantState) -> tuple[dict, Any, dict]:
        flat = flatten_sites(state.quant)
        fixed = {
            "grids": {},
            "bases": {},
            "kept": {},
            "activations": {},
            "static": {},
            "beside": {},
            "timesteps": jnp.asarray(rows),
        }
        trainable: dict[str, dict] = {"lora": {}, "scales": {}, "tables": {}}
        weights = [entry.site for entry in state.plan.quantized("weight")]
        for site in weights:
            _check_begun(site, flat[site].rhs, config.base)
            if flat[site].substitute is not None or flat[site].bias is not None:
                fixed["beside"][site] = flat[site].replace(lhs=None, rhs=None)
        kept = {site: flat[site] for site in weights if site in left_alone}
        folded, _ = fold_weights(model.params, nest_sites(kept))
        fixed["kept"] = {site: kernel_at(folded, site) for site in kept}
        adapted = [site for site in weights if site not in left_alone]
        key = jax.random.fold_in(state.key, 2)
        for i, site in enumerate(adapted):
            held, shape = flat[site].rhs, kernel_at(model.params, site).shape
            fixed["grids"][site] = grid = held.qparams if isinstance(held, QTensor) else held
            trainable["scales"][site] = grid.scale
            trainable["lora"][site] = init_low_rank(jax.random.fold_in(key, i), shape, config.rank)
        if config.base == "quantized":
            decided = {site for site in adapted if isinstance(flat[site].rhs, QTensor)}
            fixed["bases"] = _nearest(
                model.params, {s: g for s, g in fixed["grids"].items() if s not in decided}
            )
            for site in decided:
                fixed["bases"][site] = _narrow(codes_of(flat[site].rhs), fixed["grids"][site])
        for entry in state.plan.quantized(*ACTIVATIONS):
            held = getattr(flat[entry.site], side_of(entry.operand))
            name = f"{entry.site}:{entry.operand}"
            if entry.site in left_alone or entry.spec.dynamic:
                fixed["static"][name] = held
                continue
            if not isinstance(held, QParams):
                raise ValueError(f"{name} needs one calibrated range before its steps are learned.")
            fixed["activations"][name] = table = repeated(held, len(rows))
            learned = {"scale": table.scale}
            if learns_zero_point(table.spec):  # of others decay would move what nothing trains
                learned["zero_point"] = table.zero_point
            trainable["tables"][name] = learned
        if not trainable["tables"]:
            del trainable["tables"]
        if config.base_delta_shared:
            trainable["base_scales"] = dict(trainable["scales"])
        return trainable, fixed, {"lora": _factors(trainable, config.rates)}

    return Student(
        tuple(name for name in LABELS if name != "base_scales" or config.base_delta_shared),
        ("tables",),
        begin,
        _variables(config.zp_ste),
        settle,
        visited,
        functools.partial(_finish, model, config, rows, timesteps),
        dataclasses.asdict(config),
    )


def _check_begun(site: str, held: Any, base: str) -> None:
    if not isinstance(held, QParams | QTensor):
        raise ValueError(f"{site} has no range to train from; run calibrate_weights first.")
    if isinstance(held, QTensor) and base == "full_precision":
        raise ValueError(
            f"{site} has codes already, and base='full_precision' would begin from the weight they were "
            "decided for: set student.base='quantized', which begins from the codes."
        )


def _narrow(held: jax.Array, grid: QParams) -> jax.Array:
    # Of at most 8 bits, one byte each, whatever the bits: narrower packing would compile anew.
    return held.astype(jnp.int8 if grid.spec.signed else jnp.uint8)


# Lists, not dicts: a site's name in the treedef would compile equal layers again.
@jax.jit
def _codes(grids, kernels):
    return [_narrow(codes(g, k), g) for g, k in zip(grids, kernels)]


def _nearest(params: Mapping, grids: Mapping[str, QParams]) -> dict[str, jax.Array]:
    """{site: the nearest codes of its kernel}."""
    kernels = [kernel_at(params, site) for site in grids]
    return dict(zip(grids, _codes(list(grids.values()), kernels)))


def _factors(trainable: Mapping, rates: str) -> dict:
    """{site: factor of the rate of A and of B}: mean(delta_w) of the layer, before training."""
    means = {site: np.mean(np.asarray(scale)) for site, scale in trainable["scales"].items()}
    if rates == "mean":
        means = dict.fromkeys(means, np.mean(list(means.values())))
    elif rates == "constant":
        means = dict.fromkeys(means, 1.0)
    factors = {site: jnp.float32(mean) for site, mean in means.items()}
    return {site: Update(a=factor, b=factor) for site, factor in factors.items()}


def _weight(learned, given):
    """FQ(W0 + B A). learned: (update, grid, grid of W0 or None); given: codes of W0, or a kernel."""
    update, grid, base_grid = learned
    if base_grid is not None:
        given = dequantize(trained_grid(base_grid), given.astype(jnp.int32))
    return merged_weight(given, update, grid)


@functools.cache
def _variables(zp_ste: bool):
    def variables(trainable, fixed, params):
        kernels, made = dict(fixed["kept"]), None
        for site, grid in fixed["grids"].items():
            # One after the other: started together, their products A B are a copy of the network.
            made = _effective(trainable, fixed, params, site, grid, begin=made)
            kernels[site] = made
        sites: dict[str, SiteQuant] = dict(fixed["beside"])
        rule = "step" if fixed["timesteps"].shape[0] > 1 else "bin"
        quantizers = dict(fixed["static"])
        for name, table in fixed["activations"].items():
            table = trained_rows(table.replace(**trainable["tables"][name]), zp_ste)
            quantizers[name] = TimeIndexed(table, fixed["timesteps"], rule)
        for name, quantizer in quantizers.items():
            site, _, operand = name.rpartition(":")
            side = {side_of(operand): quantizer}
            held = sites.get(site, SiteQuant(product=operand not in ("input",)))
            sites[site] = held.replace(**side)
        return {"params": replace_kernels(params, kernels), "quant": nest_sites(sites)}

    return variables


def _effective(trainable, fixed, params, site, grid, begin):
    """The weight of a site, recomputed in the backward pass: what rounding leaves behind there would be several
    copies of the network. W0 is valued with the scale it was given, or with the learned one."""
    given = fixed["bases"].get(site)
    base_grid = None if given is None else grid
    if "base_scales" in trainable:
        base_grid = grid.replace(scale=trainable["base_scales"][site])
    learned = grid.replace(scale=trainable["scales"][site])
    given = kernel_at(params, site) if given is None else given
    update = trainable["lora"][site]
    return recomputed(_weight, (update, learned, base_grid), given, begin)


def settle(before: Mapping, after: dict, fixed: Mapping) -> dict:
    """Zero points back among the codes; a shared delta_w takes the updates of both its uses."""
    if "tables" in after:
        tables = {}
        for name, learned in after["tables"].items():
            table = kept_among_codes(fixed["activations"][name].replace(**learned))
            tables[name] = {field: getattr(table, field) for field in learned}
        after = {**after, "tables": tables}
    if "base_scales" in after:
        both = jax.tree.map(
            lambda a, b, old: a + b - old, after["scales"], after["base_scales"], before["scales"]
        )
        after = {**after, "scales": both, "base_scales": dict(both)}
    return after


def visited(fixed: Mapping, ctx: StepContext) -> jax.Array:
    """[n] int32: the rows of the tables that a batch reads."""
    steps = fixed["timesteps"]
    rule = "step" if steps.shape[0] > 1 else "bin"
    return jnp.atleast_1d(locate(TimeIndexed((), steps, rule), ctx)[0])


@jax.jit
def _merged(bases, base_grids, updates, grids):
    """(codes of FQ(W0 + B A), their grids), lists. bases: codes, or kernels, whose base grid is None."""
    held = []
    for base, base_grid, update, grid in zip(bases, base_grids, updates, grids):
        if base_grid is not None:
            base = dequantize(trained_grid(base_grid), base.astype(jnp.int32))
        held.append(merged_codes(base, update, grid))
    return held, [trained_grid(grid) for grid in grids]


def _finish(model, config, rows, timesteps, state: QuantState, trainable, fixed):
    """The state of integers: merged codes, tables on the sampler's schedule; nothing of the updates left."""
    flat = flatten_sites(state.quant)
    bits = {entry.site: entry.bits for entry in state.plan.quantized("weight")}
    sites = list(fixed["grids"])
    bases = [fixed["bases"].get(site, kernel_at(model.params, site)) for site in sites]
    start = {site: fixed["grids"][site] for site in fixed["bases"]}
    if "base_scales" in trainable:
        learned = trainable["base_scales"]
        start = {site: grid.replace(scale=learned[site]) for site, grid in start.items()}
    merged, grids = _merged(
        bases,
        [start.get(site) for site in sites],
        [trainable["lora"][site] for site in sites],
        [fixed["grids"][site].replace(scale=trainable["scales"][site]) for site in sites],
    )
    moved = total = 0
    begun = fixed["bases"] or _nearest(model.params, fixed["grids"])
    for site, grid, held in zip(sites, grids, merged):
        moved += int(np.sum(np.asarray(held) != np.asarray(begun[site])))
        total += held.size
        flat[site] = flat[site].replace(rhs=from_codes(held, grid, bits[site]))
    for name, table in fixed["activations"].items():
        site, _, operand = name.rpartition(":")
        learned = table.replace(**trainable["tables"][name])
        if config.talsq:
            made = on_schedule(learned, rows, timesteps, config.subsample)
        else:
            rounded = kept_among_codes(trained_rows(learned))
            made = jax.tree.map(lambda leaf: leaf[0], rounded)
        flat[site] = flat[site].replace(**{side_of(operand): made})
    state = state.replace(quant=decide_codes(nest_sites(flat), model.params))
    return state, {
        "adapted": len(sites),
        "lora_parameters": sum(leaf.size for leaf in jax.tree.leaves(trainable["lora"])),
        "codes_moved": moved / total if total else None,
    }
