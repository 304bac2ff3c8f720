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
import numpy as np

from qdiff_jax.eval.extract import all_features, feature_batches
from qdiff_jax.eval.frechet import frechet_infinity, moments_distance
from qdiff_jax.eval.inception_score import inception_score
from qdiff_jax.eval.intervals import (
    Interval,
    frechet_bootstrap,
    frechet_interval,
    mean_interval,
)
from qdiff_jax.eval.kid import kernel_influence, mmd2
from qdiff_jax.eval.moments import moments_of
from qdiff_jax.eval.precision_recall import precision_recall
from qdiff_jax.eval.tools import find_tool

_LAYERS = ("pool", "spatial", "logits", "logits_unbiased")


class Described(NamedTuple):
    """A set of images as a network sees it. layers: {"pool": [N, D], and what else it has of "spatial",
    "logits", "logits_unbiased"}, float32. labels: [N] int32, asked for or true; -1 where unknown."""

    layers: dict[str, np.ndarray]
    labels: np.ndarray

    @property
    def features(self) -> np.ndarray:
        return self.layers["pool"]


def describe(
    apply: Callable[[jax.Array], dict],
    prepare: Callable[[np.ndarray], Any],
    shards: Iterable[tuple[np.ndarray, np.ndarray]],
    batch: int = 64,
) -> Described:
    """What a network sees of a stream of (uint8 images [n, H, W, C], labels [n]), one shard at a time.

    apply, prepare, batch: as in `extract.feature_batches`. Raises ValueError for an empty stream.
    """
    labels = []

    def images():
        for part, asked in shards:
            labels.append(np.asarray(asked, np.int32))
            yield part

    batches = feature_batches(apply, prepare, images(), batch=batch)
    found = all_features({k: v for k, v in one.items() if k in _LAYERS} for one in batches)
    return Described(found, np.concatenate(labels))


def class_agreement(described: Described) -> Interval:
    """Share of images that the network puts into the class that was asked for, with its interval.

    Raises ValueError without logits or labels.
    """
    logits = described.layers.get("logits")
    if logits is None or (described.labels < 0).any():
        raise ValueError("class agreement needs a network with logits and a label for every image.")
    right = np.argmax(logits, axis=1) == described.labels
    return mean_interval(right.astype(np.float64))


def measure(
    generated: Described,
    reference: Described,
    floor: Described | None,
    *,
    tool: str = "",
    k: int = 3,
    extrapolate: bool = False,
) -> dict[str, dict]:
    """All distribution metrics of `generated` against `reference`, as JSON values by name.

    floor: real images of another split, the yardstick of the distances; as many of them as are
    generated, if there are. tool: by whose conventions (`tools.TOOLS`); "" for exact float32 manifolds
    with k neighbours. Each entry has `value`, `low`, `high` (95 %); a distance also `floor`, class
    agreement also `real`, the accuracy on the reference. "score" comes with its splits' spread.
    extrapolate: also the Frechet distance at infinitely many samples, with the interval's width of the
    distance at all of them.
    """
    row = find_tool(tool) if tool else None
    result = {}
    for name, layer in (("frechet", "pool"), ("spatial_frechet", "spatial")):
        if layer in generated.layers and (layer == "pool" or row is None or row.spatial):
            parts = [set_ and set_.layers[layer] for set_ in (generated, reference, floor)]
            result[name] = _distance(*parts)
    if extrapolate:
        found = frechet_infinity(
            generated.features,
            moments_of(reference.features),
            smallest=len(generated.features) // 2,
        )
        shift = found.distance - result["frechet"]["value"]
        result["frechet_infinity"] = {
            "value": found.distance,
            "low": result["frechet"]["low"] + shift,
            "high": result["frechet"]["high"] + shift,
        }
    result["kernel"] = _kernel(generated, reference, floor)
    logits = generated.layers.get("logits_unbiased", generated.layers.get("logits"))
    if row is not None and row.score is not None and logits is not None:
        score = inception_score(logits, **row.score)
        half = 1.96 * score.std / np.sqrt(max(len(score.splits), 1))
        result["score"] = {"value": score.mean, "low": score.mean - half, "high": score.mean + half}
    manifold = row.manifold if row is not None and row.manifold is not None else {"k": k}
    shares = precision_recall(generated.features, reference.features, **manifold)
    for name, inside in (
        ("precision", shares.generated_inside),
        ("recall", shares.real_inside),
    ):
        result[name] = _entry(mean_interval(inside.astype(np.float64)))
    if "logits" in generated.layers and (generated.labels >= 0).all() and not tool:
        result["class_agreement"] = _entry(class_agreement(generated))
        result["class_agreement"]["real"] = class_agreement(reference).estimate
    return result


def _distance(generated, reference, floor) -> dict:
    moments = moments_of(reference)
    interval = frechet_interval if len(generated) > generated.shape[1] else frechet_bootstrap
    entry = _entry(interval(generated, moments))
    if floor is not None:
        real = floor[: len(generated)]
        entry |= {"floor": moments_distance(moments_of(real), moments), "floor_n": len(real)}
    return entry


def _kernel(generated: Described, reference: Described, floor: Described | None) -> dict:
    value = mmd2(generated.features, reference.features)
    around = mean_interval(kernel_influence(generated.features, reference.features))
    entry = {"value": value, "low": value + around.low, "high": value + around.high}
    if floor is not None:
        real = floor.features[: len(generated.features)]
        entry |= {"floor": mmd2(real, reference.features), "floor_n": len(real)}
    return entry


def _entry(interval: Interval) -> dict:
    return {"value": interval.estimate, "low": interval.low, "high": interval.high}
