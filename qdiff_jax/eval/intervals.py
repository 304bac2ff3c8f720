"""Confidence intervals for any metric, by bootstrap or jackknife over the samples.

A metric is given as a function of sample indices, so the same few lines serve all of them:

    bootstrap(lambda i: ssim_values[i].mean(), len(ssim_values))
    jackknife(lambda i: inception_score(logits[i], splits=1).mean, len(logits), groups=50)

Which one: the jackknife (Quenouille, Tukey; groups as in Shao and Tu 1995, section 2.3) leaves out one
group at a time and suits every smooth metric. The bootstrap (Efron 1979) also serves those that are not,
but a resample repeats samples, and a metric that is biased by the number of distinct ones (a Frechet
distance, a nearest neighbour) is moved by it. The default therefore takes only the spread from the
replicates and keeps the estimate as centre.

A metric that is a mean over samples (an error, a cosine) needs neither: `mean_interval`. The two distances
have short cuts, `frechet_interval` and `kernel_interval`, and so has the inception score, whose sums are kept
by groups: `score_interval`. The real images are taken as fixed, as a published reference is. Precision and
recall have theirs beside them, over both sets: `precision_recall.precision_recall_intervals`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.special
from jax.sharding import Mesh

from qdiff_jax.eval.frechet import distance_to, frechet_influence
from qdiff_jax.eval.inception_score import (
    ScoreState,
    empty_groups,
    grouped_index,
    split_index,
    update,
    without_groups,
)
from qdiff_jax.eval.kid import kernel_inception_distance, kernel_influence, mmd2
from qdiff_jax.eval.moments import Moments, merge, moments_of, weighted

KINDS = ("normal", "percentile", "basic")


class Interval(NamedTuple):
    estimate: float
    low: float
    high: float
    standard_error: float
    bias: float  # what the method finds the estimate to be off by; `low` and `high` do not use it
    level: float
    method: str


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    count: int,
    *,
    replicates: int = 200,
    level: float = 0.95,
    seed: int = 0,
    kind: str = "normal",
) -> Interval:
    """An interval from resamples of `count` indices with replacement.

    Args:
      statistic: int64 [count] indices, in any order and repeated -> float.
      count: number of samples; of pairs, for a paired metric.
      replicates: how many resamples; some hundreds for a standard error, thousands for percentiles.
      level: the coverage aimed at.
      seed: fixes every resample.
      kind: "normal" (estimate +- z standard errors), "percentile" (of the replicates) or "basic" (2
        estimate - percentiles, which takes off the bias of the resampling).

    Raises ValueError for fewer than two samples or replicates, an unknown kind or level, or a
    replicate that is not finite.
    """

    def replicate(counts: np.ndarray) -> float:
        return statistic(np.repeat(np.arange(count), counts))

    estimate = float(statistic(np.arange(count)))
    return _bootstrap(estimate, replicate, count, replicates, level, seed, kind)


def frechet_bootstrap(
    features,
    reference: Moments,
    *,
    replicates: int = 200,
    level: float = 0.95,
    seed: int = 0,
    kind: str = "normal",
) -> Interval:
    """`bootstrap` of a Frechet distance, each resample as counts in weighted moments.

    No feature vector is copied and the reference is factored once. features: [N, D] floating.
    """
    features, distance = np.asarray(features), distance_to(reference)

    def replicate(counts: np.ndarray) -> float:
        return distance(weighted(features, counts))

    estimate = distance(moments_of(features))
    return _bootstrap(estimate, replicate, len(features), replicates, level, seed, kind)


def jackknife(
    statistic: Callable[[np.ndarray], float],
    count: int,
    *,
    groups: int | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """An interval from leaving out one group of samples at a time.

    Args:
      statistic: ascending int64 indices [fewer than count] -> float.
      count: number of samples.
      groups: how many, at random and of even sizes; None leaves out single samples.
      level: the coverage aimed at, from Student's t with groups - 1 degrees of freedom.
      seed: of the partition.

    Raises ValueError for a number of groups that does not fit.
    """
    groups = count if groups is None else groups
    if not 2 <= groups <= count:
        raise ValueError(f"jackknife: {count} samples do not make {groups} groups of at least one.")
    group = np.random.default_rng(seed).permutation(count) % groups
    estimate = float(statistic(np.arange(count)))
    without = [statistic(np.flatnonzero(group != g)) for g in range(groups)]
    return _jackknife(estimate, np.array(without, np.float64), level)


def frechet_jackknife(
    groups: Sequence[Moments], reference: Moments, *, level: float = 0.95
) -> Interval:
    """The jackknife of a Frechet distance from the moments of each group alone.

    The groups are gathered while sampling, so that the memory is their number times D^2 and no feature
    is kept; 20 to 50 of even size, each of samples drawn independently of the others.

    Raises ValueError when there are fewer than two groups.
    """
    if len(groups) < 2:
        raise ValueError(f"frechet_jackknife needs at least two groups, got {len(groups)}.")
    distance = distance_to(reference)
    # before[g]: groups 0 to g merged; walking back with those after g makes each leave-one-out a merge
    # of two, where merging the rest anew would take groups^2 of them.
    before = [groups[0]]
    for moments in groups[1:]:
        before.append(merge(before[-1], moments))
    without, after = [], None
    for index in reversed(range(len(groups))):
        parts = [before[index - 1]] if index else []
        parts += [] if after is None else [after]
        without.append(distance(merge(*parts) if len(parts) == 2 else parts[0]))
        after = groups[index] if after is None else merge(after, groups[index])
    return _jackknife(distance(before[-1]), np.array(without), level)


def frechet_interval(
    features, reference: Moments, *, level: float = 0.95, own: Moments | None = None
) -> Interval:
    """First-order (infinitesimal jackknife) interval of a Frechet distance: one evaluation.

    features: [N, D] floating with N > D. own: moments of the whole set, of which `features` are then a
    random part that only gives the spread. See `frechet.frechet_influence`, which also says what raises.
    """
    own = moments_of(features) if own is None else own
    pulls = frechet_influence(features, reference, own=own)
    error = float(np.sqrt((pulls**2).sum() / (len(pulls) - 1) / own.n))
    estimate = distance_to(reference)(own)
    return _around(estimate, error, 0.0, level, scipy.special.ndtri, "influence")


def distance_interval(
    features, reference: Moments, *, level: float = 0.95, own: Moments | None = None
) -> Interval:
    """Of a Frechet distance at any number of samples: `frechet_interval` where there are more than
    dimensions, else `frechet_bootstrap`, for which `features` must be the whole set."""
    if (len(features) if own is None else own.n) > features.shape[1]:
        return frechet_interval(features, reference, level=level, own=own)
    return frechet_bootstrap(features, reference, level=level)


def kernel_interval(
    features1,
    features2,
    *,
    level: float = 0.95,
    block: int = 2048,
    subsets: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> Interval:
    """First-order interval of the kernel distance over all pairs, over the first set's samples.

    features1: [N, D], of the generated images; features2: [M, D], of the real ones, taken as fixed.
    subsets: arguments of `kernel_inception_distance`, whose mean over random subsets is then the
    estimate; their own scatter adds to the error. The spread over the subsets that the tools print is no
    substitute: subsets of one sample overlap, and it measures their size.
    """
    pulls = kernel_influence(features1, features2, block=block, mesh=mesh)
    error = float(pulls.std(ddof=1) / np.sqrt(len(pulls)))
    if subsets is None:
        estimate = mmd2(features1, features2, block=block, mesh=mesh)
    else:
        drawn = kernel_inception_distance(features1, features2, **subsets, mesh=mesh)
        estimate = drawn.mean
        error = float(np.hypot(error, drawn.std / np.sqrt(len(drawn.values))))
    return _around(estimate, error, 0.0, level, _student(len(pulls) - 1), "influence")


def score_interval(
    logits, *, groups: int = 20, level: float = 0.95, seed: int = 2020, **rule
) -> Interval:
    """The jackknife of an inception score over groups of samples within every split.

    Args:
      logits: [N, C] floating, in the order of the files.
      groups: how many, dealt out at random; at most N.
      level: the coverage aimed at.
      seed: of the splits, if they are shuffled.
      rule: of the splits, see `inception_score.split_index`.

    Raises ValueError for a number of groups that does not fit, and as `inception_score` does.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or not 2 <= groups <= len(logits):
        raise ValueError(
            f"score_interval takes logits [N, C] of at least {groups} samples, one for each group, and "
            f"two groups: got {logits.shape}."
        )
    index = grouped_index(split_index(len(logits), **rule, seed=seed), groups)
    state = empty_groups(index, groups, logits.shape[1])
    for start in range(0, len(logits), 4096):
        part = slice(start, start + 4096)
        state = update(state, logits[part], index[part])
    return score_jackknife(state, groups, level=level)


