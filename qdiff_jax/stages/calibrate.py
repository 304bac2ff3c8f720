"""Activation ranges, from one pass over the calibration set.

They are read by taps while the network runs with the weights it has, and reduced by observers either
over all steps or by step, the latter giving step tables (TFMQ-DM's finite-set calibration for temporal
features). Sources: range estimators of the Q-Diffusion family; FSC, Huang et al. 2024, section 4.3.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.observe.capture import batch_bounds, slice_rows
from qdiff_jax.observe.observers import Observer, ema, minmax
from qdiff_jax.observe.reservoirs import mse, percentile, percentile_search
from qdiff_jax.observe.taps import Tap
from qdiff_jax.policy import ACTIVATION, Entry, SitePlan
from qdiff_jax.quant.qparams import dynamic_qparams, from_range
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.quant.timed import StepContext, from_ranges, select, widen
from qdiff_jax.runtime import checkpoint
from qdiff_jax.sites import SiteQuant, flatten_sites, nest_sites, side_of
from qdiff_jax.stages.stage import Model, QuantState, Stage, fold_weights, initial_state


@dataclasses.dataclass(frozen=True)
class ActivationConfig:
    """observer: of shared ranges: "minmax", "ema" (batches shuffled over steps), "percentile",
    "percentile_search" (the best of three) or "mse" (LAPQ's shrink search); the last three on a bounded sample
    of values. momentum: of "ema". With few batches its average is nearly the first batch: 16 trajectories of 20
    steps are five batches of 64, of which the first weighs 0.95^4 = 81 %.

    per_step: patterns of "site:operand" whose ranges are kept per step, in a table with rule "step";
    all others share one range. Per-step ranges are min-max. margin: widening of per-step ranges of
    data-dependent sites (values never seen in calibration are clipped otherwise, and the sampler
    amplifies it); exact: patterns of sites that depend on the step and perhaps the label alone, which need
    no margin, those of the label only if the calibration set has every class.
    """

    observer: str = "ema"
    momentum: float = 0.95
    per_step: tuple[str, ...] = ()
    exact: tuple[str, ...] = ("temb/*", "*_temb_proj/*", "time_embed/*", "*_emb_layers_1/*")
    margin: float = 1.1
    batch_size: int = 64

    def __post_init__(self):
        _observer(self.observer, self.momentum)  # an unknown name is said here, before any work


class Carry(NamedTuple):
    state: QuantState
    observers: dict
    position: int
    store: pathlib.Path | None


@functools.partial(jax.jit, static_argnames=("module", "observer"))
def _observe(module, observer, variables, batch, observers):
    """One batch through the tapped network, and every observer updated with what its site reported.

    observers: {"step": by step index, always min-max, "shared": all steps in one row, by `observer`}.
    """
    ctx = StepContext(t=batch["t"], index=batch["index"], branch=batch["branch"])
    quant = select(variables["quant"], ctx)
    _, written = module.apply(
        {"params": variables["params"], "quant": quant},
        batch["x"],
        batch["t"],
        batch["y"],
        mutable=["observed"],
    )
    observed = flatten_reports(written["observed"])
    rows = batch["index"]

    def updated(states, observer, rows):
        def one(name, state):
            report = observed[name]
            sample = (report["sample"], batch["number"]) if observer.takes == "sample" else ()
            return observer.update(state, report["lo"], report["hi"], rows, *sample)

        return {name: one(name, state) for name, state in states.items()}

    return {
        "step": updated(observers["step"], minmax(), rows),
        "shared": updated(observers["shared"], observer, jnp.zeros_like(rows)),
    }


def flatten_reports(observed: Mapping, leaf: str = "lo") -> dict[str, Mapping]:
    """{"site:operand": report} of an `observed` collection. leaf: a key that every report has."""
    flat = {}

    def walk(node, path):
        for key, value in node.items():
            if isinstance(value, Mapping) and leaf in value:
                flat[f"{path}:{key}"] = value
            else:
                walk(value, f"{path}/{key}" if path else key)

    walk(observed, "")
    return flat


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def calibrate_activations(
    model: Model,
    calibration: Any,
    timesteps: np.ndarray,
    config: ActivationConfig,
    *,
    on_progress: Callable | None = None,
) -> Stage:
    """The stage that gives every planned activation operand its quantizer.

    calibration: x, t, index, branch, y (shuffled over steps). timesteps: [S], the sampler's schedule by
    step index: the rows of step tables. The network runs with the weights of the state folded in and
    activations in full precision. `finish` raises if a step of a table was never seen.
    """
    steps = np.asarray(timesteps, np.float32)
    size = int(np.shape(calibration.t)[0])
    bounds = batch_bounds(size, min(config.batch_size, size))
    shared_observer = _observer(config.observer, config.momentum)

    def entries(state: QuantState) -> tuple[Entry, ...]:
        return tuple(e for e in state.plan.quantized() if e.operand != "weight")

    def static(state: QuantState):
        return [e for e in entries(state) if not e.spec.dynamic]

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        observers: dict[str, dict] = {"step": {}, "shared": {}}
        if not static(state):  # Only weights are planned, or ranges are measured at run time.
            return Carry(state, observers, len(bounds), None)
        for entry in static(state):
            name = f"{entry.site}:{entry.operand}"
            if entry.spec.granularity not in ("tensor", "split"):
                raise ValueError(
                    f"{name} is planned with granularity {entry.spec.granularity!r}, but a calibrated "
                    "activation has one range per tensor, or one for each part of a split one; use "
                    "that, or dynamic=True."
                )
            for part in part_names(entry):
                if matches(name, config.per_step):
                    observers["step"][part] = minmax().init(len(steps))
                else:
                    observers["shared"][part] = shared_observer.init(1)
        # What a policy keeps in full precision needs no table; a misspelt pattern matches nothing at all.
        known = [f"{entry.site}:{entry.operand}" for entry in state.plan.entries]
        unmatched = [p for p in config.per_step if not any(matches(n, (p,)) for n in known)]
        if unmatched:
            raise ValueError(f"per_step patterns {unmatched} match no operand of the plan.")
        carry = Carry(state, observers, 0, store)
        if store is not None and checkpoint.latest_step(store / "observers") is not None:
            restored = checkpoint.restore(store / "observers", observers)
            carry = carry._replace(observers=restored.tree, position=restored.step)
        return carry

    def run(carry: Carry, n: int) -> Carry:
        params, _ = fold_weights(model.params, carry.state.quant)
        statistic = "sample" if shared_observer.takes == "sample" else "range"
        # Taps and nothing else: activations stay in full precision while they are observed.
        tapped = tapped_sites(static(carry.state), statistic)
        variables = {"params": params, "quant": nest_sites(tapped)}
        observers = carry.observers
        for start, stop in bounds[carry.position : carry.position + n]:
            batch = slice_rows(_as_dict(calibration), start, stop)
            batch["number"] = np.arange(start, stop, dtype=np.int32)
            observers = _observe(model.module, shared_observer, variables, batch, observers)
            if on_progress is not None:
                on_progress(stop, size)
        position = min(carry.position + n, len(bounds))
        if carry.store is not None and position < len(bounds):
            checkpoint.save(carry.store / "observers", position, observers, keep=1)
        return carry._replace(observers=observers, position=position)

    def done(carry: Carry) -> bool:
        return carry.position >= len(bounds)

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        flat = flatten_sites(carry.state.quant)
        ranges, unknown = {}, set(unseen_label_nodes(model, calibration.y))
        for entry in entries(carry.state):
            name = f"{entry.site}:{entry.operand}"
            if entry.spec.dynamic:
                quantizer = dynamic_qparams(entry.spec, *entry.codes)
            elif part_names(entry)[0] in carry.observers["step"]:
                lo, hi = _finish_parts(minmax(), carry.observers["step"], entry, steps)
                exact = matches(name, config.exact) and entry.site.split("/")[0] not in unknown
                margin = 1.0 if exact else config.margin
                quantizer = from_ranges(
                    entry.spec, *widen((lo, hi), margin), *entry.codes, steps, "step"
                )
                ranges[name] = (np.asarray(lo), np.asarray(hi))
            else:
                whole = dataclasses.replace(
                    entry.spec, granularity="tensor", boundary=None, axis=-1
                )
                observer = _observer(config.observer, config.momentum, whole, entry.codes)
                lo, hi = _finish_parts(observer, carry.observers["shared"], entry, None)
                quantizer = from_range(entry.spec, lo[0], hi[0], *entry.codes)
                ranges[name] = (np.asarray(lo), np.asarray(hi))
            site = flat.get(entry.site, SiteQuant())
            site = site.replace(**{side_of(entry.operand): quantizer})
            product = entry.operand in ("q", "k", "softmax", "v")
            flat[entry.site] = site.replace(product=product)
        state = carry.state.replace(quant=nest_sites(flat))
        passes = 1.0 if static(state) else 0.0
        return state, {"activations": len(ranges), "network_passes": passes, "ranges": ranges}

    return Stage("calibrate_activations", init, run, finish, done, "ranges")


def unseen_label_nodes(model: Model, y: Any) -> tuple[str, ...]:
    """The nodes that read the condition and will meet values of it that a calibration set does not hold.

    y: the set's, None or labels [N] or other arrays. None of the nodes for labels in which every class of the
    model occurs; for a condition that is no label, all: there are always other values of it.
    """
    if y is None:
        return ()
    classes = getattr(getattr(model.module, "config", None), "num_classes", None)
    labels = np.asarray(y) if hasattr(y, "shape") else np.zeros(())
    if classes and labels.ndim == 1 and np.isin(np.arange(classes), labels).all():
        return ()
    reading = {"y"}
    for node in model.program:
        if reading & set(node.reads):
            reading.add(node.name)
    return tuple(node.name for node in model.program if node.name in reading)


def ranges_by_step(
    model: Model, calibration: Any, timesteps: np.ndarray, plan: SitePlan, batch_size: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"site:operand": (lo [S], hi [S])}: full-precision activation ranges at every step, in order of
    execution, for every activation of the plan."""
    config = ActivationConfig(per_step=("*",), margin=1.0, batch_size=batch_size)
    stage = calibrate_activations(model, calibration, timesteps, config)
    carry = stage.init(initial_state(plan, jax.random.key(0)), None)
    while not stage.done(carry):
        carry = stage.run(carry, 1_000_000)
    return stage.finish(carry)[1]["ranges"]


@functools.lru_cache(maxsize=64)
def _observer(
    name: str,
    momentum: float,
    spec: QuantSpec = ACTIVATION,
    codes: tuple[int, int] = (0, 255),
) -> Observer:
    """The same object for the same arguments: it is part of what `_observe` is compiled for.

    spec and codes matter to the end of the searches alone; observing is the same for all.
    """
    if name == "minmax":
        return minmax()
    if name == "ema":
        return ema(momentum)
    if name == "percentile":
        return percentile()
    if name == "percentile_search":
        return percentile_search(spec, *codes)
    if name == "mse":
        return mse(spec, *codes)
    raise ValueError(
        f"Observer {name!r} is unknown; use 'minmax', 'ema', 'percentile', 'percentile_search' or 'mse'."
    )


def part_names(entry: Entry) -> tuple[str, ...]:
    """Under which names the ranges of an activation are reported: "site:input", or, of a split one,
    "site/input:part_0" and "site/input:part_1"."""
    if entry.spec.granularity != "split":
        return (f"{entry.site}:{entry.operand}",)
    return tuple(f"{entry.site}/{entry.operand}:part_{i}" for i in range(2))


def tapped_sites(entries: Sequence[Entry], statistic: str, size: int = 256) -> dict[str, SiteQuant]:
    """{site: a tap of the statistic and nothing else}, split where the entry is. size: see `Tap`."""
    return {e.site: SiteQuant(tap=Tap(statistic, size, e.spec.boundary)) for e in entries}


def _finish_parts(observer: Observer, states: Mapping, entry: Entry, steps):
    """(lo, hi) [rows], or [rows, 2] of a split activation."""
    ranges = [_finish(observer, states[part], part, steps) for part in part_names(entry)]
    if len(ranges) == 1:
        return ranges[0]
    return tuple(np.stack(side, axis=-1) for side in zip(*ranges, strict=True))


def _as_dict(calibration) -> dict:
    return {k: getattr(calibration, k) for k in ("x", "t", "index", "branch", "y")}


def _finish(observer: Observer, state, name: str, steps) -> tuple[jax.Array, jax.Array]:
    try:
        return observer.finish(state)
    except ValueError as error:
        where = "" if steps is None else f" (schedule of {len(steps)} steps)"
        raise ValueError(
            f"Calibration of {name}{where}: {error} Select a calibration set that visits every step "
            "(selector 'every_step'), or share the range over steps."
        ) from error
