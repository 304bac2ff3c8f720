"""How many samples a metric needs before it can be believed to order variants.

A metric is trusted at n samples if random subsets of n put the variants into the known order of damage
in at least 95 % of the draws. The same indices are drawn for every variant, because that is how variants are
compared: from the same noise. Subsets of a finite pool overlap more the larger they are, so sizes above half
of the pool say little and are not tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Efficiency(NamedTuple):
    """sizes: [S] int64, ascending. correct: [S] float64, share of draws in the right order. needed: the
    smallest size from which on the share stays at or above the confidence; None if there is none."""

    sizes: np.ndarray
    correct: np.ndarray
    needed: int | None


def samples_needed(
    metric: Callable[[int, np.ndarray], float],
    variants: int,
    count: int,
    sizes: Sequence[int],
    *,
    rising: bool = True,
    draws: int = 100,
    confidence: float = 0.95,
    seed: int = 0,
) -> Efficiency:
    """The smallest number of samples that orders `variants` variants correctly.

    Args:
      metric: (variant, int64 indices [n]) -> float. Variants are numbered from least to most damage.
      variants: how many, at least 2.
      count: size of the pool that indices are drawn from, without replacement.
      sizes: numbers of samples to try, each at most count / 2.
      rising: whether the metric grows with damage (an error) or falls (an agreement).
      draws: subsets per size. seed: of the subsets; a larger `draws` continues a smaller one.

    Raises ValueError for sizes that the pool cannot give or fewer than two variants.
    """
    sizes = np.unique(np.asarray(sizes, np.int64))
    if variants < 2 or not len(sizes) or sizes[0] < 2 or sizes[-1] > count // 2:
        raise ValueError(
            f"samples_needed takes two variants or more and sizes from 2 to half of the pool, "
            f"{count // 2}: got {variants} variants and sizes {sizes.tolist()}."
        )
    sign = 1.0 if rising else -1.0
    correct = np.zeros(len(sizes))
    for place, size in enumerate(sizes):
        right = 0
        for draw in range(draws):
            chosen = np.random.default_rng((seed, place, draw)).choice(count, size, replace=False)
            values = [sign * metric(variant, np.sort(chosen)) for variant in range(variants)]
            right += all(a < b for a, b in zip(values, values[1:]))
        correct[place] = right / draws
    trusted = correct >= confidence
    # From the largest size down: the last run of trusted sizes must reach the end.
    first = len(sizes) - int(np.argmin(trusted[::-1])) if not trusted.all() else 0
    needed = int(sizes[first]) if first < len(sizes) else None
    return Efficiency(sizes, correct, needed)
