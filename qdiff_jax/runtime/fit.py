"""The host loop around a training step: logging, checkpoints, divergence, preemption, resuming."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging

from qdiff_jax.runtime import checkpoint
from qdiff_jax.runtime.cache import compile_account
from qdiff_jax.runtime.loop import run_steps
from qdiff_jax.runtime.preemption import preemption_notice
from qdiff_jax.runtime.progress import progress


class Diverged(RuntimeError):
    """The loss or the gradient is no number any more."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How a run is watched and kept; nothing here changes its result.

    Attributes:
      chunk: steps between two looks at the clock and at signals; one scan on an accelerator.
        Everything below happens at the end of a chunk.
      log_every, visit_every, checkpoint_every: in steps; a visit draws samples or takes accuracy.
      checkpoint_minutes: also so often, in a single process (several would not agree on the time).
      keep: checkpoints that stay.
      tensorboard: also write TensorBoard files.
    """

    chunk: int = 10
    log_every: int = 50
    visit_every: int = 1000
    checkpoint_every: int = 2000
    checkpoint_minutes: float = 5.0
    keep: int = 2
    tensorboard: bool = False

    def __post_init__(self):
        for field in ("chunk", "log_every", "visit_every", "checkpoint_every", "keep"):
            if getattr(self, field) < 1:
                raise ValueError(f"run.{field} must be at least 1, got {getattr(self, field)}.")


def fit(
    step: Callable,
    state: Any,
    load: Callable[[int, int], Any],
    *,
    start: int,
    total: int,
    run: RunConfig,
    checkpoints,
    write: Callable[[int, dict], None],
    visit: Callable[[int, Any], dict] | None = None,
    what: str = "training",
) -> tuple[Any, int]:
    """Takes steps start .. total-1, saving on the way.

    The host never waits for a single step: metrics are fetched when they are logged. State is
    donated to the steps, so the one passed in must not be used again.

    Args:
      step: (state, batch) -> (state, metrics); metrics are scalars, among them loss and grad_norm.
      state: any pytree of arrays.
      load: (first, count) -> the batches of these steps, stacked along a leading axis.
      start: number of steps the state has taken.
      total: number to reach.
      run: when to log, visit and save.
      checkpoints: folder for them.
      write: (step, values), for metrics.
      visit: (step, state) -> more metrics; called every `visit_every` steps and at the end.

    Returns:
      (state, steps taken): fewer than total if the process was asked to stop. The state is saved
      then.

    Raises:
      Diverged: a metric became NaN or infinite. Nothing is saved since the last sound checkpoint.
    """
    done, saved, saved_at = start, start, time.monotonic()
    pending: list[tuple[int, Any]] = []
    logged, logged_at = start, time.monotonic()

    def save(at: int) -> None:
        nonlocal saved, saved_at
        checkpoint.save(checkpoints, at, state, keep=run.keep)
        saved, saved_at = at, time.monotonic()

    def passed(every: int, before: int) -> bool:
        return done // every > before // every or done == total

    with (
        compile_account() as account,
        preemption_notice() as asked,
        progress(what, total, start=start) as tell,
    ):
        while done < total:
            before, count = done, min(run.chunk, total - done)
            state, metrics = run_steps(step, state, load(done, count), donate=True)
            pending.append((done, metrics))
            done += count
            shown = {}
            stop = asked(done)
            late = (
                jax.process_count() == 1
                and time.monotonic() - saved_at > 60 * run.checkpoint_minutes
            )
            saving = stop or late or passed(run.checkpoint_every, before)
            visiting = visit is not None and passed(run.visit_every, before)
            if saving or visiting or passed(run.log_every, before):
                means = _drain(pending, saved)
                now = time.monotonic()
                means["steps_per_second"] = (done - logged) / max(now - logged_at, 1e-9)
                means["compile_seconds"] = account.seconds
                logged, logged_at = done, now
                write(done, means)
                shown = {"loss": f"{means['loss']:.4f}"}
            if saving:
                save(done)
            if visiting:
                write(done, visit(done, state))
                logged_at = time.monotonic()  # the visit's time is no step's
            tell(done, **shown)
            if stop:
                logging.warning("asked to stop: saved step %d under %s.", done, checkpoints)
                break
    return state, done


def _drain(pending: list, saved: int) -> dict[str, float]:
    """Means of the metrics since the last call; raises if one of them is not finite."""
    fetched = [(first, jax.device_get(metrics)) for first, metrics in pending]
    pending.clear()
    for first, metrics in fetched:
        broken = ~np.isfinite([metrics["loss"], metrics["grad_norm"]]).all(axis=0)
        if broken.any():
            at = first + int(broken.argmax()) + 1
            kept = (
                f"the checkpoint of step {saved} is sound"
                if saved
                else "no checkpoint was made yet"
            )
            raise Diverged(
                f"the loss or gradient is not finite at step {at}; {kept}; lower the learning "
                "rate, lengthen the warm-up or use float32, in a new workdir."
            )
    names = fetched[0][1]
    count = sum(len(metrics["loss"]) for _, metrics in fetched)
    return {n: math.fsum(float(m[n].sum()) for _, m in fetched) / count for n in names}
