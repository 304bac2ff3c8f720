"""CLIP score of a class-conditional model: how well an image fits the caption of the class asked for."""

from __future__ import annotations

import hashlib
import pathlib
from typing import NamedTuple

import numpy as np

from experiments.evaluate_config import ClipConfig
from experiments.evaluate_real import Judge, judge_by
from qdiff_jax.eval import backends
from qdiff_jax.eval.clip_score import cosines
from qdiff_jax.eval.described import Described
from qdiff_jax.eval.hub import PREFIX
from qdiff_jax.eval.intervals import mean_interval


class Captions(NamedTuple):
    """judge: CLIP's image tower, whose "pool" is the embedding. texts: [classes, D], the embedding of each
    class's caption. protocol: JSON that identifies both towers and the captions."""

    judge: Judge
    texts: np.ndarray
    protocol: dict


def load_captions(
    config: ClipConfig, classes: int | None, shape: tuple[int, int, int], source: str
) -> Captions | None:
    """Both towers and the captions; None if the config has none.

    The captions file has one line for each class, in the order of the labels. source: of the real images,
    for messages. Raises ValueError for a
    model without classes, another number of lines, and as `backends` does.
    """
    if not config.captions:
        return None
    if classes is None:
        raise ValueError(
            "config.clip.captions has a caption for each class, and the model draws no classes; a CLIP "
            'score needs to know what was asked for: set config.clip.captions="".'
        )
    lines = _lines(pathlib.Path(config.captions))
    if len(lines) != classes:
        raise ValueError(
            f"{config.captions} has {len(lines)} lines and the model {classes} classes; write one "
            "caption a line, in the order of the labels."
        )
    image = backends.feature_network(config.network, config.weights)
    text = backends.caption_network(
        config.network, config.weights, config.vocabulary or _folder(config.weights)
    )
    embed = image._replace(
        name=f"{image.name} embedding", apply=lambda x: {"pool": image.apply(x)["embedding"]}
    )
    judge = judge_by(embed, backends.preparation(image), shape, source)
    return Captions(
        judge,
        np.asarray(text.apply(lines)["embedding"]),
        {
            "network": config.network,
            "image_sha256": image.fingerprint,
            "text_sha256": text.fingerprint,
            "captions_sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        },
    )


def _folder(weights: str) -> str:
    """Where the vocabulary of these weights lies: their folder or repository."""
    if weights.startswith(PREFIX):
        return "/".join(weights.split("/")[:2])
    path = pathlib.Path(weights)
    return str(path.parent if path.is_file() else path)


def _lines(path: pathlib.Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8").strip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the captions {path} cannot be read ({error}).") from error
    empty = [number for number, line in enumerate(lines, 1) if not line]
    if empty:
        raise ValueError(f"line {empty[0]} of the captions {path} is empty; every class needs one.")
    return lines


def measure_captions(captions: Captions, samples: Described, real: Described | None) -> dict:
    """The mean cosine of samples and their captions (`clip_score` with scale 1) with its interval, and
    the same of real images where their labels are known and have captions."""
    around = mean_interval(_cosines(captions, samples))
    entry = {"value": around.estimate, "low": around.low, "high": around.high}
    if real is not None and (real.labels >= 0).all() and real.labels.max() < len(captions.texts):
        entry["real"] = float(_cosines(captions, real).mean())
    return entry


def _cosines(captions: Captions, described: Described) -> np.ndarray:
    return cosines(described.features, captions.texts[described.labels])