def score_jackknife(state: ScoreState, groups: int, *, level: float = 0.95) -> Interval:
    """`score_interval` from sums by `inception_score.grouped_index`, streamed: no logit is kept."""
    score, without = without_groups(state, groups)
    return _jackknife(score.mean, without, level)


def mean_interval(values, *, level: float = 0.95) -> Interval:
    """The interval of a mean of independent values [N]: mean +- t s / sqrt(N).

    It is what the delete-one jackknife gives for a mean. Raises ValueError for fewer than two values.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"mean_interval takes at least two values [N], got {values.shape}.")
    error = float(values.std(ddof=1) / np.sqrt(len(values)))
    return _around(float(values.mean()), error, 0.0, level, _student(len(values) - 1), "mean")


def _bootstrap(estimate, replicate, count, replicates, level, seed, kind) -> Interval:
    if count < 2 or replicates < 2 or kind not in KINDS:
        raise ValueError(
            f"bootstrap needs two samples, two replicates and a kind of {KINDS}: got {count}, "
            f"{replicates} and {kind!r}."
        )
    rng = np.random.default_rng(seed)
    values = np.array(
        [
            replicate(np.bincount(rng.integers(0, count, count), minlength=count))
            for _ in range(replicates)
        ],
        np.float64,
    )
    if not np.isfinite(values).all():
        raise ValueError(
            f"bootstrap: {int((~np.isfinite(values)).sum())} of {replicates} replicates are not "
            f"finite; the metric does not exist on every resample, use the jackknife."
        )
    error, bias = float(values.std(ddof=1)), float(values.mean() - estimate)
    method = f"bootstrap {kind}, {replicates} replicates"
    around = _around(estimate, error, bias, level, scipy.special.ndtri, method)
    if kind == "normal":
        return around
    tail = (1.0 - level) / 2.0
    low, high = (float(q) for q in np.quantile(values, [tail, 1.0 - tail]))
    if kind == "basic":
        low, high = 2.0 * estimate - high, 2.0 * estimate - low
    return around._replace(low=low, high=high)


def halves_interval(
    estimate: float, halves: np.ndarray, *, level: float = 0.95, error: float = 0.0
) -> Interval:
    """The interval from a metric of random halves of the samples (the jackknife that deletes half).

    For a metric that is no smooth function of the samples, as of nearest neighbours: leaving out small
    groups then overstates the error (here by up to two thirds), leaving out half of them nearly does not
    (Shao and Wu 1989, Ann. Statist. 17, 1176). The two halves of a cut are independent, so that their
    difference has four times the variance of the metric of the whole.

    Args:
      estimate: of the whole.
      halves: [cuts, 2] float64, the metric of both halves of each random cut.
      level: the coverage aimed at, from Student's t with as many degrees of freedom as cuts.
      error: a standard error from another source, independent of these samples, to be added.
    """
    halves = np.asarray(halves, np.float64)
    spread = np.square(halves[:, 0] - halves[:, 1]).mean() / 4.0
    total = float(np.sqrt(spread + error**2))
    method = f"halves, {len(halves)} cuts"
    return _around(
        estimate, total, float(halves.mean() - estimate), level, _student(len(halves)), method
    )


def _jackknife(estimate: float, without: np.ndarray, level: float) -> Interval:
    groups = len(without)
    centre = without.mean()
    error = float(np.sqrt((groups - 1) / groups * np.square(without - centre).sum()))
    bias = float((groups - 1) * (centre - estimate))
    method = f"jackknife, {groups} groups"
    return _around(estimate, error, bias, level, _student(groups - 1), method)


def _student(freedom: int) -> Callable[[float], float]:
    return lambda probability: scipy.special.stdtrit(freedom, probability)


def _around(estimate, error, bias, level, quantile, method) -> Interval:
    if not 0.0 < level < 1.0:
        raise ValueError(f"an interval's level lies between 0 and 1, got {level}.")
    reach = float(quantile((1.0 + level) / 2.0)) * error
    return Interval(estimate, estimate - reach, estimate + reach, error, bias, level, method)
