"""Step sizes predicted from the timestep: their start, from one pass, and their table.

TDQ (So et al. 2023) gives every activation an MLP of the timestep. Here its start is measured, in the
state's `aux["time_scales"]`, {"site:operand": TimeScale}, and every change of it is baked at once into
the step tables of the quant tree, so that whoever reads the tree sees tables and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from qdiff_jax.observe.capture import batch_bounds, slice_rows
from qdiff_jax.observe.taps import Tap
from qdiff_jax.policy import Entry
from qdiff_jax.quant.time_mlp import HIDDEN, TimeScale, bake, time_scale
from qdiff_jax.sites import SiteQuant, flatten_sites, nest_sites, side_of
from qdiff_jax.stages.calibrate import flatten_reports
from qdiff_jax.stages.stage import Model, QuantState, Stage, fold_weights


@dataclasses.dataclass(frozen=True)
class TimeScaleConfig:
    """encoding: width of the frequency encoding; 0 (the paper's) for that of the model's own timesteps: the
    channels of a U-Net, 256 for a transformer.
    hidden: of the MLP. exact_shift: SiLU outputs by the paper's real shift, without integer execution.
    shared: the ablation, one learned step size for all timesteps.
    Training, one unit after the other: steps, batch_size, lr (Adam, cosine to 0), weight_decay,
    dropout, p of the loss."""

    encoding: int = 0
    hidden: int = HIDDEN
    exact_shift: bool = False
    shared: bool = False
    steps: int = 5_000
    batch_size: int = 32
    lr: float = 2e-4
    weight_decay: float = 0.01
    dropout: float = 0.2
    p: float = 2.0

    def __post_init__(self):
        if self.encoding < 0 or self.encoding % 2:
            raise ValueError(
                f"TimeScaleConfig.encoding is {self.encoding}; choose an even number, or 0 for the model's own."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"TimeScaleConfig.dropout is {self.dropout}; choose from [0, 1).")


class Seen(NamedTuple):
    """Sums over the values of one activation: count, of |x|, of x, of x^2; and its extremes."""

    count: float
    magnitude: float
    total: float
    square: float
    lo: float
    hi: float


class Carry(NamedTuple):
    state: QuantState
    seen: dict[str, Seen]
    position: int


@functools.partial(jax.jit, static_argnames="module")
def tapped(module, variables, batch):
    """What every tapped site reports on a batch {x, t, y}."""
    _, written = module.apply(variables, batch["x"], batch["t"], batch["y"], mutable=["observed"])
    return written["observed"]


def activations(state: QuantState) -> tuple[Entry, ...]:
    """The activation operands that the plan quantizes by a range (dynamic ones measure their own)."""
    return tuple(e for e in state.plan.quantized() if e.operand != "weight" and not e.spec.dynamic)


def calibrate_time_scales(
    model: Model,
    calibration: Any,
    timesteps: np.ndarray,
    config: TimeScaleConfig,
    *,
    batch_size: int = 64,
    on_progress=None,
) -> Stage:
    """The stage that starts the s(t) of every planned activation from its moments over all steps.

    calibration: x, t, index, branch, y. timesteps: [S], the schedule that tables are baked for. The
    network runs with the weights of the state and activations in full precision.
    """
    size = int(np.shape(calibration.t)[0])
    bounds = batch_bounds(size, min(batch_size, size))

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        del store  # One pass of the network: cheaper made again than read back.
        return Carry(state, {}, 0 if activations(state) else len(bounds))

    def run(carry: Carry, n: int) -> Carry:
        params, _ = fold_weights(model.params, carry.state.quant)
        taps = {entry.site: SiteQuant(tap=Tap("sample")) for entry in activations(carry.state)}
        variables = {"params": params, "quant": nest_sites(taps)}
        seen = dict(carry.seen)
        for start, stop in bounds[carry.position : carry.position + n]:
            batch = {k: getattr(calibration, k) for k in ("x", "t", "y")}
            reports = tapped(model.module, variables, slice_rows(batch, start, stop))
            for name, report in flatten_reports(jax.device_get(reports)).items():
                seen[name] = _joined(seen.get(name), report)
            if on_progress is not None:
                on_progress(stop, size)
        return Carry(carry.state, seen, min(carry.position + n, len(bounds)))

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        scales = {}
        own = getattr(getattr(model.module, "config", None), "channels", 256)
        for entry in activations(carry.state):
            name = f"{entry.site}:{entry.operand}"
            seen = carry.seen[name]
            mean = seen.total / seen.count
            scales[name] = time_scale(
                jax.random.fold_in(carry.state.key, zlib.crc32(name.encode())),
                entry.spec,
                entry.bits,
                lo=seen.lo,
                hi=seen.hi,
                mean_magnitude=seen.magnitude / seen.count,
                deviation=max(seen.square / seen.count - mean**2, 0.0) ** 0.5,
                dim=config.encoding or own,
                hidden=config.hidden,
                exact=config.exact_shift,
                shared=config.shared,
            )
        passes = 1.0 if scales else 0.0
        state = with_time_scales(carry.state, scales, timesteps)
        return state, {"activations": len(scales), "network_passes": passes}

    def done(carry: Carry) -> bool:
        return carry.position >= len(bounds)

    return Stage("calibrate_time_scales", init, run, finish, done, "ranges")


def with_time_scales(
    state: QuantState, scales: Mapping[str, TimeScale], timesteps: np.ndarray
) -> QuantState:
    """A state with these {"site:operand": TimeScale} in aux, and their tables in the quant tree."""
    flat = flatten_sites(state.quant)
    for name, scale in scales.items():
        site, _, operand = name.rpartition(":")
        side = side_of(operand)
        held = flat.get(site, SiteQuant()).replace(**{side: bake(scale, timesteps)})
        flat[site] = held.replace(product=operand in ("q", "k", "softmax", "v"))
    held = {**state.aux.get("time_scales", {}), **scales}
    return state.replace(quant=nest_sites(flat), aux={**state.aux, "time_scales": held})


def _joined(seen: Seen | None, report: Mapping) -> Seen:
    x = np.asarray(report["sample"], np.float64)
    lo, hi = float(np.min(report["lo"])), float(np.max(report["hi"]))
    new = Seen(x.size, np.abs(x).sum(), x.sum(), np.square(x).sum(), lo, hi)
    if seen is None:
        return new
    sums = (float(a + b) for a, b in zip(seen[:4], new[:4], strict=True))
    return Seen(*sums, min(seen.lo, lo), max(seen.hi, hi))
