"""Statistics of real images: made once, cached, known by where they come from, or read as published.

A distance compares two sets only if the same network saw both, resized by the same rule, and its value is
biased by the number of samples. So a set carries its `Origin`, and `distance` refuses (by
`check_comparable`) what does not fit. What a distance means is read from its floor: the distance between two
halves of the real images, or between the training and the test set (`real_floor`).
"""

import hashlib
import io
import json
import pathlib
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from qdiff_jax.eval.extract import Features, feature_batches
from qdiff_jax.eval.files import write_atomic
from qdiff_jax.eval.frechet import moments_distance
from qdiff_jax.eval.moments import Moments, init, update
from qdiff_jax.eval.real_images import image_stream, source_fingerprint

# The layers whose moments are kept, and their names in the published files.
_LAYERS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


class Origin(NamedTuple):
    """Where a set of features comes from. `network` and `weights` name what saw the images, `tool` the
    resizing rule they went through."""

    source: str
    network: str
    weights: str
    tool: str
    count: int
    preparation: str = "none"  # of the images before, such as "lsun crop to 256"

    @property
    def fingerprint(self) -> str:
        """16 hex digits over all fields."""
        return hashlib.sha256(json.dumps(self, sort_keys=True).encode()).hexdigest()[:16]


class Reference(NamedTuple):
    """moments: {"pool": Moments, "spatial": Moments where the network has it}. features: float32
    [K, D], the pooled features of the first K images (precision, recall, kernel distance), or None."""

    origin: Origin
    moments: dict[str, Moments]
    features: np.ndarray | None


class Floor(NamedTuple):
    value: float
    counts: tuple[int, int]
    between: str


def check_comparable(
    a: Origin, b: Origin, *, sizes: bool = True, preparations: bool = True
) -> None:
    """Refuses two sets whose distance, or whose distances to a third one, mean nothing together.

    Args:
      a, b: where they come from.
      sizes: also refuse different numbers of samples. Turn it off for a generated set against the whole
        of a real one, as is the custom; never between two models.
      preparations: also refuse images cropped or resized differently before the tool's own resize. Turn it
        off for samples of a model against what its data were cropped to; never between real images.

    Raises ValueError with the first thing that differs.
    """
    fields = [("network", "networks"), ("weights", "weights"), ("tool", "resizing rules")]
    for field, what in fields + [("preparation", "preparations")] * preparations:
        if getattr(a, field) != getattr(b, field):
            raise ValueError(
                f"{a.source!r} and {b.source!r} were measured with different {what}: "
                f"{getattr(a, field)!r} and {getattr(b, field)!r}; measure both with one."
            )
    if sizes and a.count != b.count:
        raise ValueError(
            f"{a.source!r} has {a.count} samples and {b.source!r} has {b.count}, and a distance is "
            "biased by their number; use as many of both."
        )


def distance(
    a: Reference,
    b: Reference,
    *,
    layer: str = "pool",
    sizes: bool = True,
    preparations: bool = True,
) -> float:
    """The squared Frechet distance of two sets of one network, resize and size.

    Args:
      a, b: from `reference_statistics`, `load_published` or `gather`.
      layer: "pool" (FID in Inception) or "spatial" (sFID).
      sizes, preparations: as in `check_comparable`.

    Raises ValueError when the sets do not compare or have no such layer.
    """
    check_comparable(a.origin, b.origin, sizes=sizes, preparations=preparations)
    for one in (a, b):
        if layer not in one.moments:
            raise ValueError(
                f"{one.origin.source!r} has no moments of {layer!r}, only of {sorted(one.moments)}."
            )
    return moments_distance(a.moments[layer], b.moments[layer])


def gather(origin: Origin, batches: Iterable[Features], *, keep: int = 0) -> Reference:
    """Moments of a stream of features, and the pooled features of the first `keep` images.

    The stream's number of images replaces `origin.count`. Raises ValueError for an empty stream.
    """
    moments: dict[str, Moments] = {}
    kept: list[np.ndarray] = []
    count = 0
    for features in batches:
        for name in _LAYERS.keys() & features.keys():
            state = moments.get(name) or init(features[name].shape[1])
            moments[name] = update(state, features[name])
        if count < keep:
            kept.append(features["pool"][: keep - count])
        count += len(features["pool"])
    if not count:
        raise ValueError(f"{origin.source!r} gave no images; check the source.")
    features = np.concatenate(kept) if kept else None
    return Reference(origin._replace(count=count), moments, features)


def origin_of(
    source: str, split: str, network: Any, tool: str, crop: str | None, size: int | None
) -> Origin:
    """The origin of one split of a source before it is counted."""
    preparation = "none" if crop is None else f"{crop} crop to {size}"
    return Origin(f"{source} {split}", network.name, network.fingerprint, tool, 0, preparation)


def cached_file(
    cache: str | pathlib.Path, kind: str, origin: Origin, source: str, split: str, *rest: Any
) -> pathlib.Path:
    """Where a cache holds what was made of a source: another name for other content, origin or `rest`."""
    content = source_fingerprint(source, split)
    key = hashlib.sha256(json.dumps([origin, content, *rest]).encode()).hexdigest()[:16]
    return pathlib.Path(cache) / f"{kind}_{key}.npz"


