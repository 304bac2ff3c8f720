"""Training steps over the network as a whole, as a stage that survives a kill between any two chunks."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qdiff_jax.runtime.loop import run_steps
from qdiff_jax.stages.partial import KEPT, resume_partial, save_partial
from qdiff_jax.stages.resume_settings import check_settings
from qdiff_jax.stages.stage import QuantState, Stage


class Carry(NamedTuple):
    """work: {"trainable", "optimizer", "frozen", "data"}, the carry of the steps. fixed: what they read
    beside it, None for nothing. program: the step and `inputs`, of which `step_memory` asks."""

    state: QuantState
    work: dict
    step: int
    losses: tuple[float, ...]
    saved: float
    store: pathlib.Path | None
    fixed: Any = None
    program: tuple[Callable, Callable] | None = None


def train_whole(
    name: str,
    steps: int,
    begin: Callable[[QuantState], tuple],
    inputs: Callable[[QuantState, int, int], Any],
    step: Callable,
    finish: Callable[[Carry], tuple[QuantState, dict]],
    *,
    save_seconds: float,
    optimizer: Callable[[Any], Any] | None = None,
    kept: tuple[str, ...] = KEPT,
    settings: dict | None = None,
    on_progress=None,
) -> Stage:
    """A stage of `steps` steps.

    begin(state) -> (trainable, frozen, data), or (trainable, frozen, data, fixed): of the first three the
    steps have their own copies, `fixed` is shared with whoever holds it and goes to step(work, input, fixed).
    inputs(state, first, stop): what steps first..stop-1 read, functions of the state's key and the step's
    number alone, so that a resumed run sees the same. step(work, input) -> (work, loss).
    optimizer(trainable): its state before the first step, Adam's by default; averages of the weights belong
    there too. kept: the parts of work that steps change, which are saved. settings: what all this was made
    with, by name (`resume_settings`): a middle that was saved under others is refused with ValueError. Raises
    FloatingPointError if a loss is not finite.
    """
    start = optax.scale_by_adam().init if optimizer is None else optimizer

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        if settings is not None:
            check_settings(name, _partial(store), {"steps": steps, **settings})
        trainable, frozen, data, *shared = begin(state)
        moments = start(trainable)
        work = {"trainable": trainable, "optimizer": moments, "frozen": frozen, "data": data}
        # Copies: the working set is given up to the step, and must share no buffer with the model.
        work = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), work)
        at, losses, work = resume_partial(_partial(store), steps, work, kept)
        fixed = jax.tree.map(jnp.asarray, shared[0]) if shared else None
        program = (step, inputs)
        return Carry(state, work, at, tuple(losses), time.monotonic(), store, fixed, program)

    def run(carry: Carry, n: int) -> Carry:
        stop = min(carry.step + n, steps)
        if stop == carry.step:
            return carry
        xs = inputs(carry.state, carry.step, stop)
        work, losses = run_steps(step, carry.work, xs, donate=True, fixed=carry.fixed)
        losses = np.asarray(losses).astype(float)
        if not np.isfinite(losses).all():
            raise FloatingPointError(
                f"{name}: the loss became {losses[~np.isfinite(losses)][0]} between steps {carry.step} "
                f"and {stop}; lower the learning rate or check the calibration set."
            )
        carry = carry._replace(work=work, step=stop, losses=(*carry.losses, *losses.tolist()))
        if on_progress is not None:
            on_progress(stop, steps, loss=f"{losses[-1]:.3g}")
        if carry.store is not None and time.monotonic() - carry.saved > save_seconds:
            save_partial(_partial(carry.store), stop, steps, work, carry.losses, kept)
            carry = carry._replace(saved=time.monotonic())
        return carry

    def done(carry: Carry) -> bool:
        return carry.step >= steps

    return Stage(name, init, run, finish, done, "training")


def _partial(store: pathlib.Path | None) -> pathlib.Path | None:
    return None if store is None else store / "partial"


def step_memory(carry: Carry, **compile_options) -> dict[str, int]:
    """Bytes of one step as the compiler plans them (XLA's `memory_analysis` of the compiled step, not a
    measured peak): "arguments", "temporaries" and "peak", all together with donated buffers counted once."""
    step, inputs = carry.program
    first = jax.tree.map(lambda leaf: leaf[0], inputs(carry.state, carry.step, carry.step + 1))
    given = (first,) if carry.fixed is None else (first, carry.fixed)
    lowered = jax.jit(step, donate_argnums=0).lower(carry.work, *given)
    held = lowered.compile(compile_options or None).memory_analysis()
    peak = held.argument_size_in_bytes + held.temp_size_in_bytes
    peak += held.output_size_in_bytes - held.alias_size_in_bytes
    return {
        "arguments": held.argument_size_in_bytes,
        "temporaries": held.temp_size_in_bytes,
        "peak": peak,
    }
