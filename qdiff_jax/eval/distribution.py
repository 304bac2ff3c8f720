"""What one number each says of many images: nearness to real ones, fidelity, coverage, obedience.

Everything here works on features and logits of one network, so memory is N x D floats and no image. A
value stands beside its interval over samples and, for a distance, beside its floor: the distance of
as many real images of another split to the same reference, below which no model can be told from the
data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.eval.frechet import moments_distance
from qdiff_jax.eval.intervals import Interval, frechet_interval, mean_interval
from qdiff_jax.eval.kid import kernel_inception_distance
from qdiff_jax.eval.moments import moments_of
from qdiff_jax.eval.precision_recall import precision_recall


class Described(NamedTuple):
    """A set of images as a network sees it. features: [N, D] float32. logits: [N, K] float32, or None
    for a network without. labels: [N] int32, what was asked for or is true; -1 where unknown."""

    features: np.ndarray
    logits: np.ndarray | None
    labels: np.ndarray


def describe(
    apply: Callable[[jax.Array], dict],
    prepare: Callable[[np.ndarray], Any],
    shards: Iterable[tuple[np.ndarray, np.ndarray]],
    batch: int = 250,
) -> Described:
    """Features of a stream of (uint8 images [n, H, W, C], labels [n]); holds one shard of images.

    apply: jitted, prepared images -> {"pool": [B, D], and "logits": [B, K] where there are any}.
    prepare: uint8 images -> what the network takes. Batches are filled up to one size, so that the
    network compiles once. Raises ValueError for an empty stream.
    """
    features, logits, labels = [], [], []
    for images, asked in shards:
        labels.append(np.asarray(asked, np.int32))
        for first in range(0, len(images), batch):
            part = images[first : first + batch]
            padded = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
            out = apply(jnp.asarray(prepare(padded)))
            features.append(np.asarray(out["pool"], np.float32)[: len(part)])
            if "logits" in out:
                logits.append(np.asarray(out["logits"], np.float32)[: len(part)])
    if not features:
        raise ValueError("describe was given no images; sample some first.")
    return Described(
        np.concatenate(features),
        np.concatenate(logits) if logits else None,
        np.concatenate(labels),
    )


def class_agreement(described: Described) -> Interval:
    """Share of images that the network puts into the class that was asked for, with its interval.

    Raises ValueError without logits or labels.
    """
    if described.logits is None or (described.labels < 0).any():
        raise ValueError("class agreement needs a network with logits and a label for every image.")
    right = np.argmax(described.logits, axis=1) == described.labels
    return mean_interval(right.astype(np.float64))


def measure(
    generated: Described,
    reference: Described,
    floor: Described | None,
    *,
    k: int = 3,
    kid_subsets: int = 50,
    kid_subset_size: int = 1000,
) -> dict[str, dict]:
    """All distribution metrics of `generated` against `reference`, as JSON values by name.

    floor: real images of another split, as the yardstick of the distances; at most as many as are
    generated are used. Each entry has `value`, `low` and `high` (95 %), distances also `floor`.
    Precision and recall take at most as many reference images as the larger set demands: all.
    """
    moments = moments_of(reference.features)
    distance = frechet_interval(generated.features, moments)
    result = {"frechet": _entry(distance)}
    size = min(kid_subset_size, len(generated.features), len(reference.features))
    options = {"subsets": kid_subsets, "subset_size": size}
    kid = kernel_inception_distance(generated.features, reference.features, **options)
    result["kernel"] = {"value": float(kid.mean), **_spread(kid.mean, kid.std, kid_subsets)}
    if floor is not None:
        real = floor.features[: len(generated.features)]
        result["frechet"]["floor"] = moments_distance(moments_of(real), moments)
        result["frechet"]["floor_n"] = len(real)
        lowest = kernel_inception_distance(real, reference.features, **options)
        result["kernel"]["floor"] = float(lowest.mean)
    shares = precision_recall(generated.features, reference.features, k=k)
    for name, inside in (
        ("precision", shares.generated_inside),
        ("recall", shares.real_inside),
    ):
        result[name] = _entry(mean_interval(inside.astype(np.float64)))
    if generated.logits is not None and (generated.labels >= 0).all():
        result["class_agreement"] = _entry(class_agreement(generated))
        result["class_agreement"]["real"] = class_agreement(reference).estimate
    return result


def _entry(interval: Interval) -> dict:
    return {"value": interval.estimate, "low": interval.low, "high": interval.high}


def _spread(mean: float, std: float, subsets: int) -> dict:
    half = 1.96 * float(std) / np.sqrt(subsets)
    return {"low": float(mean) - half, "high": float(mean) + half}
