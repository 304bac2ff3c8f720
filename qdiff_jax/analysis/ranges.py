"""Activation ranges by timestep and by channel.

One range for all timesteps is the premise of static quantization; in a diffusion model the range of
an activation moves along the trajectory (PTQ4DM, Shang et al. 2023; Q-Diffusion, Li et al. 2023; TDQ,
So et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from qdiff_jax.analysis.observed import channel_ranges
from qdiff_jax.analysis.subject import Subject, is_temporal


class Ranges(NamedTuple):
    """S timesteps ascending, L activations in order of execution.

    verdict: median_ratio and largest_ratio over activations of (largest / smallest range over the
    steps), the activation of the largest, and the share of activations whose range at least doubles.
    lo, hi, width: [S, L], width = hi - lo. ratio: [L]. temporal: [L] bool, activations that depend on
    the timestep and the label alone. site: the image-dependent activation (softmax apart) that moves
    most; channels: [S, C], its largest magnitude in each channel.
    """

    verdict: dict
    timesteps: np.ndarray
    names: tuple[str, ...]
    lo: np.ndarray
    hi: np.ndarray
    width: np.ndarray
    ratio: np.ndarray
    temporal: np.ndarray
    site: str
    channels: np.ndarray


def widest_over_narrowest(width: np.ndarray) -> np.ndarray:
    """[S, L] ranges -> [L] largest / smallest over the steps; 1 where a range is always 0, inf where it
    is 0 only at times."""
    top, low = width.max(axis=0), width.min(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(top == 0, 1.0, top / low)


def activation_ranges(subject: Subject, on_step: Callable | None = None) -> Ranges:
    """Ranges of every activation of the full-precision model along its own trajectories."""
    by_channel = channel_ranges(subject, on_step)
    names = tuple(by_channel)
    lo = np.stack([by_channel[name][0].min(axis=1) for name in names], axis=1)
    hi = np.stack([by_channel[name][1].max(axis=1) for name in names], axis=1)
    width = hi - lo
    ratio = widest_over_narrowest(width)
    temporal = np.array([is_temporal(subject.model, name) for name in names])
    # Of the softmax the columns are positions, not channels: they say nothing by channel.
    shown = [
        i
        for i, name in enumerate(names)
        if not temporal[i] and by_channel[name][0].shape[1] > 1 and not name.endswith(":softmax")
    ]
    chosen = names[max(shown, key=lambda i: ratio[i])]
    widest = names[int(ratio.argmax())]
    return Ranges(
        verdict={
            "median_ratio": float(np.median(ratio)),
            "largest_ratio": float(ratio.max()),
            "largest_at": widest,
            "share_at_least_doubling": float(np.mean(ratio >= 2.0)),
        },
        timesteps=np.asarray(subject.trajectory.t),
        names=names,
        lo=lo,
        hi=hi,
        width=width,
        ratio=ratio,
        temporal=temporal,
        site=chosen,
        channels=np.maximum(np.abs(by_channel[chosen][0]), np.abs(by_channel[chosen][1])),
    )
