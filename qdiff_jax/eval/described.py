"""A set of images as a network sees it, streamed: what of it is kept, and what becomes sums.

Only the pooled features are kept, N x D floats, which precision, recall and the kernel distance need. Spatial
features become moments, and logits the sums of the inception score and one class, as they come; no image is
held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from qdiff_jax.eval.extract import Features, feature_batches
from qdiff_jax.eval.inception_score import (
    ScoreState,
    empty_groups,
    grouped_index,
    split_index,
)
from qdiff_jax.eval.inception_score import update as update_score
from qdiff_jax.eval.intervals import Interval, mean_interval
from qdiff_jax.eval.moments import Moments, init, merge, moments_of
from qdiff_jax.eval.tools import find_tool

# Groups of samples whose sums are kept for the score's jackknife.
GROUPS = 20
# Spatial features of so many images, drawn at random, are kept: they give the spread of the distance, and all
# of the features where there are no more. 81 MB in Inception.
SPATIAL_KEPT = 10_000


class Spatial(NamedTuple):
    """moments: of all spatial features. kept: [K, S] float32, K of them at random, all in order if N <=
    SPATIAL_KEPT."""

    moments: Moments
    kept: np.ndarray


class Described(NamedTuple):
    """A set of images as a network sees it.

    Attributes:
      features: [N, D] float32, pooled.
      labels: [N] int32, asked for or true; -1 where unknown.
      predicted: [N] int32, the largest logit; None for a network without.
      spatial: None for a network without.
      score: sums of the class posteriors, by split of `tool` and group; None where not asked for.
      tool: whose splits those are.
    """

    features: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray | None = None
    spatial: Spatial | None = None
    score: ScoreState | None = None
    tool: str = ""


def describe(
    apply: Callable[[jax.Array], dict],
    prepare: Callable[[np.ndarray], Any],
    shards: Iterable[tuple[np.ndarray, np.ndarray]],
    batch: int = 64,
    *,
    tool: str = "",
    count: int | None = None,
    mesh: Mesh | None = None,
) -> Described:
    """What a network sees of a stream of (uint8 images [n, H, W, C], labels [n]), one shard at a time.

    Args:
      apply, prepare, batch, mesh: as in `extract.feature_batches`.
      shards: the stream.
      tool, count: as in `gather`, of the generated images.

    Raises ValueError for an empty stream, and as `gather` does.
    """
    labels = []

    def images():
        for part, asked in shards:
            labels.append(np.asarray(asked, np.int32))
            yield part

    batches = feature_batches(apply, prepare, images(), batch=batch, mesh=mesh)
    found = gather(batches, tool=tool, count=count)
    return found._replace(labels=np.concatenate(labels))


def gather(
    batches: Iterable[Features], labels=None, *, tool: str = "", count: int | None = None
) -> Described:
    """`Described` from a stream of {"pool": [b, D], and what else the network has of "spatial", "logits",
    "logits_unbiased"}.

    Args:
      batches: the stream, floating.
      labels: [N]; None where unknown.
      tool: sum the class posteriors by the splits of this key of `tools.TOOLS`.
      count: how many images there are, which decides the splits; with `tool`.

    Raises ValueError for an empty stream or another number of images than `count`.
    """
    row = find_tool(tool) if tool else None
    place = None
    if row is not None and row.score is not None and count is not None:
        place = grouped_index(split_index(count, **row.score), GROUPS)
    pool, predicted, seen = [], [], 0
    spatial, score, pending = None, None, []
    rng = np.random.default_rng(0)
    for one in batches:
        size = len(one["pool"])
        pool.append(np.asarray(one["pool"], np.float32))
        if "logits" in one:
            predicted.append(np.argmax(one["logits"], axis=1).astype(np.int32))
        logits = one.get("logits_unbiased", one.get("logits"))
        if place is not None and logits is not None:
            if score is None:
                score = empty_groups(place, GROUPS, logits.shape[1])
            _check_count(seen + size <= count, count)
            score = update_score(score, logits, place[seen : seen + size])
        if "spatial" in one:
            spatial = _keep(spatial, one["spatial"], seen, rng)
            pending, spatial = _add(pending + [one["spatial"]], spatial, 4096)
        seen += size
    if not seen:
        raise ValueError("there are no images to describe; check the source.")
    _check_count(count is None or seen == count, count)
    if spatial is not None:
        _, spatial = _add(pending, spatial, 1)
        spatial = spatial._replace(kept=spatial.kept[:seen])
    return Described(
        np.concatenate(pool),
        np.full((seen,), -1, np.int32) if labels is None else np.asarray(labels, np.int32),
        np.concatenate(predicted) if predicted else None,
        spatial,
        score,
        "" if score is None else tool,
    )


def class_agreement(described: Described) -> Interval:
    """Share of images that the network puts into the class that was asked for, with its interval.

    Raises ValueError without logits or labels.
    """
    if described.predicted is None or (described.labels < 0).any():
        raise ValueError("class agreement needs a network with logits and a label for every image.")
    return mean_interval((described.predicted == described.labels).astype(np.float64))


def _keep(spatial: Spatial | None, batch, seen: int, rng) -> Spatial:
    """Vitter's reservoir: after any number of batches every vector is kept with the same probability."""
    if spatial is None:
        spatial = Spatial(
            init(batch.shape[1]), np.empty((SPATIAL_KEPT, batch.shape[1]), np.float32)
        )
    number = seen + np.arange(len(batch))
    place = np.where(number < SPATIAL_KEPT, number, rng.integers(0, number + 1))
    for row in np.flatnonzero(place < SPATIAL_KEPT):  # in order: a later one replaces an earlier
        spatial.kept[place[row]] = batch[row]
    return spatial


def _add(pending: list, spatial: Spatial, least: int) -> tuple[list, Spatial]:
    """Into the moments, in blocks large enough that their matrices are made seldom."""
    if sum(map(len, pending)) < least:
        return pending, spatial
    whole = np.concatenate(pending)
    return [], spatial._replace(moments=merge(spatial.moments, moments_of(whole)))


def _check_count(holds: bool, count: int | None) -> None:
    if not holds:
        raise ValueError(f"there are not the {count} images that were announced; check the count.")
