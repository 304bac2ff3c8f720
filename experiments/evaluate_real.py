"""What `experiments.evaluate` judges by: the feature network, real images and published statistics."""

from __future__ import annotations

import pathlib
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.evaluate_config import HALVES, EvaluateConfig
from qdiff_jax.eval import backends
from qdiff_jax.eval.backends import FeatureNetwork
from qdiff_jax.eval.described import Described, describe
from qdiff_jax.eval.distribution import check_protocol
from qdiff_jax.eval.frechet import frechet_infinity, moments_distance
from qdiff_jax.eval.intervals import Interval, distance_interval
from qdiff_jax.eval.kid import kernel_inception_distance, mmd2
from qdiff_jax.eval.moments import Moments, moments_of
from qdiff_jax.eval.real_sets import RealSet, real_set
from qdiff_jax.eval.reference import (
    Origin,
    Reference,
    check_comparable,
    load_published,
    load_reference,
    real_floor,
    reference_statistics,
    save_reference,
)
from qdiff_jax.eval.tools import find_tool
from qdiff_jax.export.bundle import file_sha256


class Judge(NamedTuple):
    """network and its preparation of images of one shape; dims: {layer: D} of its features."""

    network: FeatureNetwork
    prepare: Callable[[np.ndarray], Any]
    dims: dict[str, int]


class Real(NamedTuple):
    """What samples are compared with. reference, floor: None where the config names none. published:
    moments of the Frechet distances, {layer: Moments}, and its file's digest; None without."""

    reference: RealSet | None
    floor: RealSet | None
    published: dict[str, Moments] | None
    published_sha256: str | None


def judge_by(
    network: FeatureNetwork, prepare: Callable, shape: tuple[int, int, int], source: str
) -> Judge:
    """The network for images of one shape [H, W, C], tried on a blank one without running it.

    Raises ValueError if it does not take images of that shape; the preparation of the result raises it
    for images of any other, which can only be those of the source.
    """

    def checked(images: np.ndarray):
        if images.shape[1:] != shape:
            raise ValueError(
                f"images of {source} are {tuple(images.shape[1:])} and the model draws {shape}; set "
                "config.data.pad_to, or crop and size, or another source."
            )
        return prepare(images)

    found = jax.eval_shape(
        lambda x: dict(network.apply(x)), prepare(np.zeros((1, *shape), np.uint8))
    )
    return Judge(network, checked, {name: layer.shape[-1] for name, layer in found.items()})


def load_judge(config: EvaluateConfig, shape: tuple[int, int, int]) -> Judge:
    """The config's feature network. Raises ValueError as `backends` and `judge_by` do."""
    if config.tool:
        find_tool(config.tool)
    network = backends.feature_network(config.network, config.network_weights or None)
    prepare = backends.preparation(network, config.tool)
    return judge_by(network, prepare, shape, config.data.source)


def described(judge: Judge, pairs: Iterable, **options) -> Described:
    """What the judge sees of a stream of (uint8 images [n, H, W, C], labels [n]); options: of `describe`."""
    return describe(judge.network.apply, judge.prepare, pairs, **options)


def real_images(config: EvaluateConfig, judge: Judge, split: str, limit: int | None) -> RealSet:
    """One split of the config's real images, as the judge sees them; limit: the first so many."""
    data = config.data
    return real_set(
        judge.network,
        judge.prepare,
        data.source,
        split,
        tool=config.tool,
        limit=min(filter(None, (data.limit, limit)), default=None),
        cache=config.cache or None,
        **data.preparation,
    )


def load_real(config: EvaluateConfig, judge: Judge) -> Real:
    """All that the config compares samples with. Raises ValueError for what does not fit, and for too few
    images for the tool or for an extrapolation."""
    data = config.data
    reference = floor = published = digest = None
    if data.published:
        published, digest = _published(config, judge), file_sha256(pathlib.Path(data.published))
    if data.source:
        reference = real_images(config, judge, data.reference, None)
        if data.floor and data.floor != HALVES:
            # As many real images as are generated: a distance is biased by their number.
            floor = real_images(config, judge, data.floor, config.samples)
    check_protocol(
        config.tool if reference else "",
        config.neighbours if reference else None,
        config.samples,
        len(reference.described.labels) if reference else config.samples,
        extrapolated_dim=judge.dims["pool"] if config.extrapolate else None,
    )
    return Real(reference, floor, published, digest)


