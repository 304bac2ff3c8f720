"""Whether a part of a method helps: errors with it and without it, sample by sample, over several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

HOLDS, NO_EFFECT, REVERSED = "holds", "no effect", "reversed"


class Effect(NamedTuple):
    """ratio: mean error with the part / without it, of one seed; low, high: its 95 % interval."""

    ratio: float
    low: float
    high: float


def paired_effect(with_part, without, *, replicates: int = 2000, seed: int = 0) -> Effect:
    """The ratio of two mean errors over the same samples, with the bootstrap's percentile interval.

    with_part, without: [N] errors >= 0 of the same samples under the same noise: resampling keeps them
    together, so that what a sample costs both does not widen the interval.

    Raises ValueError for shapes that differ, fewer than two samples, values that are not finite, or no
    error at all without the part.
    """
    pairs = [np.asarray(values, np.float64) for values in (with_part, without)]
    if pairs[0].shape != pairs[1].shape or pairs[0].ndim != 1 or len(pairs[0]) < 2:
        raise ValueError(
            f"an effect needs two lists of errors of the same two or more samples, got {pairs[0].shape} "
            f"and {pairs[1].shape}."
        )
    if not all(np.isfinite(values).all() for values in pairs) or not pairs[1].sum() > 0:
        raise ValueError("an effect needs finite errors, and some error without the part.")
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(pairs[0]), (replicates, len(pairs[0])))
    top, bottom = (values[rows].mean(axis=1) for values in pairs)
    # A resample without any error says nothing of the ratio.
    ratios = top[bottom > 0] / bottom[bottom > 0]
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Effect(float(pairs[0].mean() / pairs[1].mean()), float(low), float(high))


def verdict(effects: Sequence[Effect]) -> str:
    """ "holds" if the part lowers the error with every seed beyond its interval, "reversed" if it raises it
    with every seed, else "no effect". Raises ValueError without effects."""
    if not effects:
        raise ValueError("a verdict needs the effect of at least one seed.")
    if all(effect.high < 1.0 for effect in effects):
        return HOLDS
    if all(effect.low > 1.0 for effect in effects):
        return REVERSED
    return NO_EFFECT


def overall(effects: Sequence[Effect]) -> tuple[float, float, float]:
    """(geometric mean of the ratios, smallest, largest)."""
    ratios = np.array([effect.ratio for effect in effects])
    return float(np.exp(np.log(ratios).mean())), float(ratios.min()), float(ratios.max())
