"""Can fewer bits give better images? The "beneficial noise" of quantization, tested in pairs.

Every sample is drawn by both variants from the same noise (the same fresh noise at every step too, for the
stochastic sampler), so that each seed is its own control. A difference counts when its 95 % confidence interval
excludes zero.

Distances to full precision's own images cannot show that noise helps, for full precision is their best value
by definition: only nearness to real images can. So with real images the Frechet distance in a classifier's
features is compared too, by a bootstrap that draws the same seeds for both variants: what the finite number of
samples adds to either distance (Chong and Forsyth 2020) mostly cancels in their difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import softmax

from qdiff_jax.analysis.subject import Subject
from qdiff_jax.diffusion.sample import sample
from qdiff_jax.eval.frechet import distance_to
from qdiff_jax.eval.intervals import Interval, bootstrap, frechet_interval
from qdiff_jax.eval.moments import Moments, moments_of
from qdiff_jax.eval.samples import labels, noise_key
from qdiff_jax.models.registry import predictor

_METRICS = ("distance", "confidence", "feature_distance")
_REPLICATES = 1000
FULL_ONLY = "full precision only, for no real images were given"


class Paired(NamedTuple):
    """coarse minus fine over N seeds: mean, half the width of its 95 % interval (normal approximation), and
    the share of seeds in which the coarse variant is better (ties count half)."""

    mean: float
    half_width: float
    wins: float


class Beneficial(NamedTuple):
    """Samplers (such as "ode" and "sde") by metric.

    verdict: measured_against (what the answer rests on), pairs (seeds); "<sampler>/<metric>" the mean
    difference coarse - fine, "<sampler>/<metric>/wins", and "<sampler>/<metric>/coarse_better" (1 if
    significantly better, -1 if significantly worse, 0 if open). With real images "<sampler>/frechet" the
    difference coarse - fine of the Frechet distances, with "/low", "/high" and "/coarse_better".
    metrics: distance (mean squared to full precision's image, less is better) and, with a classifier,
    confidence (probability of the label it was asked for, more is better) and feature_distance (squared
    distance of the features to full precision's, less is better).
    values: "<sampler>/<variant>/<metric>" -> [N], full precision's confidence as variant "full".
    frechet: "<sampler>/<variant>" -> the distance to the real images ("full" too), and
    "<sampler>/difference" -> that of the coarse variant less that of the fine one; {} without real images.
    """

    verdict: dict
    fine: str
    coarse: str
    samplers: tuple[str, ...]
    metrics: tuple[str, ...]
    paired: dict[str, Paired]
    values: dict[str, np.ndarray]
    frechet: dict[str, Interval]


def compare_pairs(fine: np.ndarray, coarse: np.ndarray, more_is_better: bool) -> Paired:
    """[N] values of the same seeds under both variants."""
    difference = np.asarray(coarse, np.float64) - np.asarray(fine, np.float64)
    better = difference > 0 if more_is_better else difference < 0
    return Paired(
        float(difference.mean()),
        float(1.96 * difference.std(ddof=1) / np.sqrt(difference.size)),
        float(np.mean(better + 0.5 * (difference == 0))),
    )


def compare_frechet(
    features: Mapping[str, np.ndarray], fine: str, coarse: str, real: Moments, seed: int = 0
) -> dict[str, Interval]:
    """Frechet distances of the variants to the real images, and "difference": coarse - fine.

    features: variant -> [N, D] floating, row n of every variant from one noise. real: moments of the real
    images' features. The interval of the difference is of a bootstrap over pairs; those of the distances
    are of the influence function and ignore that the pairs are paired. Raises ValueError unless N > D,
    below which a distance is mostly bias.
    """
    count, dim = features[fine].shape
    if count <= dim:
        raise ValueError(
            f"a Frechet distance in {dim} features needs more than {dim} samples and was given {count}; "
            "draw more pairs."
        )
    distance = distance_to(real)

    def difference(rows: np.ndarray) -> float:
        near, far = (distance(moments_of(features[name][rows])) for name in (coarse, fine))
        return near - far

    found = {name: frechet_interval(value, real) for name, value in features.items()}
    found["difference"] = bootstrap(difference, count, replicates=_REPLICATES, seed=seed)
    return found


def beneficial_noise(
    subjects: Mapping[str, Subject],
    variants: Mapping[str, Mapping[str, dict]],
    classify: Callable | None = None,
    on_step: Callable | None = None,
    *,
    real: Moments | None = None,
    seeds: Sequence[int] | None = None,
) -> Beneficial:
    """Paired quality of two variants under each sampler.

    subjects: sampler name -> the model on that sampler. variants: sampler name -> {name: variables}, two of
    them, finer first, each calibrated on that sampler. classify: images -> (logits, features), or
    None. real: moments of real images' features, or None. seeds: global sample indices of the pairs, by
    default those of the subjects' trajectories. Raises ValueError for another number of variants, and for
    real images without a classifier or with too few seeds for it.
    """
    names = tuple(next(iter(variants.values())))
    if len(names) != 2:
        raise ValueError(f"beneficial noise compares two variants, and was given {list(names)}.")
    if real is not None and classify is None:
        raise ValueError(
            "beneficial noise compares real images by a classifier, and was given none."
        )
    values: dict[str, np.ndarray] = {}
    frechet: dict[str, Interval] = {}
    total, done = 3 * len(subjects), 0
    for sampler, subject in subjects.items():
        used = np.asarray(subject.trajectory.sample if seeds is None else seeds)
        if real is not None and len(used) <= len(real.mean):
            raise ValueError(
                f"a Frechet distance in {len(real.mean)} features needs more than that many pairs, and "
                f"there are {len(used)}."
            )
        y = labels(subject.classes, used)
        drawn = {}
        for name, variables in {"full": subject.full, **variants[sampler]}.items():
            drawn[name] = _draw(subject, variables, used, y)
            done += 1
            if on_step is not None:
                on_step(done, total)
        seen = {name: _classified(classify, x, subject.batch) for name, x in drawn.items()}
        for name, images in drawn.items():
            measured = _measure(images, drawn["full"], y, seen[name], seen["full"])
            values.update({f"{sampler}/{name}/{metric}": v for metric, v in measured.items()})
        if real is not None:
            features = {name: pair[1] for name, pair in seen.items()}
            found = compare_frechet(features, *names, real, subject.seed)
            frechet.update({f"{sampler}/{name}": interval for name, interval in found.items()})
    metrics = tuple(m for m in _METRICS if any(key.endswith(f"/{m}") for key in values))
    verdict: dict[str, Any] = {
        "measured_against": FULL_ONLY if real is None else "full precision and real images",
        "pairs": len(used),
    }
    paired = {}
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
        if real is not None:
            gap = frechet[f"{sampler}/difference"]
            verdict[f"{sampler}/frechet"] = gap.estimate
            verdict[f"{sampler}/frechet/low"] = gap.low
            verdict[f"{sampler}/frechet/high"] = gap.high
            verdict[f"{sampler}/frechet/coarse_better"] = int(gap.high < 0) - int(gap.low > 0)
    return Beneficial(verdict, *names, tuple(subjects), metrics, paired, values, frechet)


def _draw(subject: Subject, variables: Any, seeds: np.ndarray, y: np.ndarray | None) -> np.ndarray:
    return sample(
        predictor(subject.model.module),
        variables,
        subject.sampler,
        noise_key(subject.seed),
        seeds,
        shape=subject.shape,
        y=y,
        batch_size=subject.batch,
    ).x


def _classified(classify: Callable | None, images: np.ndarray, batch: int):
    """(logits, features) [N, ...] float64 on the host, or None."""
    if classify is None:
        return None
    parts = [classify(images[i : i + batch]) for i in range(0, len(images), batch)]
    return tuple(np.concatenate([np.asarray(p, np.float64) for p in side]) for side in zip(*parts))


def _measure(images, reference, y, seen, reference_seen) -> dict[str, np.ndarray]:
    axes = tuple(range(1, images.ndim))
    found = {"distance": np.mean((images.astype(np.float64) - reference) ** 2, axis=axes)}
    if seen is not None:
        (logits, features), (_, own) = seen, reference_seen
        found["feature_distance"] = np.sum((features - own) ** 2, axis=1)
        if y is not None:
            found["confidence"] = softmax(logits, axis=1)[np.arange(len(y)), y]
    return found
