"""Activation ranges searched batch by batch and averaged over the batches (the EMA-MSE observer).

Of every batch and activation the range of least error is searched among all widths and zero points
(`quant.histogram_search`), and the searched ends are averaged exponentially over the batches.
Source: QDrop's observer (Wei et al. 2022), as PTQ4DM (Shang et al. 2023) and EDA-DM calibrate with it.

The official observers search on the whole tensor; so does this, on a histogram of all its values. A sample of
them would not do: of 512 values of a Gaussian the search clips at 3.1 sigma, which at 8 bits doubles the error.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from qdiff_jax.observe.capture import batch_bounds, slice_rows
from qdiff_jax.policy import Entry
from qdiff_jax.quant.histogram_search import search_histogram
from qdiff_jax.quant.qparams import from_range
from qdiff_jax.runtime import checkpoint
from qdiff_jax.runtime.finite import NotFiniteError
from qdiff_jax.sites import SiteQuant, flatten_sites, nest_sites, side_of
from qdiff_jax.stages.calibrate import flatten_reports, part_names, tapped_sites
from qdiff_jax.stages.stage import Model, QuantState, Stage, fold_weights


@dataclasses.dataclass(frozen=True)
class BatchRangeConfig:
    """momentum: of the old average (0.9 in QDrop, PTQ4DM, EDA-DM). candidates: widths, shares of the full
    one. power: of the error. bins: of the histogram of a batch. batch_size: divides the set.

    Raises ValueError for a momentum outside [0, 1) or counts below 1."""

    momentum: float = 0.9
    candidates: int = 100
    power: float = 2.4
    bins: int = 2048
    batch_size: int = 64

    def __post_init__(self):
        if not 0 <= self.momentum < 1:
            raise ValueError(f"BatchRangeConfig.momentum is {self.momentum}; choose 0 to below 1.")
        for field in ("candidates", "bins", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"BatchRangeConfig.{field} must be at least 1.")


class Carry(NamedTuple):
    """average: [sites, 2], the averaged ends so far; position: batches seen."""

    state: QuantState
    average: np.ndarray
    position: int
    store: pathlib.Path | None


@functools.partial(jax.jit, static_argnames=("module", "names"))
def _observe(module, names, variables, batch):
    """{name: (extremes lo, hi, counts [bins] between them and zero)} of the tapped network on one batch."""
    arguments = (variables, batch["x"], batch["t"], batch["y"])
    _, written = module.apply(*arguments, mutable=["observed"])
    observed = flatten_reports(written["observed"])
    return {
        n: (observed[n]["lo"].min(), observed[n]["hi"].max(), observed[n]["counts"].sum(0))
        for n in names
    }


def calibrate_by_batch(
    model: Model,
    calibration: Any,
    config: BatchRangeConfig = BatchRangeConfig(),
    *,
    on_progress: Callable | None = None,
) -> Stage:
    """The stage that gives every planned activation one range for all steps, averaged over batches.

    calibration: x, t, index, branch, y, shuffled over steps. The network runs with the weights of the
    state folded in and activations in full precision. Raises ValueError for an activation planned on
    anything but a static, unsigned affine grid of at most 8 bits, one range per tensor (or per part).
    """
    size = int(np.shape(calibration.t)[0])
    bounds = batch_bounds(size, min(config.batch_size, size))

    def entries(state: QuantState) -> tuple[Entry, ...]:
        return tuple(e for e in state.plan.quantized() if e.operand != "weight")

    def names(state: QuantState) -> tuple[tuple[str, Entry], ...]:
        return tuple((part, e) for e in entries(state) for part in part_names(e))

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        for e in entries(state):
            plain = e.spec.granularity in ("tensor", "split") and not e.spec.dynamic
            if not plain or e.spec.signed or e.spec.grid != "affine" or e.bits > 8:
                raise ValueError(
                    f"{e.site}:{e.operand} is planned on {e.spec} with {e.bits} bits; ranges searched by "
                    "batch are for static unsigned affine grids of at most 8 bits, one per tensor."
                )
        average = np.zeros((len(names(state)), 2), np.float32)
        carry = Carry(state, average, 0 if len(average) else len(bounds), None)
        if len(average) and store is not None:
            carry = carry._replace(store=store)
            if checkpoint.latest_step(store / "ranges") is not None:
                restored = checkpoint.restore(store / "ranges", {"average": average})
                average = np.asarray(restored.tree["average"])
                carry = carry._replace(average=average, position=restored.step)
        return carry

    def run(carry: Carry, n: int) -> Carry:
        params, _ = fold_weights(model.params, carry.state.quant)
        planned = names(carry.state)
        taps = nest_sites(tapped_sites(entries(carry.state), "histogram", config.bins))
        variables, average = {"params": params, "quant": taps}, carry.average
        keys = tuple(name for name, _ in planned)
        for number, (start, stop) in enumerate(bounds[carry.position : carry.position + n]):
            position = carry.position + number
            batch = slice_rows({k: getattr(calibration, k) for k in ("x", "t", "y")}, start, stop)
            seen = jax.device_get(_observe(model.module, keys, variables, batch))
            bad = next((name for name in keys if not np.isfinite(seen[name][:2]).all()), None)
            if bad is not None:
                raise NotFiniteError(
                    f"Calibration of {bad}: the tensor holds NaN or infinity; look for the layer that "
                    "produced it before calibrating."
                )
            found = np.stack([_searched(entry, *seen[name], config) for name, entry in planned])
            keep = np.float32(config.momentum if position else 0.0)
            average = keep * average + (1 - keep) * found
            if on_progress is not None:
                on_progress(stop, size)
        position = min(carry.position + n, len(bounds))
        if carry.store is not None and position < len(bounds):
            checkpoint.save(carry.store / "ranges", position, {"average": average}, keep=1)
        return carry._replace(average=average, position=position)

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        flat = flatten_sites(carry.state.quant)
        ends = dict(zip((name for name, _ in names(carry.state)), carry.average, strict=True))
        ranges = {}
        for e in entries(carry.state):
            lo, hi = np.stack([ends[part] for part in part_names(e)], axis=-1)
            if e.spec.granularity != "split":
                lo, hi = lo[0], hi[0]
            site = flat.get(e.site, SiteQuant()).replace(
                **{side_of(e.operand): from_range(e.spec, lo, hi, *e.codes)}
            )
            flat[e.site] = site.replace(product=e.operand in ("q", "k", "softmax", "v"))
            ranges[f"{e.site}:{e.operand}"] = (lo, hi)
        report = {
            "activations": len(ranges),
            "network_passes": float(bool(ranges)),
            "ranges": ranges,
        }
        return carry.state.replace(quant=nest_sites(flat)), report

    return Stage(
        "calibrate_activations",
        init,
        run,
        finish,
        lambda carry: carry.position >= len(bounds),
        "ranges",
    )


def _searched(entry: Entry, lo, hi, counts, config: BatchRangeConfig) -> np.ndarray:
    """[2]: (lo, hi) of one activation in one batch."""
    qmin, qmax = entry.codes
    return np.float32(
        search_histogram(
            counts,
            min(float(lo), 0.0),
            max(float(hi), 0.0),
            int(qmax - qmin),
            power=config.power,
            candidates=config.candidates,
            zero_fixed=entry.spec.symmetric,
        )
    )
