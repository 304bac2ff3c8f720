"""What a network is trained on and what its training is judged on: two parts of a set, no row in both."""

from __future__ import annotations

import jax
import numpy as np

from qdiff_jax.observe.selectors import CalibrationSet, gather
from qdiff_jax.observe.trajectory import Trajectory
from qdiff_jax.stages.noising import Images


def split_trajectories(
    key: jax.Array, trajectory: Trajectory, states: int
) -> tuple[CalibrationSet, CalibrationSet]:
    """(training, held out): all recorded states, of both branches, but for those of the last samples.

    Whole trajectories are held out, because neighbouring states of one are nearly the same: as many as have
    `states` states, at most a quarter of them. Both sets are shuffled by the key. Raises ValueError
    for a single trajectory, which cannot be split.
    """
    samples = np.unique(trajectory.sample)
    if len(samples) < 2:
        raise ValueError(
            f"{len(samples)} trajectory is recorded, and training needs one to learn from and another to be "
            "judged on; record more (calibration.samples)."
        )
    of_each = len(trajectory.t) * len(np.unique(trajectory.branch))
    count = min(-(-states // of_each), max(1, len(samples) // 4))
    held = np.isin(trajectory.sample, samples[-count:])
    sets = []
    for i, rows in enumerate((np.flatnonzero(~held), np.flatnonzero(held))):
        position, row = np.meshgrid(np.arange(len(trajectory.t)), rows, indexing="ij")
        sets.append(gather(jax.random.fold_in(key, i), trajectory, position.ravel(), row.ravel()))
    return sets[0], sets[1]


def split_images(images: Images, count: int) -> tuple[Images, Images]:
    """(training, held out): `count` images, at most a quarter, are held out, drawn with a fixed seed because
    files may be in the order of their classes. Raises ValueError for a single image."""
    total = len(images.images)
    if total < 2:
        raise ValueError(
            "one image cannot be both trained on and held out; give data.source more images."
        )
    order = np.random.default_rng(0).permutation(total)
    count = min(count, max(1, total // 4))
    parts = (np.sort(order[count:]), np.sort(order[:count]))
    labels = images.labels
    return tuple(
        images._replace(images=images.images[rows], labels=None if labels is None else labels[rows])
        for rows in parts
    )
