"""Samples of one evaluation against those of another, image by image, from the same noise."""

from __future__ import annotations

import math
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.evaluate_config import EvaluateConfig, LpipsConfig, read_result
from experiments.evaluate_subject import subject_digest
from qdiff_jax.data.images import to_unit_range
from qdiff_jax.eval.hub import on_disk
from qdiff_jax.eval.lpips import load_lpips, lpips
from qdiff_jax.eval.networks.state_dict import fingerprint
from qdiff_jax.eval.paired import paired_metrics
from qdiff_jax.eval.shards import read_shards, shard_paths

_SMALLEST = 32  # side of images that LPIPS takes


class Partner(NamedTuple):
    """paths: of the other evaluation's shards. sha256: of what it judged; None where that is not
    known."""

    paths: list[pathlib.Path]
    sha256: str | None


class Perceptual(NamedTuple):
    """distance: images, images [B, H, W, C] in [-1, 1] -> [B]. protocol: JSON that identifies it."""

    distance: Callable[[Any, Any], Any]
    protocol: dict


def load_partner(
    config: EvaluateConfig,
    schedule: Mapping,
    wanted: Callable[[range], np.ndarray | None],
    prompts_sha256: str | None = None,
) -> Partner | None:
    """The evaluation that `config.paired` names, if it was drawn from the same noise by the same rule.

    schedule: of what is judged now; wanted: what its samples of global indices are asked for by;
    prompts_sha256: of its prompts. Raises ValueError if it is none, was sampled otherwise, or lacks samples
    or has them in other shards.
    """
    if not config.paired:
        return None
    result = read_result(config.paired)
    theirs, where = result["protocol"], f"config.paired={config.paired}"
    ours = {"sampler": config.sampler.as_json(), "schedule": dict(schedule), "seed": config.seed}
    ours |= {"uint8": config.uint8, "prompts_sha256": prompts_sha256}
    theirs = {"uint8": "round", **theirs}
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{where}: its {name} is {theirs.get(name)!r} and here it is {value!r}, so that no two "
                "samples belong together; evaluate both by one config."
            )
    if theirs["samples"] < config.samples:
        raise ValueError(
            f"{where} has {theirs['samples']} samples and {config.samples} are asked for; evaluate "
            "that model with as many first."
        )
    folder = pathlib.Path(config.paired)
    folder = folder if folder.is_dir() else folder.parent
    paths = []
    for path, indices in shard_paths(folder / "shards", config.samples, config.shard):
        if not path.exists():
            raise ValueError(
                f"{where}: {path} is missing; evaluate that model with samples={config.samples} and "
                f"shard={config.shard} first."
            )
        asked = wanted(indices)
        asked = np.full(len(indices), -1, np.int32) if asked is None else asked
        if not np.array_equal(_labels(path), asked):
            raise ValueError(
                f"{where}: {path} has other labels or another number of samples than are drawn here; "
                f"evaluate that model with shard={config.shard}, and one of as many classes or prompts."
            )
        paths.append(path)
    return Partner(paths, subject_digest(result["subject"]))


def _labels(path: pathlib.Path) -> np.ndarray:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return stored["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); evaluate that model again.") from error


def load_perceptual(config: LpipsConfig, shape: tuple[int, int, int]) -> Perceptual | None:
    """LPIPS with its weights, for images [H, W, C]; None if the config has no net.

    Grey images are repeated to three channels. Raises ValueError for images below 32 by 32, and as
    `load_lpips` and `hub.on_disk` do.
    """
    if not config.net:
        return None
    if min(shape[:2]) < _SMALLEST:
        raise ValueError(
            f"LPIPS takes images of at least {_SMALLEST} by {_SMALLEST} and the model draws {shape}; set "
            'config.lpips.net="".'
        )
    weights = load_lpips(config.net, on_disk(config.trunk), on_disk(config.linear))

    def distance(x, y):
        x, y = (jnp.broadcast_to(jnp.asarray(v), (*v.shape[:3], 3)) for v in (x, y))
        return lpips(config.net, weights, x, y)

    return Perceptual(distance, {"net": config.net, "sha256": fingerprint(weights._asdict())})


def measure_pairs(
    partner: Partner, paths: Sequence[pathlib.Path], perceptual: Perceptual | None
) -> dict[str, dict]:
    """Distances of the samples in `paths` to the partner's, as entries of metrics.json."""
    pairs = (
        (to_unit_range(one.images), to_unit_range(two.images))
        for one, two in zip(read_shards(partner.paths), read_shards(paths), strict=True)
    )
    found = paired_metrics(pairs, perceptual=None if perceptual is None else perceptual.distance)
    return {
        name: {"value": _finite(f.estimate), "low": _finite(f.low), "high": _finite(f.high)}
        for name, f in found.items()
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # equal pairs: infinitely many dB
