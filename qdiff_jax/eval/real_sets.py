"""Real images as a network sees them, with their labels: made in one pass over the source, and cached.

Where `reference.reference_statistics` keeps moments and some pooled features, this keeps every feature and
logit, which the nearest neighbours, the kernel distance and the accuracy on real images need: N x D floats
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

from qdiff_jax.eval.distribution import Described, describe
from qdiff_jax.eval.files import write_atomic
from qdiff_jax.eval.real_images import labelled_stream, source_fingerprint
from qdiff_jax.eval.reference import Origin

_LAYER = "layer_"


class RealSet(NamedTuple):
    """described: features, logits and labels. origin: where they come from. digest: sha256 of the pixels as
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
    preparation = "none" if crop is None else f"{crop} to {size}"
    origin = Origin(f"{source} {split}", network.name, network.fingerprint, tool, 0, preparation)
    path = None
    if cache is not None:
        content = source_fingerprint(source, split)
        key = hashlib.sha256(json.dumps([origin, content, limit]).encode()).hexdigest()[:16]
        path = pathlib.Path(cache) / f"real_{key}.npz"
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
    buffer = io.BytesIO()
    np.savez(
        buffer,
        origin=np.array(json.dumps(found.origin._asdict())),
        digest=np.array(found.digest),
        labels=found.described.labels,
        **{_LAYER + name: value for name, value in found.described.layers.items()},
    )
    write_atomic(path, buffer.getvalue())


def _load(path: pathlib.Path) -> RealSet:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            layers = {
                name.removeprefix(_LAYER): stored[name]
                for name in stored.files
                if name.startswith(_LAYER)
            }
            origin = Origin(**json.loads(str(stored["origin"])))
            return RealSet(Described(layers, stored["labels"]), origin, str(stored["digest"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"the cached features {path} are damaged ({error}); delete the file: it will be made anew."
        ) from error
