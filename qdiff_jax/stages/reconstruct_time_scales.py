"""TDQ after training: the step-size networks of each unit learn to keep the unit's output.

So et al. 2023, post-training form: weights are decided and stay; the networks of a unit's
activations are trained together so that the unit, on its full-precision inputs, gives its full-precision
outputs. Units do not depend on each other, so one stream is walked, once. The paper does not say how long;
the optimizer is that of its quantization-aware form (AdamW with the networks' decay).
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qdiff_jax.models.program import Signature, Unit, apply_unit, check_order, subtrees
from qdiff_jax.observe.capture import Pool, Stream, advance, needed_after, plan_pool, start_stream
from qdiff_jax.quant.time_mlp import Layers, TimeScale, qparams_at
from qdiff_jax.quant.timed import select
from qdiff_jax.runtime.loop import run_steps
from qdiff_jax.sites import flatten_sites, nest_sites, side_of
from qdiff_jax.stages.objective import sum_of_outputs
from qdiff_jax.stages.partial import (
    discard_partial,
    partial_folder,
    resume_partial,
    save_partial,
)
from qdiff_jax.stages.stage import Model, QuantState, Stage, fold_weights
from qdiff_jax.stages.time_scales import TimeScaleConfig, with_time_scales
from qdiff_jax.stages.unit_results import load_result, save_result
from qdiff_jax.stages.unit_trees import only_activations


class Carry(NamedTuple):
    """unit: {"carry", "losses"} of the unit being trained, or None between units."""

    state: QuantState
    full: Stream
    pool: Pool
    position: int
    step: int
    unit: dict | None
    reports: tuple[dict, ...]
    saved: float
    store: pathlib.Path | None


def reconstruct_time_scales(
    model: Model,
    units: Sequence[Unit],
    calibration: Any,
    timesteps: np.ndarray,
    config: TimeScaleConfig,
    *,
    walk_batch: int = 64,
    memory_mib: int = 2048,
    save_seconds: float = 20.0,
    on_progress=None,
) -> Stage:
    """The stage that trains the networks which `calibrate_time_scales` has started.

    calibration: x, t, index, branch, y. timesteps: [S], what tables are baked for. walk_batch,
    memory_mib, save_seconds: as for weights, see `ReconstructConfig`. `finish` returns the state with
    trained `aux["time_scales"]` and their tables, and a report with the first and last loss of each
    unit. Raises FloatingPointError, naming the unit, if a loss is not finite.
    """
    check_order(model.program, units, ("x", "t", "y"))

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        stream = start_stream(
            calibration.x, calibration.t, calibration.index, calibration.branch, calibration.y
        )
        spill = None if store is None else store / "spill"
        limit = memory_mib << 20
        pool = plan_pool(units, model.params, stream, limit_bytes=limit, spill=spill, streams=1)
        position = 0 if state.aux.get("time_scales") else len(units)
        return Carry(state, stream, pool, position, 0, None, (), time.monotonic(), store)

    def run(carry: Carry, n: int) -> Carry:
        if done(carry):
            return carry
        unit = units[carry.position]
        if carry.unit is None:
            carry = _begin(carry, unit)
        if carry.unit["carry"] is not None and carry.step < config.steps:
            carry = _train(carry, unit, min(n, config.steps - carry.step))
        if carry.unit["carry"] is None or carry.step >= config.steps:
            carry = _close(carry, unit)
        return carry

    def done(carry: Carry) -> bool:
        return carry.position >= len(units)

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        passes = round(carry.full.passes, 3)
        return carry.state, {"units": list(carry.reports), "network_passes": passes}

    def _begin(carry: Carry, unit: Unit) -> Carry:
        wanted = needed_after(units, carry.position) | set(unit.inputs) | set(unit.outputs)
        full = advance(
            carry.full,
            unit,
            model.params,
            {},
            batch_size=walk_batch,
            pool=carry.pool,
            keep=wanted,
            unit_count=len(units),
        )
        carry = carry._replace(
            full=full, step=0, unit={"carry": None, "losses": [], "result": None}
        )
        held = _of_unit(carry.state.aux["time_scales"], unit)
        if not held:
            return carry
        result = load_result(carry.store, carry.position, unit.name)
        if result is not None:
            return carry._replace(unit={**carry.unit, "result": result})
        work = _working_set(model, carry.state, carry.full, unit, held)
        at, losses, work = resume_partial(
            partial_folder(carry.store, carry.position), config.steps, work
        )
        return carry._replace(step=at, unit={"carry": work, "losses": losses, "result": None})

    def _train(carry: Carry, unit: Unit, n: int) -> Carry:
        stop = carry.step + n
        xs = step_inputs(config, carry.state.key, carry.full.size, carry.position, carry.step, stop)
        step = _make_step(unit.signature, config.p, config.dropout, config.weight_decay)
        work, losses = run_steps(step, carry.unit["carry"], xs, donate=True)
        losses = np.asarray(losses)
        if not np.isfinite(losses).all():
            raise FloatingPointError(
                f"reconstruct_time_scales: the loss of unit {unit.name!r} is not finite between steps "
                f"{carry.step} and {stop}; lower the learning rate or check the calibration set."
            )
        kept = [*carry.unit["losses"], *losses.tolist()]
        carry = carry._replace(step=stop, unit={**carry.unit, "carry": work, "losses": kept})
        if on_progress is not None:
            at = config.steps * carry.position + stop
            on_progress(at, config.steps * len(units), unit=unit.name, loss=f"{losses[-1]:.3g}")
        due = time.monotonic() - carry.saved > save_seconds
        if carry.store is not None and due and stop < config.steps:
            save_partial(
                partial_folder(carry.store, carry.position), stop, config.steps, work, kept
            )
            carry = carry._replace(saved=time.monotonic())
        return carry

    def _close(carry: Carry, unit: Unit) -> Carry:
        result, state = carry.unit["result"], carry.state
        report = {"unit": unit.name, "trained": False}
        if carry.unit["carry"] is not None:
            result = _result(carry.unit["carry"]["trainable"], carry.unit["losses"])
            save_result(carry.store, carry.position, unit.name, result)
            discard_partial(partial_folder(carry.store, carry.position))
        if result is not None:
            held = _of_unit(state.aux["time_scales"], unit)
            trained = _layers_of(result["scales"])
            fresh = {
                name: dataclasses.replace(scale, layers=trained[key])
                for key, (name, scale) in held.items()
            }
            state = with_time_scales(state, fresh, timesteps)
            report = {"unit": unit.name, "trained": True, **result["report"]}
        keep = needed_after(units, carry.position) | {"x", "t", "y"}
        alive = {name: v for name, v in carry.full.values.items() if name in keep}
        return carry._replace(
            state=state,
            full=carry.full._replace(values=alive),
            position=carry.position + 1,
            step=0,
            unit=None,
            reports=(*carry.reports, report),
            saved=time.monotonic(),
        )

    return Stage("reconstruct_time_scales", init, run, finish, done)


def _of_unit(scales: Mapping[str, TimeScale], unit: Unit) -> dict[str, tuple[str, TimeScale]]:
    """{"<node>:<op>:lhs|rhs": ("site:operand", scale)}: no block name reaches a compiled function."""
    held = {}
    for name, scale in scales.items():
        site, _, operand = name.rpartition(":")
        block, _, op = site.partition("/")
        if block in unit.nodes:
            side = side_of(operand)
            held[f"{unit.nodes.index(block)}:{op}:{side}"] = (name, scale)
    return dict(sorted(held.items()))


def _working_set(model: Model, state: QuantState, full: Stream, unit: Unit, held) -> dict:
    own = {name: state.quant[name] for name in unit.nodes if name in state.quant}
    params, _ = fold_weights({n: model.params[n] for n in unit.nodes if n in model.params}, own)
    trainable = {key: scale.layers for key, (_, scale) in held.items()}
    work = {
        "trainable": trainable,
        "optimizer": optax.scale_by_adam().init(trainable),
        "frozen": {
            "params": subtrees(params, unit),
            "quant": only_activations(subtrees(own, unit)),
            "scales": {key: scale for key, (_, scale) in held.items()},
        },
        "data": {
            "inputs": tuple(full.values[n] for n in unit.inputs),
            "targets": tuple(full.values[n] for n in unit.outputs),
            "ctx": full.ctx,
        },
    }
    # Copies: the working set is given up to the step, and must share no buffer with the model.
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), work)


def insert_rows(
    quant: Sequence[Mapping],
    scales: Mapping[str, TimeScale],
    layers: Mapping[str, Layers],
    t: jax.Array,
    key: jax.Array,
    dropout: float,
) -> tuple[dict, ...]:
    """A unit's trees with each sample's quantizer, as the layers predict it for its t [B]."""
    flat = [flatten_sites(tree) for tree in quant]
    for i, (name, scale) in enumerate(scales.items()):
        node, op, side = name.split(":")
        drop_key = jax.random.fold_in(key, i)
        rows = qparams_at(scale, t, layers=layers[name], dropout_key=drop_key, dropout=dropout)
        flat[int(node)][op] = flat[int(node)][op].replace(**{side: rows})
    return tuple(nest_sites(tree) for tree in flat)


@functools.lru_cache(maxsize=512)
def _make_step(signature: Signature, p: float, dropout: float, weight_decay: float):
    adam = optax.scale_by_adam()

    def objective(layers, frozen, batch, key):
        ctx = batch["ctx"]
        quant = insert_rows(frozen["quant"], frozen["scales"], layers, ctx.t, key, dropout)
        outputs = apply_unit(signature, frozen["params"], select(quant, ctx), batch["inputs"])
        return sum_of_outputs(outputs, batch["targets"], p)

    def step(carry, inputs):
        rows, lr, key_data = inputs
        batch = jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), carry["data"])
        key = jax.random.wrap_key_data(key_data)
        value, gradients = jax.value_and_grad(objective)(
            carry["trainable"], carry["frozen"], batch, key
        )
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = adam.update(gradients, carry["optimizer"])
        trainable = jax.tree.map(
            lambda w, u: w - lr * (u + weight_decay * w), carry["trainable"], updates
        )
        return {**carry, "trainable": trainable, "optimizer": optimizer}, value

    return step


def step_inputs(config, key: jax.Array, size: int, unit: int, start: int, stop: int):
    """(rows [n, batch], rates [n], key data [n, 2]) of steps start..stop-1: functions of the state's
    key, the unit's position and the step's number alone. config: steps, batch_size, lr."""
    seed = np.asarray(jax.random.key_data(key)).astype(np.uint32).reshape(-1).tolist()
    rows = np.empty((stop - start, config.batch_size), np.int32)
    keys = np.empty((stop - start, 2), np.uint32)
    for i, step in enumerate(range(start, stop)):
        generator = np.random.default_rng([*seed, unit, step])
        rows[i] = generator.choice(size, config.batch_size, replace=size < config.batch_size)
        keys[i] = generator.integers(0, 2**32, 2, np.uint32)
    rates = config.lr * 0.5 * (1.0 + np.cos(np.pi * np.arange(start, stop) / config.steps))
    return rows, rates.astype(np.float32), keys


def _result(trainable: Mapping[str, Layers], losses: Sequence[float]) -> dict:
    """What a unit leaves behind; the layers lie under "scales", a key and two numbers each."""
    window = max(1, len(losses) // 20)
    arrays = {
        f"{key}|{i}|{j}": np.asarray(leaf)
        for key, layers in jax.device_get(trainable).items()
        for i, layer in enumerate(layers)
        for j, leaf in enumerate(layer)
    }
    first, last = (
        float(np.mean(part)) if len(losses) else None
        for part in (losses[:window], losses[-window:])
    )
    return {"codes": {}, "scales": arrays, "report": {"first_loss": first, "last_loss": last}}


def _layers_of(arrays: Mapping[str, np.ndarray]) -> dict[str, Layers]:
    names = sorted({key.split("|")[0] for key in arrays})
    count = 1 + max(int(key.split("|")[1]) for key in arrays)
    return {
        name: tuple(
            tuple(jnp.asarray(arrays[f"{name}|{i}|{j}"]) for j in (0, 1)) for i in range(count)
        )
        for name in names
    }
