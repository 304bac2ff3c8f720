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


def ndtc_positions(
    key: jax.Array, steps: int, count: int, *, mean: float = 0.4, std: float = 0.4
) -> np.ndarray:
    """PTQ4DM's draws of a step: clip(floor(steps * (mean + std * n)), 0, steps - 1), n standard normal.

    [count] positions on the ascending grid. mean and std are fractions of the grid; the mean lies
    below one half, towards the image. The paper takes std 0.5, its code 0.4 for both. A sixth of the
    draws land on position 0 by clipping, which is meant: calibration near the image works best.
    Source: PTQ4DM (Shang et al. 2023), section 4.2, "normally distributed time-step calibration".
    """
    draws = np.asarray(jax.random.normal(key, (count,)), np.float64)
    return np.clip(np.floor(steps * (mean + std * draws)), 0, steps - 1).astype(np.int64)


def ndtc(
    key: jax.Array,
    trajectory: Trajectory,
    count: int | None = None,
    *,
    mean: float = 0.4,
    std: float = 0.4,
    mirror_bug: bool = False,
) -> CalibrationSet:
    """One step of every trajectory, drawn by `ndtc_positions` among the recorded steps.

    count: items, None for one per trajectory; beyond that, trajectories are gone round again. Both
    branches of guidance are taken of every item. mirror_bug: the official code compares the draw with
    a counter of the denoiser that starts at the noisiest step, so that the state of position
    S - 1 - j is paired with the timestep of position j; True repeats that.
    """
    draw, order = jax.random.split(key)
    recorded = len(trajectory.t)
    position = ndtc_positions(draw, recorded, _items(trajectory, count), mean=mean, std=std)
    chosen = _one_each(order, trajectory, position)
    if not mirror_bug:
        return chosen
    seen = _one_each(order, trajectory, recorded - 1 - position)
    return chosen.replace(x=seen.x, eps_fp=seen.eps_fp)


def random_steps(
    key: jax.Array, trajectory: Trajectory, count: int | None = None
) -> CalibrationSet:
    """One step of every trajectory, every recorded step equally likely: what NDTC is compared with.

    count: as in `ndtc`.
    """
    draw, order = jax.random.split(key)
    count = _items(trajectory, count)
    position = np.asarray(jax.random.randint(draw, (count,), 0, len(trajectory.t)))
    return _one_each(order, trajectory, position)


def one_step(
    key: jax.Array, trajectory: Trajectory, count: int | None = None, *, position: int = 0
) -> CalibrationSet:
    """Every item from one recorded step, the other baseline of NDTC (PTQ4DM, section 4.2).

    position: on the ascending grid, 0 the least noisy. count: as in `ndtc`. ValueError for a position
    that was not recorded.
    """
    recorded = len(trajectory.t)
    if not 0 <= position < recorded:
        raise ValueError(
            f"position must lie in 0..{recorded - 1}, the steps recorded; got {position}."
        )
    positions = np.full(_items(trajectory, count), position)
    return _one_each(key, trajectory, positions)


def _items(trajectory: Trajectory, count: int | None) -> int:
    available = len(np.unique(trajectory.sample))
    if count is not None and count < 1:
        raise ValueError(
            f"count is {count}; ask for at least one item, or None for one a trajectory."
        )
    return available if count is None else count


def _one_each(key: jax.Array, trajectory: Trajectory, position: np.ndarray) -> CalibrationSet:
    """Item i at position[i] of trajectory i (going round), in every branch of it."""
    branches = len(np.unique(trajectory.branch))
    sample = np.arange(len(position)) % (len(trajectory.sample) // branches)
    row = sample[:, None] * branches + np.arange(branches)[None]
    return gather(key, trajectory, np.repeat(position, branches), row.ravel())


SELECTORS: dict[str, Callable[..., CalibrationSet]] = {
    "uniform": uniform,
    "every_step": every_step,
    "ndtc": ndtc,
    "random_steps": random_steps,
    "one_step": one_step,
}


def select_calibration(
    name: str, key: jax.Array, trajectory: Trajectory, **options: Any
) -> CalibrationSet:
    """The selector `name` with its options; ValueError lists the names for another one."""
    if name not in SELECTORS:
        raise ValueError(f"unknown selector '{name}'; the names are {sorted(SELECTORS)}.")
    return SELECTORS[name](key, trajectory, **options)
