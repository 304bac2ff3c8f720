"""Verdicts on parts of methods: the interval of a paired ratio, and when every seed agrees."""

import numpy as np
import pytest

from qdiff_jax.eval.verdicts import (
    HOLDS,
    NO_EFFECT,
    REVERSED,
    Effect,
    overall,
    paired_effect,
    verdict,
)


def errors(seed=0, count=256):
    return np.random.default_rng(seed).gamma(1.0, 1.0, count)


def test_a_common_factor_is_found_exactly_whatever_the_samples_spread():
    base = errors()
    found = paired_effect(0.8 * base, base)
    np.testing.assert_allclose(found, (0.8, 0.8, 0.8), rtol=1e-12)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        base = rng.gamma(4.0, 1.0, 200)
        # Independent factors of mean 0.9: the true ratio of means is 0.9.
        found = paired_effect(base * rng.gamma(9.0, 0.1, 200), base, replicates=300, seed=seed)
        covered += found.low <= 0.9 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_pairing_makes_the_interval_narrow():
    base, noise = errors(0), 1.0 + 0.1 * np.random.default_rng(1).standard_normal(256)
    paired = paired_effect(base * noise, base)
    unpaired = paired_effect(np.random.default_rng(2).permutation(base * noise), base)
    assert paired.high - paired.low < 0.2 * (unpaired.high - unpaired.low)


@pytest.mark.parametrize(
    ("effects", "expected"),
    [
        ([(0.8, 0.7, 0.9), (0.9, 0.85, 0.95)], HOLDS),
        ([(0.8, 0.7, 0.9), (0.9, 0.8, 1.01)], NO_EFFECT),
        ([(1.2, 1.1, 1.3), (0.8, 0.7, 0.9)], NO_EFFECT),
        ([(1.2, 1.1, 1.3), (1.1, 1.05, 1.2)], REVERSED),
    ],
)
def test_a_verdict_asks_every_seed(effects, expected):
    assert verdict([Effect(*values) for values in effects]) == expected


def test_the_overall_ratio_treats_better_and_worse_alike():
    mean, low, high = overall([Effect(0.5, 0, 0), Effect(2.0, 0, 0)])
    assert (mean, low, high) == (pytest.approx(1.0), 0.5, 2.0)


@pytest.mark.parametrize(
    "pair",
    [
        (np.ones(3), np.ones(4)),
        (np.ones(1), np.ones(1)),
        (np.array([1.0, np.nan]), np.ones(2)),
        (np.ones(2), np.zeros(2)),
    ],
)
def test_errors_that_cannot_be_compared_are_refused(pair):
    with pytest.raises(ValueError, match="an effect needs"):
        paired_effect(*pair)


def test_a_verdict_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one seed"):
        verdict([])
