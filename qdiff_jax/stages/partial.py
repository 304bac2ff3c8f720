"""The middle of a run of training steps on disk: what is trained, the optimizer, and every loss so far."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Mapping, Sequence

import numpy as np

from qdiff_jax.runtime import checkpoint

KEPT = ("trainable", "optimizer")


def save_partial(
    folder: pathlib.Path,
    step: int,
    total: int,
    work: Mapping,
    losses: Sequence[float],
    names: Sequence[str] = KEPT,
) -> None:
    """Write the named parts of work and the losses of `step` of `total` steps, atomically."""
    padded = np.zeros(total, np.float32)
    padded[:step] = losses
    kept = {name: work[name] for name in names}
    checkpoint.save(folder, step, {**kept, "losses": padded}, keep=2)


def resume_partial(
    folder: pathlib.Path | None, total: int, work: dict, names: Sequence[str] = KEPT
) -> tuple[int, list[float], dict]:
    """(step, losses, work as it was then), or (0, [], work) if nothing was saved."""
    if folder is None or checkpoint.latest_step(folder) is None:
        return 0, [], work
    template = {name: work[name] for name in names}
    template["losses"] = np.zeros(total, np.float32)
    restored = checkpoint.restore(folder, template)
    losses = restored.tree.pop("losses")[: restored.step].tolist()
    return restored.step, losses, {**work, **restored.tree}


def partial_folder(store: pathlib.Path | None, position: int) -> pathlib.Path | None:
    """Where the unit at `position` of a walk keeps its middle; None without a store."""
    return None if store is None else store / f"unit_{position:03d}.partial"


def discard_partial(folder: pathlib.Path | None) -> None:
    """Remove what is saved there: the unit is done, and its result is kept elsewhere."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
