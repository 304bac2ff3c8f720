"""Which states of the recorded trajectories calibrate the network.

A selector is a pure function `(key, trajectory, ...options) -> CalibrationSet`; it chooses pairs of
a step and a row, and the set is shuffled with the key, because range estimators and reconstruction
read it in batches and must not meet the steps in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import struct

from qdiff_jax.observe.trajectory import Trajectory


@struct.dataclass
class CalibrationSet:
    """A flat, shuffled list of M network evaluations, on the host (NumPy).

    x: [M, ...] float32 inputs. t: [M] float32. index: [M] int32 step indices. branch: [M] int32, 0
    conditional, 1 unconditional. y: None or leaves [M, ...]. eps_fp: [M, ...] float32, the output
    of the network that made the trajectory.
    """

    x: np.ndarray
    t: np.ndarray
    index: np.ndarray
    branch: np.ndarray
    y: Any
    eps_fp: np.ndarray

    def __len__(self) -> int:
        return len(self.t)


def gather(
    key: jax.Array, trajectory: Trajectory, position: np.ndarray, row: np.ndarray
) -> CalibrationSet:
    """The evaluations (position[m], row[m]), m = 0..M-1, in an order shuffled by key."""
    order = np.asarray(jax.random.permutation(key, len(position)))
    position, row = np.asarray(position)[order], np.asarray(row)[order]
    return CalibrationSet(
        x=trajectory.x[position, row],
        t=trajectory.t[position],
        index=trajectory.index[position],
        branch=trajectory.branch[row],
        y=jax.tree.map(lambda leaf: leaf[row], trajectory.y),
        eps_fp=trajectory.eps[position, row],
    )


def _grid(
    key: jax.Array, trajectory: Trajectory, positions: np.ndarray, per_step: int | None
) -> CalibrationSet:
    """Every chosen position times every branch of the first `per_step` samples."""
    rows = len(trajectory.sample)
    branches = len(np.unique(trajectory.branch))
    available = rows // branches
    count = available if per_step is None else per_step
    if not 1 <= count <= available:
        raise ValueError(
            f"per_step={per_step} samples were asked for, but the trajectory holds {available}; "
            "record more trajectories."
        )
    position, row = np.meshgrid(positions, np.arange(count * branches), indexing="ij")
    return gather(key, trajectory, position.ravel(), row.ravel())


def uniform(key: jax.Array, trajectory: Trajectory, steps: int, per_step: int) -> CalibrationSet:
    """The first `per_step` samples of every (S // steps)-th recorded step, from the least noisy on.

    M = ceil(S / (S // steps)) * per_step * branches, which is more steps than asked for when steps
    does not divide S. Source: Q-Diffusion (Li et al. 2023), section 3.2 and its code. ValueError
    for steps outside 1..S or more samples than recorded.
    """
    recorded = len(trajectory.t)
    if not 1 <= steps <= recorded:
        raise ValueError(f"steps must lie in 1..{recorded}, the steps recorded; got {steps}.")
    return _grid(key, trajectory, np.arange(0, recorded, recorded // steps), per_step)


def every_step(
    key: jax.Array, trajectory: Trajectory, per_step: int | None = None
) -> CalibrationSet:
    """Every recorded step of the first `per_step` samples (None: all), both branches of each."""
    return _grid(key, trajectory, np.arange(len(trajectory.t)), per_step)


SELECTORS: dict[str, Callable[..., CalibrationSet]] = {
    "uniform": uniform,
    "every_step": every_step,
}


def select_calibration(
    name: str, key: jax.Array, trajectory: Trajectory, **options: Any
) -> CalibrationSet:
    """The selector `name` with its options; ValueError lists the names for another one."""
    if name not in SELECTORS:
        raise ValueError(f"unknown selector '{name}'; the names are {sorted(SELECTORS)}.")
    return SELECTORS[name](key, trajectory, **options)
