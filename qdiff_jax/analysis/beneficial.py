"""Can fewer bits give better images? The "beneficial noise" of quantization, tested in pairs.

Every sample is drawn by both variants from the same noise (the same fresh noise at every step too, for the
stochastic sampler), so that each seed is its own control. A difference counts when its 95 % confidence interval
excludes zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from qdiff_jax.analysis.deviation import rollout_states
from qdiff_jax.analysis.subject import Subject

_METRICS = ("distance", "confidence", "feature_distance")


class Paired(NamedTuple):
    """coarse minus fine over N seeds: mean, half the width of its 95 % interval (normal approximation), and
    the share of seeds in which the coarse variant is better (ties count half)."""

    mean: float
    half_width: float
    wins: float


class Beneficial(NamedTuple):
    """Samplers (such as "ode" and "sde") by metric.

    verdict: "<sampler>/<metric>" the mean difference coarse - fine, "<sampler>/<metric>/wins", and
    "<sampler>/<metric>/coarse_better" (1 if significantly better, -1 if significantly worse, 0 if open).
    metrics: distance (mean squared to full precision's image, less is better) and, with a classifier,
    confidence (probability of the label it was asked for, more is better) and feature_distance (squared
    distance of the features to full precision's, less is better).
    values: "<sampler>/<variant>/<metric>" -> [N], full precision's confidence as variant "full".
    """

    verdict: dict
    fine: str
    coarse: str
    samplers: tuple[str, ...]
    metrics: tuple[str, ...]
    paired: dict[str, Paired]
    values: dict[str, np.ndarray]


def compare_pairs(fine: np.ndarray, coarse: np.ndarray, more_is_better: bool) -> Paired:
    """[N] values of the same seeds under both variants."""
    difference = np.asarray(coarse, np.float64) - np.asarray(fine, np.float64)
    better = difference > 0 if more_is_better else difference < 0
    return Paired(
        float(difference.mean()),
        float(1.96 * difference.std(ddof=1) / np.sqrt(difference.size)),
        float(np.mean(better + 0.5 * (difference == 0))),
    )


def beneficial_noise(
    subjects: Mapping[str, Subject],
    variants: Mapping[str, Mapping[str, dict]],
    classify: Callable | None = None,
    on_step: Callable | None = None,
) -> Beneficial:
    """Paired quality of two variants under each sampler.

    subjects: sampler name -> the model on that sampler. variants: sampler name -> {name: variables}, two of
    them, finer first, each calibrated on that sampler. classify: images -> (logits, features), or
    None. Raises ValueError for another number of variants.
    """
    names = tuple(next(iter(variants.values())))
    if len(names) != 2:
        raise ValueError(f"beneficial noise compares two variants, and was given {list(names)}.")
    values: dict[str, np.ndarray] = {}
    total, done = 3 * len(subjects), 0
    for sampler, subject in subjects.items():
        drawn = {}
        for name, variables in {"full": subject.full, **variants[sampler]}.items():
            drawn[name] = rollout_states(subject, variables)[0]
            done += 1
            if on_step is not None:
                on_step(done, total)
        for name, images in drawn.items():
            measured = _measure(images, drawn["full"], subject.trajectory.y, classify)
            values.update({f"{sampler}/{name}/{metric}": v for metric, v in measured.items()})
    metrics = tuple(m for m in _METRICS if any(key.endswith(f"/{m}") for key in values))
    verdict, paired = {}, {}
    for sampler in subjects:
        for metric in metrics:
            fine, coarse = (values[f"{sampler}/{name}/{metric}"] for name in names)
            pair = compare_pairs(fine, coarse, metric == "confidence")
            paired[f"{sampler}/{metric}"] = pair
            sign = np.sign(pair.mean) * (1 if metric == "confidence" else -1)
            verdict[f"{sampler}/{metric}"] = pair.mean
            verdict[f"{sampler}/{metric}/wins"] = pair.wins
            verdict[f"{sampler}/{metric}/coarse_better"] = int(
                sign * (abs(pair.mean) > pair.half_width)
            )
    return Beneficial(verdict, *names, tuple(subjects), metrics, paired, values)


def _measure(images, reference, y, classify) -> dict[str, np.ndarray]:
    axes = tuple(range(1, images.ndim))
    found = {"distance": np.mean((images.astype(np.float64) - reference) ** 2, axis=axes)}
    if classify is not None:
        logits, features = classify(images)
        own = np.asarray(classify(reference)[1], np.float64)
        found["feature_distance"] = np.sum((np.asarray(features, np.float64) - own) ** 2, axis=1)
        if y is not None:
            chance = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
            found["confidence"] = chance[np.arange(len(y)), np.asarray(y)]
    return found