def _published(config: EvaluateConfig, judge: Judge) -> dict[str, Moments]:
    path, count = pathlib.Path(config.data.published), config.data.published_count
    network = judge.network
    if _has_origin(path):
        found = load_reference(path)
        here = Origin("the samples", network.name, network.fingerprint, config.tool, config.samples)
        check_comparable(here, found.origin, sizes=False, preparations=False)
    elif count:
        found = load_published(path, network=network, tool=config.tool, count=count)
    else:
        raise ValueError(
            f"{path} does not say of how many images it is; set config.data.published_count."
        )
    for layer, moments in found.moments.items():
        if layer in judge.dims and len(moments.mean) != judge.dims[layer]:
            raise ValueError(
                f"{path} has {len(moments.mean)} features ({layer}) and {network.name} gives "
                f"{judge.dims[layer]}; the statistics are of another network."
            )
    return {layer: moments for layer, moments in found.moments.items() if layer in judge.dims}


def _has_origin(path: pathlib.Path) -> bool:
    """Whether `--statistics` wrote the file; of one that cannot be read `load_reference` says why."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return "origin" in archive.files
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return True


def with_classes(judge: Judge, classes: int | None, *sets: Described | None) -> list:
    """The sets as they are if class agreement means something, else with every label unknown.

    It does if the network's classes are the model's and every label of every set is known.
    """
    known = all((one.labels >= 0).all() for one in sets if one is not None)
    if classes is not None and judge.dims.get("logits") == classes and known:
        return list(sets)
    return [one and one._replace(labels=np.full_like(one.labels, -1)) for one in sets]


def frechet_to(
    published: dict[str, Moments], generated: Described, floor: Described | None, spatial: bool
) -> dict[str, dict]:
    """The Frechet distances to published moments, as entries of metrics.json."""
    features = generated.features
    found = {"frechet": _entry(distance_interval(features, published["pool"]))}
    if floor is not None:
        real = moments_of(floor.features[: len(features)])
        found["frechet"] |= _floor(moments_distance(real, published["pool"]), real.n)
    if spatial and generated.spatial is not None and "spatial" in published:
        moments, own = published["spatial"], generated.spatial
        found["spatial_frechet"] = _entry(distance_interval(own.kept, moments, own=own.moments))
        if floor is not None:
            real = floor.spatial.moments
            found["spatial_frechet"] |= _floor(moments_distance(real, moments), real.n)
    return found


def _entry(interval: Interval) -> dict:
    return {"value": interval.estimate, "low": interval.low, "high": interval.high}


def _floor(value: float, count: int) -> dict:
    return {"floor": value, "floor_n": count}


def extrapolated(published: Moments, generated: Described, frechet: dict) -> dict:
    """The Frechet distance to published moments at infinitely many samples, as an entry of metrics.json;
    its interval has the width of `frechet`'s."""
    features = generated.features
    distance = frechet_infinity(features, published, smallest=len(features) // 2).distance
    shift = distance - frechet["value"]
    return {"value": distance, "low": frechet["low"] + shift, "high": frechet["high"] + shift}


def floors_of_halves(
    metrics: dict[str, dict], reference: Described, count: int, tool: str = ""
) -> None:
    """Adds to the distances their floor between the halves of the reference, at most `count` images
    standing in for the generated ones; tool: whose kernel distance."""
    subsets = find_tool(tool).kernel if tool else None

    def frechet(x: np.ndarray, y: np.ndarray) -> float:
        return moments_distance(moments_of(x), moments_of(y))

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return mmd2(x, y) if subsets is None else kernel_inception_distance(x, y, **subsets).mean

    spatial = None if reference.spatial is None else reference.spatial.kept
    for name, features, metric in (
        ("frechet", reference.features, frechet),
        ("spatial_frechet", spatial, frechet),
        ("kernel", reference.features, kernel),
    ):
        if name in metrics:
            floor = real_floor(metric, features, count=min(count, len(features) // 2))
            metrics[name] |= _floor(floor.value, floor.counts[0]) | {"floor_between": floor.between}


def write_statistics(config: EvaluateConfig, path: pathlib.Path) -> Reference:
    """Moments of the config's reference split in one pass over its images, none of them held, as an npz
    that `config.data.published` and the published tools read."""
    network = backends.feature_network(config.network, config.network_weights or None)
    reference = reference_statistics(
        network,
        config.data.source,
        tool=config.tool,
        split=config.data.reference,
        limit=config.data.limit or None,
        keep=0,
        cache=config.cache or None,
        prepare=backends.preparation(network, config.tool),
        **config.data.preparation,
    )
    save_reference(path, reference)
    return reference
