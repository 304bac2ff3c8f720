"""CLIP score: how well an image fits the prompt, or the caption of the class, that it was asked for by."""

from __future__ import annotations

import hashlib
import pathlib
from typing import NamedTuple

import numpy as np

from experiments.evaluate_config import ClipConfig
from experiments.evaluate_real import Judge, judge_by
from qdiff_jax.eval import backends
from qdiff_jax.eval.backends import CaptionNetwork
from qdiff_jax.eval.clip_score import cosines
from qdiff_jax.eval.described import Described
from qdiff_jax.eval.hub import PREFIX
from qdiff_jax.eval.intervals import mean_interval

_TEXTS_AT_ONCE = 256


class Captions(NamedTuple):
    """judge: CLIP's image tower, whose "pool" is the embedding. texts: [K, D], the embedding of each class's
    caption or of each prompt. protocol: JSON that identifies both towers and the captions. real: whether
    labels of real images have captions."""

    judge: Judge
    texts: np.ndarray
    protocol: dict
    real: bool = True


def load_captions(
    config: ClipConfig,
    classes: int | None,
    shape: tuple[int, int, int],
    source: str,
    prompts: tuple[str, ...] = (),
) -> Captions | None:
    """Both towers and the captions; None if the config has none.

    The captions file has one line for each class, in the order of the labels. source: of the real images,
    for messages. prompts: the captions of a model that reads prompts. Raises ValueError for a
    model without classes, another number of lines, and as `backends` does.
    """
    if not config.weights:
        return None
    lines = list(prompts) or _of_classes(config.captions, classes)
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
        _embedded(text, lines),
        {
            "network": config.network,
            "image_sha256": image.fingerprint,
            "text_sha256": text.fingerprint,
            "captions_sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        },
        not prompts,
    )


def _of_classes(captions: str, classes: int | None) -> list[str]:
    if classes is None:
        raise ValueError(
            "config.clip.captions has a caption for each class, and the model draws no classes; a CLIP "
            'score needs to know what was asked for: set config.clip.captions="".'
        )
    lines = _lines(pathlib.Path(captions))
    if len(lines) != classes:
        raise ValueError(
            f"{captions} has {len(lines)} lines and the model {classes} classes; write one "
            "caption a line, in the order of the labels."
        )
    return lines


def _embedded(text: CaptionNetwork, lines: list[str]) -> np.ndarray:
    parts = (lines[i : i + _TEXTS_AT_ONCE] for i in range(0, len(lines), _TEXTS_AT_ONCE))
    return np.concatenate([np.asarray(text.apply(part)["embedding"]) for part in parts])


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
