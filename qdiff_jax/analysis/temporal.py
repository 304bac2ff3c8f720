"""Temporal features: how they differ by timestep, and which timestep a quantized one resembles.

TFMQ-DM (Huang et al. 2024): the embedding that tells a block how noisy its input is turns under
quantization, and may come to resemble the embedding of another timestep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from qdiff_jax.analysis.subject import Subject
from qdiff_jax.eval.temporal import temporal_agreement
from qdiff_jax.eval.variant import temporal_features
from qdiff_jax.models.program import temporal_nodes
from qdiff_jax.quant.timed import TimeIndexed


class TemporalInformation(NamedTuple):
    """R timesteps ascending, P projections (one per block that is told the time).

    verdict: neighbour_cosine and far_cosine, the mean cosine similarity of full-precision features of
    neighbouring timesteps and of those at least half the schedule apart; for each variant
    "<name>/error" (mean 1 - cos to full precision), "<name>/mismatch" (share of features nearer to
    another timestep) and "<name>/shift" (mean |t' - t| in timesteps).
    cosine: [Q, Q] at timesteps[::stride], mean over projections. error: variant -> [R], 1 - cos, mean
    over projections. shift: variant -> [P, R], t' - t of the nearest full-precision feature.
    """

    verdict: dict
    timesteps: np.ndarray
    projections: tuple[str, ...]
    stride: int
    cosine: np.ndarray
    error: dict[str, np.ndarray]
    shift: dict[str, np.ndarray]


def grid_for(subject: Subject, variants: Mapping[str, dict], count: int = 500) -> np.ndarray:
    """At most `count` evenly spaced timesteps, or the sampler's own where a variant has step tables.

    A table knows the sampler's timesteps only; between them its quantizer does not exist.
    """
    temporal = temporal_nodes(subject.model.program)
    held = [v["quant"].get(name, {}) for v in variants.values() for name in temporal]
    leaves = jax.tree.leaves(held, is_leaf=lambda node: isinstance(node, TimeIndexed))
    if any(isinstance(leaf, TimeIndexed) for leaf in leaves):
        return np.asarray(subject.trajectory.t)
    last = subject.schedule.num_timesteps - 1
    return np.unique(np.round(np.linspace(0, last, min(count, last + 1)))).astype(np.float32)


def temporal_information(
    subject: Subject, variants: Mapping[str, dict], timesteps: np.ndarray
) -> TemporalInformation:
    """Temporal features of the model and its variants ({name: variables}) at `timesteps` [R].

    Variants with step tables need the sampler's timesteps (see `grid_for`). Taken for `subject.feature_class`.
    """
    model = subject.model
    full = temporal_features(model, model.params, {}, timesteps, subject.feature_class)
    units = {}
    for name, rows in full.items():
        rows = rows.astype(np.float64)
        units[name] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = np.mean([u @ u.T for u in units.values()], axis=0)
    apart = np.abs(timesteps[:, None] - timesteps[None, :])
    far = apart >= 0.5 * (timesteps.max() - timesteps.min())
    verdict = {
        "neighbour_cosine": float(np.mean(np.diagonal(cosine, 1))),
        "far_cosine": float(np.mean(cosine[far])),
    }
    error, shift = {}, {}
    stride = -(-len(timesteps) // 100)  # all that a picture shows, and the numbers stay small
    for name, variables in variants.items():
        quantized = temporal_features(
            model, variables["params"], variables["quant"], timesteps, subject.feature_class
        )
        agreement = temporal_agreement(full, quantized)
        error[name] = agreement.cosine_rows
        shift[name] = np.stack([timesteps[agreement.nearest[p]] - timesteps for p in full])
        verdict[f"{name}/error"] = agreement.cosine
        verdict[f"{name}/mismatch"] = agreement.mismatch
        verdict[f"{name}/shift"] = float(np.abs(shift[name]).mean())
    return TemporalInformation(
        verdict,
        np.asarray(timesteps),
        tuple(full),
        stride,
        cosine[::stride, ::stride],
        error,
        shift,
    )
