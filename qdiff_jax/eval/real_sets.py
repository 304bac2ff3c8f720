"""Real images as a network sees them, with their labels: made in one pass over the source, and cached.

Where `reference.reference_statistics` keeps moments and some pooled features, this keeps what `described` does,
which the nearest neighbours, the kernel distance and the accuracy on real images need: N x D floats
and no image. A file of the cache is found again only for the same content, preparation, network, weights and
resizing rule.
"""

import hashlib
import io
import json
import pathlib
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from qdiff_jax.eval.described import Described, Spatial, describe
from qdiff_jax.eval.files import write_atomic
from qdiff_jax.eval.moments import Moments
from qdiff_jax.eval.real_images import labelled_stream
from qdiff_jax.eval.reference import Origin, cached_file, origin_of


class RealSet(NamedTuple):
    """described: features, classes and labels. origin: where they come from. digest: sha256 of the pixels as
    they were prepared, in their order."""

    described: Described
    origin: Origin
    digest: str


def real_set(
    network: Any,
    prepare: Callable[[np.ndarray], Any],
    source: str,
    split: str = "train",
    *,
    tool: str = "",
    crop: str | None = None,
    size: int | None = None,
    limit: int | None = None,
    cache: str | pathlib.Path | None = None,
    batch: int = 64,
) -> RealSet:
    """What a network sees of a set of real images, from the cache if it is there.

    Args:
      network: has `name`, `fingerprint` (of its weights) and `apply`.
      prepare: uint8 images -> the network's input, by the rule of `tool`, its name.
      source, split, crop, size, limit: see `real_images.labelled_stream`.
      cache: folder of `real_<fingerprint>.npz` files, or None.
      batch: images a step.

    Raises ValueError for a source that cannot be read or a damaged cache file.
    """
    origin = origin_of(source, split, network, tool, crop, size)
    path = None
    if cache is not None:
        path = cached_file(cache, "real", origin, source, split, limit)
        if path.exists():
            return _load(path)
    digest = hashlib.sha256()

    def seen() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        stream = labelled_stream(source, split, crop=crop, size=size, limit=limit, batch=batch)
        for images, labels in stream:
            digest.update(np.ascontiguousarray(images))
            yield images, labels

    described = describe(network.apply, prepare, seen(), batch=batch)
    origin = origin._replace(count=len(described.labels))
    found = RealSet(described, origin, digest.hexdigest())
    if path is not None:
        _save(path, found)
    return found


def _save(path: pathlib.Path, found: RealSet) -> None:
    one = found.described
    arrays = {"features": one.features, "labels": one.labels, "digest": np.array(found.digest)}
    arrays["origin"] = np.array(json.dumps(found.origin._asdict()))
    if one.predicted is not None:
        arrays["predicted"] = one.predicted
    if one.spatial is not None:
        moments, kept = one.spatial
        arrays |= {"n": np.array(moments.n), "mean": moments.mean, "scatter": moments.scatter}
        arrays["kept"] = kept
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


def _load(path: pathlib.Path) -> RealSet:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            spatial = None
            if "kept" in stored.files:
                moments = Moments(int(stored["n"]), stored["mean"], stored["scatter"])
                spatial = Spatial(moments, stored["kept"])
            predicted = stored["predicted"] if "predicted" in stored.files else None
            return RealSet(
                Described(stored["features"], stored["labels"], predicted, spatial),
                Origin(**json.loads(str(stored["origin"]))),
                str(stored["digest"]),
            )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"the cached features {path} are damaged ({error}); delete the file: it will be made anew."
        ) from error
