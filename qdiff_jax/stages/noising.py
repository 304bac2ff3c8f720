"""Training data of the diffusion loss: images noised to a random step, the noise as the target."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.diffusion.schedule import NoiseSchedule, q_sample
from qdiff_jax.observe.selectors import CalibrationSet


class Noising(NamedTuple):
    """How an image becomes a training example. null_class: what a label becomes with probability
    `label_dropout`, None to keep labels as they are."""

    schedule: NoiseSchedule
    null_class: int | None = None
    label_dropout: float = 0.1


class Images(NamedTuple):
    """Real images to train on, noised anew at every step. images: [N, H, W, C] float32 in [-1, 1].
    labels: [N] int32, None for an unconditional model."""

    images: np.ndarray
    noising: Noising
    labels: np.ndarray | None = None


def noised(key: jax.Array, noising: Noising, images: jax.Array, labels: jax.Array | None) -> dict:
    """{"x", "t" float32, "y", "eps_fp" the noise} of images [B, H, W, C], each at a uniform t.

    Source: Ho et al. 2020, equation 14; labels are dropped as in Ho and Salimans 2022, algorithm 1.
    """
    count = len(images)
    t_key, noise_key, label_key = jax.random.split(key, 3)
    t = jax.random.randint(t_key, (count,), 0, noising.schedule.num_timesteps)
    noise = jax.random.normal(noise_key, images.shape)
    if labels is not None and noising.null_class is not None:
        drop = jax.random.bernoulli(label_key, noising.label_dropout, (count,))
        labels = jnp.where(drop, noising.null_class, labels).astype(jnp.int32)
    x = q_sample(noising.schedule, jnp.asarray(images, jnp.float32), t, noise)
    return {"x": x, "t": t.astype(jnp.float32), "y": labels, "eps_fp": noise}


def noised_set(
    key: jax.Array,
    schedule: NoiseSchedule,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    null_class: int | None = None,
    label_dropout: float = 0.1,
) -> CalibrationSet:
    """Images [N, H, W, C] in [-1, 1] as a fixed set, each noised once; arguments as in `noised`."""
    made = noised(key, Noising(schedule, null_class, label_dropout), images, labels)
    x, t, eps = (np.asarray(made[name]) for name in ("x", "t", "eps_fp"))
    y = None if labels is None else np.asarray(made["y"])
    unknown, zeros = np.full(len(x), -1, np.int32), np.zeros(len(x), np.int32)
    return CalibrationSet(x, t, unknown, zeros, y, eps)