def reference_statistics(
    network: Any,
    source: str,
    *,
    tool: str = "adm",
    split: str = "train",
    crop: str | None = None,
    size: int | None = None,
    limit: int | None = None,
    keep: int = 10000,
    cache: str | pathlib.Path | None = None,
    prepare: Callable | None = None,
    batch: int = 64,
    mesh: Mesh | None = None,
) -> Reference:
    """The statistics of a set of real images, from the cache if they are there.

    Args:
      network: has `name`, `fingerprint` (of its weights), `size` (side of its input) and `apply`.
      source, split, crop, size, limit: see `real_images.image_stream`.
      tool: whose resizing rule to use, a key of `tools.TOOLS`; with `prepare`, its name.
      keep: pooled features of so many images are kept.
      cache: folder of `reference_<fingerprint>.npz` files, or None.
      prepare: uint8 images -> the network's input, for networks of your own; by default what
        `backends.preparation` gives for this one and the tool.
      batch, mesh: see `extract.feature_batches`.

    Raises ValueError for a source that cannot be read or a damaged cache file.
    """
    origin = origin_of(source, split, network, tool, crop, size)
    path = None
    if cache is not None:
        path = cached_file(cache, "reference", origin, source, split, limit, keep)
        if path.exists():
            return load_reference(path)
    if prepare is None:
        # Late: the networks bring PIL and the model registry, which reading statistics does not need.
        from qdiff_jax.eval.backends import preparation as published_preparation

        prepare = published_preparation(network, tool)
    images = image_stream(source, split, crop=crop, size=size, limit=limit, batch=batch)
    batches = feature_batches(network.apply, prepare, images, batch=batch, mesh=mesh)
    reference = gather(origin, batches, keep=keep)
    if path is not None:
        save_reference(path, reference)
    return reference


def save_reference(path, reference: Reference) -> None:
    """Writes an npz that the published tools read too (`mu`, `sigma`, `mu_s`, `sigma_s`), whole or not
    at all, with the origin as JSON text. Raises OSError when it cannot be written."""
    arrays: dict[str, np.ndarray] = {"origin": np.array(json.dumps(reference.origin._asdict()))}
    for name, moments in reference.moments.items():
        mu, sigma = _LAYERS[name]
        arrays |= {mu: moments.mean, sigma: moments.cov}
    if reference.features is not None:
        arrays["features"] = reference.features
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


def load_reference(path) -> Reference:
    """Reads what `save_reference` wrote. Raises ValueError for a missing, damaged or other file."""
    arrays = _arrays(path)
    if "origin" not in arrays:
        raise ValueError(
            f"{path} does not say where it comes from; read published statistics with load_published."
        )
    origin = Origin(**json.loads(str(arrays["origin"])))
    return Reference(origin, _moments(arrays, origin.count, path), arrays.get("features"))


def load_published(
    path, *, network: Any, tool: str, count: int, preparation: str = "none"
) -> Reference:
    """Reads published statistics: ADM's reference batches or pytorch-fid's and clean-fid's files.

    Args:
      path: an npz with `mu` and `sigma`, and `mu_s` and `sigma_s` if it is ADM's. (The images in ADM's
        `arr_0` are read by `image_stream`.)
      network: has `name` and `fingerprint`: whose features they are, which the file does not say.
      tool: whose resizing rule they were made with, which the file does not say either.
      count: how many images they were made of (ADM's: the whole data set, not the 10,000 in it).
      preparation: of those images before, in the words of `Origin`, such as "adm crop to 256".

    Raises ValueError for a missing, damaged or other file.
    """
    name = pathlib.Path(path).name
    origin = Origin(name, network.name, network.fingerprint, tool, count, preparation)
    return Reference(origin, _moments(_arrays(path), count, path), None)


def real_floor(
    metric: Callable[[np.ndarray, np.ndarray], float],
    real,
    other=None,
    *,
    count: int | None = None,
    seed: int = 0,
) -> Floor:
    """The value of a metric between real images: what a perfect model would get.

    Args:
      metric: features [n, D] in place of the generated ones, features of the reference -> float.
      real: [M, D], of the reference.
      other: [K, D], of another split; without it `real` is cut into two random halves, whose smaller
        numbers raise the floor of a biased metric.
      count: how many vectors stand in for the generated ones, as many as those are; by default all.
      seed: of the halves and of the choice of `count`.

    Raises ValueError when there are fewer than `count`.
    """
    rng, between = np.random.default_rng(seed), "training and test set"
    if other is None:
        order, middle = rng.permutation(len(real)), len(real) // 2
        real, other = real[order[middle:]], real[order[:middle]]
        between = "halves"
    if count is not None:
        if count > len(other):
            raise ValueError(
                f"a floor of {count} real images needs as many, there are {len(other)}; use the "
                "other split or measure fewer samples."
            )
        other = other[rng.permutation(len(other))[:count]]
    return Floor(float(metric(other, real)), (len(other), len(real)), between)


def _arrays(path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            names = {name for pair in _LAYERS.values() for name in pair} | {"origin", "features"}
            return {name: archive[name] for name in names & set(archive.files)}
    except FileNotFoundError as error:
        raise ValueError(f"there is no statistics file {path}; check the path.") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged or no npz archive ({error}); fetch it again."
        ) from error


def _moments(arrays: dict, count: int, path) -> dict[str, Moments]:
    if count < 2:
        raise ValueError(f"{path}: statistics of {count} images have no covariance.")
    found = {}
    for name, (mu, sigma) in _LAYERS.items():
        if mu in arrays and sigma in arrays:
            mean, cov = (np.asarray(arrays[key], np.float64) for key in (mu, sigma))
            if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
                raise ValueError(f"{path}: {mu} {mean.shape} and {sigma} {cov.shape} do not fit.")
            found[name] = Moments(count, mean, cov * (count - 1))
    if "pool" not in found:
        raise ValueError(f"{path} holds no mu and sigma; it is no statistics file.")
    return found
