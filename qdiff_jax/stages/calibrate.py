"""Ranges: of every weight from its values, of every activation from one pass over the calibration set.

Weight ranges are searched per channel (MSE shrink search, LAPQ's p = 2.4) or min-max. Activation ranges are
read by taps while the network runs with the weights it has, reduced by observers either over all
steps or by step, the latter giving step tables (TFMQ-DM's finite-set calibration for temporal features).
Sources: range estimators of the Q-Diffusion family; FSC, Huang et al. 2024, section 4.3.
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
from qdiff_jax.observe.taps import Tap
from qdiff_jax.policy import Entry
from qdiff_jax.quant.qparams import dynamic_qparams, from_range
from qdiff_jax.quant.ranges import weight_qparams
from qdiff_jax.quant.timed import StepContext, TimeIndexed, select, widen
from qdiff_jax.runtime import checkpoint
from qdiff_jax.sites import SiteQuant, flatten_sites, nest_sites
from qdiff_jax.stages.stage import Model, QuantState, Stage, decide_codes, fold_weights


@dataclasses.dataclass(frozen=True)
class ActivationConfig:
    """observer: "minmax" or "ema" (momentum 0.95, batches shuffled over steps).

    per_step: patterns of "site:operand" whose ranges are kept per step, in a table with rule "step";
    all others share one range. Per-step ranges are min-max. margin: widening of per-step ranges of
    data-dependent sites (values never seen in calibration are clipped otherwise, and the sampler
    amplifies it); exact: patterns of sites that depend on the step alone, which need no margin.
    """

    observer: str = "ema"
    momentum: float = 0.95
    per_step: tuple[str, ...] = ()
    exact: tuple[str, ...] = ("temb/*", "*_temb_proj/*")
    margin: float = 1.1
    batch_size: int = 64


class Carry(NamedTuple):
    state: QuantState
    observers: dict
    position: int
    store: pathlib.Path | None


def calibrate_weights(model: Model, *, method: str = "mse") -> Stage:
    """The stage that gives every planned weight its range; nothing is rounded yet.

    method: "mse" (80 candidates, p 2.4, per channel) or "minmax". One site per step of the stage.
    """

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        del store  # A second or two for a whole network: cheaper done again than read back.
        return Carry(state, {}, 0, None)

    def run(carry: Carry, n: int) -> Carry:
        entries = carry.state.plan.quantized("weight")
        flat = flatten_sites(carry.state.quant)
        for entry in entries[carry.position : carry.position + n]:
            kernel = model.params
            for part in entry.site.split("/"):
                kernel = kernel[part]
            qparams = weight_qparams(kernel["kernel"], entry.spec, entry.bits, method=method)
            flat[entry.site] = flat.get(entry.site, SiteQuant()).replace(rhs=qparams)
        state = carry.state.replace(quant=nest_sites(flat))
        return carry._replace(state=state, position=min(carry.position + n, len(entries)))

    def done(carry: Carry) -> bool:
        return carry.position >= len(carry.state.plan.quantized("weight"))

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        return carry.state, {"weights": carry.position}

    return Stage("calibrate_weights", init, run, finish, done)


def round_to_nearest(model: Model) -> Stage:
    """The stage that decides the nearest code of every weight that has a range and no codes yet."""

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        del store
        return Carry(state, {}, 0, None)

    def run(carry: Carry, n: int) -> Carry:
        del n
        quant = decide_codes(carry.state.quant, model.params)
        return carry._replace(state=carry.state.replace(quant=quant), position=1)

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        return carry.state, {}

    return Stage("round_to_nearest", init, run, finish, lambda carry: carry.position >= 1)


@functools.partial(jax.jit, static_argnames=("module", "update"))
def _observe(module, update, variables, batch, observers):
    """One batch through the tapped network, and every observer updated with what its site reported.

    observers: {"step": by step index, always min-max, "shared": all steps in one row, by `update`}.
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

    def updated(states, update, rows):
        return {
            name: update(state, observed[name]["lo"], observed[name]["hi"], rows)
            for name, state in states.items()
        }

    return {
        "step": updated(observers["step"], minmax().update, rows),
        "shared": updated(observers["shared"], update, jnp.zeros_like(rows)),
    }


