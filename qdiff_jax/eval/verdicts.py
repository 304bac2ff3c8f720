"""Whether a part of a method helps: errors with it and without it, sample by sample, over several seeds.

Two things vary: which samples an error is taken over, and what a seed decides (calibration set, order of
batches, rounding). The bootstrap over samples sees the first alone. Under the second a part without any effect
moves every seed's error beyond its own interval, now up and now down, so that three seeds would agree in a
quarter of all cases. A verdict therefore also asks for Student's interval of the mean log ratio over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.special

from qdiff_jax.eval.intervals import mean_interval

HOLDS, NO_EFFECT, REVERSED = "holds", "no effect", "reversed"
# The seeds differ by more than their samples explain; nothing was shown of a bound; there is one seed.
DISAGREE, NOT_SHOWN, ONE_SEED = "seeds disagree", "not shown", "one seed"

_REPLICATES = 2000
_TAILS = (0.025, 0.975)


class Effect(NamedTuple):
    """ratio: mean error with the part / without it, of one seed; low, high: its 95 % interval."""

    ratio: float
    low: float
    high: float


def paired_effect(above, below, *, replicates: int = _REPLICATES, seed: int = 0) -> Effect:
    """The ratio of mean errors over the same samples, with the bootstrap's percentile interval.

    above, below: [N] errors >= 0 of the same samples under the same noise, or [K, N] of K runs each, whose
    means are multiplied: (a, d) over (b, c) is the ratio of the ratios a / b and c / d. Resampling keeps a
    sample's errors together, so that what it costs all runs does not widen the interval.

    Raises ValueError for shapes that differ, fewer than two samples, values that are not finite or negative, or
    a run without any error.
    """
    pairs = [np.atleast_2d(np.asarray(values, np.float64)) for values in (above, below)]
    if pairs[0].shape != pairs[1].shape or pairs[0].ndim != 2 or pairs[0].shape[1] < 2:
        raise ValueError(
            f"an effect needs lists of errors of the same two or more samples, got {pairs[0].shape} and "
            f"{pairs[1].shape}."
        )
    for values in pairs:
        if not (np.isfinite(values).all() and (values >= 0).all() and values.any(axis=1).all()):
            raise ValueError(
                "an effect needs finite errors, none of them negative, and some error in every run: a run "
                "diverged, or equals full precision."
            )
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, pairs[0].shape[1], (replicates, pairs[0].shape[1]))
    top, bottom = (np.prod([run[rows].mean(axis=1) for run in values], axis=0) for values in pairs)
    # A resample without any error says nothing of the ratio.
    ratios = top[bottom > 0] / bottom[bottom > 0]
    top, bottom = (np.prod(values.mean(axis=1)) for values in pairs)
    return Effect(float(top / bottom), *(float(q) for q in np.quantile(ratios, _TAILS)))


def spread_effect(with_part, without, reference, *, replicates: int = 500, seed: int = 0) -> Effect:
    """How much nearer the part brings the samples' variance to the reference's, as a ratio.

        exp(|log v_with / v| - |log v_without / v|),    v: mean over values of the variance over samples

    Below 1 the variance is nearer with the part. with_part, without, reference: [N, ...] samples from the
    same noise. The interval is the bootstrap's over samples, the same ones in all three. Raises ValueError for
    shapes that differ, fewer than two samples, or values that are not finite or do not vary.
    """
    sets = [np.asarray(x, np.float64).reshape(len(x), -1) for x in (with_part, without, reference)]
    if len({x.shape for x in sets}) != 1 or len(sets[0]) < 2:
        raise ValueError(
            f"spreads are compared of the same two or more samples, got {[x.shape for x in sets]}."
        )
    if not all(np.isfinite(x).all() and np.ptp(x, axis=0).any() for x in sets):
        raise ValueError("spreads need finite samples that vary: a run diverged.")
    # Shifted by their mean, so that the difference of squares keeps its digits.
    sets = [x - x.mean(axis=0) for x in sets]
    count = len(sets[0])
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1.0 / count), replicates)

    # One sample drawn over and over has no variance.
    drawn = drawn[(drawn > 0).sum(axis=1) > 1]

    def ratio(weights):
        with_part, without, reference = (
            (weights @ np.square(x).mean(axis=1)) - np.square(weights @ x).mean(axis=1)
            for x in sets
        )
        return np.exp(abs(np.log(with_part / reference)) - abs(np.log(without / reference)))

    low, high = np.quantile(ratio(drawn / count), _TAILS)
    estimate = ratio(np.full((1, count), 1.0 / count))[0]
    return Effect(float(estimate), float(low), float(high))


def over_seeds(ratios: Sequence[float], *, level: float = 0.95) -> Effect:
    """The geometric mean of the seeds' ratios with Student's interval of their logarithms.

    One ratio has no interval: its ends are nan. Raises ValueError without ratios, or for one that is not
    positive.
    """
    values = np.asarray(ratios, np.float64)
    if not len(values) or not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError(f"ratios over seeds must be one or more positive numbers, got {values}.")
    logs = np.log(values)
    if len(logs) == 1:
        return Effect(float(values[0]), float("nan"), float("nan"))
    found = mean_interval(logs, level=level)
    return Effect(*(float(np.exp(v)) for v in (found.estimate, found.low, found.high)))


def verdict(effects: Sequence[Effect], *, limit: float = 1.0) -> str:
    """What the effects of all seeds together say of "the ratio is below the limit".

    "holds" if every seed's interval and Student's interval over seeds lie below the limit, "reversed" if
    they lie above it, each with at most 2.5 % of error where there is nothing. Else "seeds disagree" if
    the seeds differ by more than their own intervals explain (Cochran's Q, 5 %), and "no effect" if they do
    not. For a limit other than 1 (a margin of equivalence) what is neither is "not shown". One seed alone
    gives no verdict ("one seed"). Raises ValueError without effects.
    """
    if not effects:
        raise ValueError("a verdict needs the effect of at least one seed.")
    if len(effects) == 1:
        return ONE_SEED
    _, low, high = over_seeds([effect.ratio for effect in effects])
    if high < limit and all(effect.high < limit for effect in effects):
        return HOLDS
    if low > limit and all(effect.low > limit for effect in effects):
        return REVERSED
    if limit != 1.0:
        return NOT_SHOWN
    return DISAGREE if differ(effects) else NO_EFFECT


def differ(effects: Sequence[Effect]) -> bool:
    """Whether the seeds' log ratios scatter more than their intervals explain: Cochran's Q beyond 95 %.

    Q = sum_i (l_i - l)^2 / s_i^2 ,   l the mean of l_i weighted by 1 / s_i^2 ,   chi^2 of n - 1
    """
    logs = np.log([effect.ratio for effect in effects])
    ends = np.log([(max(effect.low, 1e-300), effect.high) for effect in effects])
    # Of equal errors there is no spread at all: then any difference is more than it.
    errors = np.maximum((ends[:, 1] - ends[:, 0]) / (2 * scipy.special.ndtri(0.975)), 1e-9)
    weights = errors**-2.0
    centre = (weights * logs).sum() / weights.sum()
    spread = float((weights * np.square(logs - centre)).sum())
    return float(scipy.special.chdtrc(len(logs) - 1, spread)) < 0.05
