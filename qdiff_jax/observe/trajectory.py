"""Sampling trajectories, the source of calibration and distillation data.

Post-training quantization of a diffusion model calibrates on states met while *denoising from
noise* with the sampler of the evaluation, never on noised real images (PTQ4DM, Shang et al. 2023,
section 4). One pass of the sampler gives the states of every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh

from qdiff_jax.diffusion.guidance import Guidance, Predict, branches, null_labels
from qdiff_jax.diffusion.hooks import IDENTITY, Hooks
from qdiff_jax.diffusion.sample import sample
from qdiff_jax.diffusion.samplers import SamplerPlan


@struct.dataclass
class Trajectory:
    """States and outputs of a network along its own sampling, on the host (NumPy).

    A row is one sample in one branch of the guidance: N rows without guidance or with a single
    branch, 2N with two, where rows 2i and 2i + 1 are the conditional and the unconditional
    evaluation of sample i on the same state. Position s is the s-th recorded step in **ascending**
    order of timestep.

    x: [S, rows, ...] float32, network inputs. t: [S] float32. index: [S] int32, the sampler's step
    index (equal to the position when every step was recorded). y: None or leaves [rows, ...], the
    labels the row was evaluated with. eps: [S, rows, ...] float32, the raw outputs, before guidance
    and corrections. branch: [rows] int32, 0 conditional, 1 unconditional. sample: [rows] int64, the
    global sample index.
    """

    x: np.ndarray
    t: np.ndarray
    index: np.ndarray
    y: Any
    eps: np.ndarray
    branch: np.ndarray
    sample: np.ndarray


def record_trajectories(
    predict: Predict,
    variables: Any,
    plan: SamplerPlan,
    key: jax.Array,
    indices: Sequence[int] | np.ndarray,
    *,
    shape: tuple[int, ...] | None = None,
    noise: Any = None,
    y: Any = None,
    guidance: Guidance | None = None,
    hooks: Hooks = IDENTITY,
    steps: Sequence[int] | None = None,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] | None = None,
    mesh: Mesh | None = None,
    scan: bool | None = None,
) -> Trajectory:
    """Runs the sampler and keeps what the network saw and said.

    steps: the step indices to keep, None for all: what is not kept is freed after each batch. The
    other arguments, and what raises, are those of `diffusion.sample.sample`. With a quantized
    network and its hooks this gives the trajectories of the quantized sampler.
    """
    record = sample(
        predict,
        variables,
        plan,
        key,
        indices,
        shape=shape,
        noise=noise,
        y=y,
        guidance=guidance,
        hooks=hooks,
        record=True if steps is None else steps,
        batch_size=batch_size,
        on_batch=on_batch,
        mesh=mesh,
        scan=scan,
    ).record
    visited = branches(guidance)
    total = len(indices)
    labels = [null_labels(guidance, y) if branch else y for branch in visited]
    return Trajectory(
        x=np.repeat(record.x, len(visited), axis=1),
        t=record.t,
        index=record.index,
        y=jax.tree.map(_as_rows, *labels),
        eps=record.eps.reshape((len(record.t), -1, *record.eps.shape[3:])),
        branch=np.tile(np.asarray(visited, np.int32), total),
        sample=np.repeat(np.asarray(indices, np.int64), len(visited)),
    )


def _as_rows(*per_branch: Any) -> np.ndarray:
    pairs = np.stack([np.asarray(leaf) for leaf in per_branch], axis=1)
    return pairs.reshape((-1, *pairs.shape[2:]))