def flatten_reports(observed: Mapping) -> dict[str, Mapping]:
    """{"site:operand": report} of an `observed` collection."""
    flat = {}

    def walk(node, path):
        for key, value in node.items():
            if isinstance(value, Mapping) and "lo" in value:
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
    shared_observer = _observer(config)

    def entries(state: QuantState) -> tuple[Entry, ...]:
        return tuple(e for e in state.plan.quantized() if e.operand != "weight")

    def static(state: QuantState):
        return [e for e in entries(state) if not e.spec.dynamic]

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        observers: dict[str, dict] = {"step": {}, "shared": {}}
        for entry in static(state):
            name = f"{entry.site}:{entry.operand}"
            if matches(name, config.per_step):
                observers["step"][name] = minmax().init(len(steps))
            else:
                observers["shared"][name] = shared_observer.init(1)
        unmatched = [
            p for p in config.per_step if not any(matches(n, (p,)) for n in observers["step"])
        ]
        if unmatched:
            raise ValueError(f"per_step patterns {unmatched} match no quantized activation.")
        carry = Carry(state, observers, 0, store)
        if store is not None and checkpoint.latest_step(store / "observers") is not None:
            restored = checkpoint.restore(store / "observers", observers)
            carry = carry._replace(observers=restored.tree, position=restored.step)
        return carry

    def run(carry: Carry, n: int) -> Carry:
        params, quant = fold_weights(model.params, carry.state.quant)
        variables = {"params": params, "quant": _tapped(quant, static(carry.state))}
        observers = carry.observers
        for start, stop in bounds[carry.position : carry.position + n]:
            batch = slice_rows(_as_dict(calibration), start, stop)
            observers = _observe(model.module, shared_observer.update, variables, batch, observers)
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
        ranges = {}
        for entry in entries(carry.state):
            name = f"{entry.site}:{entry.operand}"
            if entry.spec.dynamic:
                quantizer = dynamic_qparams(entry.spec, *entry.codes)
            elif name in carry.observers["step"]:
                lo, hi = _finish(minmax(), carry.observers["step"][name], name, steps)
                margin = 1.0 if matches(name, config.exact) else config.margin
                rows = from_range(
                    entry.spec, *widen((lo, hi), margin), *_as_rows(entry, len(steps))
                )
                quantizer = TimeIndexed(rows, jnp.asarray(steps), "step")
                ranges[name] = (np.asarray(lo), np.asarray(hi))
            else:
                lo, hi = _finish(shared_observer, carry.observers["shared"][name], name, None)
                quantizer = from_range(entry.spec, lo[0], hi[0], *entry.codes)
                ranges[name] = (np.asarray(lo), np.asarray(hi))
            site = flat.get(entry.site, SiteQuant())
            if entry.operand in ("input", "q", "softmax"):
                site = site.replace(lhs=quantizer)
            else:
                site = site.replace(rhs=quantizer)
            product = entry.operand in ("q", "k", "softmax", "v")
            flat[entry.site] = site.replace(product=product)
        state = carry.state.replace(quant=nest_sites(flat))
        return state, {"activations": len(ranges), "network_passes": 1.0}

    return Stage("calibrate_activations", init, run, finish, done)


def _observer(config: ActivationConfig) -> Observer:
    if config.observer == "minmax":
        return minmax()
    if config.observer == "ema":
        return ema(config.momentum)
    raise ValueError(f"Observer {config.observer!r} is unknown; use 'minmax' or 'ema'.")


def _as_dict(calibration) -> dict:
    return {k: getattr(calibration, k) for k in ("x", "t", "index", "branch", "y")}


def _as_rows(entry: Entry, rows: int) -> tuple[jax.Array, jax.Array]:
    """qmin and qmax as tables too, since `select` takes a row of every leaf."""
    qmin, qmax = entry.codes
    return jnp.full((rows,), float(qmin)), jnp.full((rows,), float(qmax))


def _tapped(quant: Mapping, entries: Sequence[Entry]) -> dict:
    """Taps at the sites of the entries and nothing else: activations stay in full precision."""
    del quant
    return nest_sites({entry.site: SiteQuant(tap=Tap("range")) for entry in entries})


def _finish(observer: Observer, state, name: str, steps) -> tuple[jax.Array, jax.Array]:
    try:
        return observer.finish(state)
    except ValueError as error:
        where = "" if steps is None else f" (schedule of {len(steps)} steps)"
        raise ValueError(
            f"Calibration of {name}{where}: {error} Select a calibration set that visits every step "
            "(selector 'every_step'), or share the range over steps."
        ) from error
