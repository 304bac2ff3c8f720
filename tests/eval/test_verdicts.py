"""Verdicts on parts of methods: the interval of a paired ratio, and what several seeds say together."""

import numpy as np
import pytest

from qdiff_jax.eval.verdicts import (
    DISAGREE,
    HOLDS,
    NO_EFFECT,
    NOT_SHOWN,
    ONE_SEED,
    REVERSED,
    Effect,
    over_seeds,
    paired_effect,
    spread_effect,
    verdict,
)


def errors(seed=0, count=256):
    return np.random.default_rng(seed).gamma(1.0, 1.0, count)


def seeds(rng, count, *, mean=0.0, between=0.3, within=0.02):
    """Effects of some seeds: log ratios with noise between seeds, and intervals that see samples alone."""
    truths = mean + between * rng.standard_normal(count)
    logs = truths + within * rng.standard_normal(count)
    return [Effect(*np.exp([v, v - 1.96 * within, v + 1.96 * within])) for v in logs]


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


def test_a_ratio_of_ratios_is_one_where_both_gain_alike():
    a, b = errors(0), errors(1)
    # The part takes 0.6 of one error and 0.3 of the other: it gains twice as much there.
    same = paired_effect([0.6 * a, b], [a, 0.6 * b])
    twice = paired_effect([0.3 * a, b], [a, 0.6 * b])
    np.testing.assert_allclose(same, (1.0, 1.0, 1.0), rtol=1e-12)
    np.testing.assert_allclose(twice, (0.5, 0.5, 0.5), rtol=1e-12)
    assert paired_effect(a, b) == paired_effect([a], [b])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_part_without_effect_seldom_gets_a_verdict(count):
    rng = np.random.default_rng(count)
    found = [verdict(seeds(rng, count)) for _ in range(2000)]
    false = np.mean([v in (HOLDS, REVERSED) for v in found])
    assert false <= 0.07
    # The signs alone, which the intervals over samples leave to chance, agree this often.
    rng = np.random.default_rng(count)
    agree = [len({e.ratio < 1 for e in seeds(rng, count)}) == 1 for _ in range(2000)]
    assert np.mean(agree) > 0.8 * 0.5 ** (count - 1)
    assert count > 3 or np.mean(agree) > 0.2


def test_an_effect_that_seeds_share_is_found():
    rng = np.random.default_rng(0)
    found = [verdict(seeds(rng, 3, mean=-0.3, between=0.05)) for _ in range(300)]
    assert np.mean([v == HOLDS for v in found]) > 0.9
    found = [verdict(seeds(rng, 3, mean=0.3, between=0.05)) for _ in range(300)]
    assert np.mean([v == REVERSED for v in found]) > 0.9


def test_seeds_that_disagree_are_told_from_no_effect():
    rng = np.random.default_rng(0)
    noisy = [verdict(seeds(rng, 3)) for _ in range(300)]
    quiet = [verdict(seeds(rng, 3, between=0.0)) for _ in range(300)]
    assert np.mean([v == DISAGREE for v in noisy]) > 0.8
    assert np.mean([v == NO_EFFECT for v in quiet]) > 0.9


@pytest.mark.parametrize(
    ("effects", "limit", "expected"),
    [
        ([(0.8, 0.7, 0.9), (0.82, 0.7, 0.9), (0.81, 0.7, 0.9)], 1.0, HOLDS),
        # The mean is far from 1; one seed alone is not.
        ([(0.8, 0.7, 0.9), (0.82, 0.7, 0.9), (0.81, 0.6, 1.01)], 1.0, NO_EFFECT),
        ([(1.2, 1.1, 1.3), (0.8, 0.7, 0.9), (1.0, 0.9, 1.1)], 1.0, DISAGREE),
        ([(1.2, 1.1, 1.3), (1.21, 1.1, 1.3), (1.22, 1.1, 1.3)], 1.0, REVERSED),
        # All to one side, but by amounts too unlike for their mean to be told from none.
        ([(0.99, 0.98, 0.995), (0.9, 0.89, 0.91), (0.4, 0.39, 0.41)], 1.0, DISAGREE),
        ([(0.8, 0.7, 0.9)], 1.0, ONE_SEED),
        ([(1.01, 1.0, 1.02), (1.0, 0.99, 1.01), (1.0, 0.99, 1.01)], 1.05, HOLDS),
        ([(1.04, 1.0, 1.08), (1.0, 0.99, 1.01), (1.0, 0.99, 1.01)], 1.05, NOT_SHOWN),
        ([(1.2, 1.1, 1.3), (1.21, 1.1, 1.3), (1.22, 1.1, 1.3)], 1.05, REVERSED),
    ],
)
def test_a_verdict_asks_every_seed_and_their_mean(effects, limit, expected):
    assert verdict([Effect(*values) for values in effects], limit=limit) == expected


def test_the_mean_over_seeds_treats_better_and_worse_alike():
    found = over_seeds([0.5, 2.0])
    assert found.ratio == pytest.approx(1.0)
    assert found.low * found.high == pytest.approx(1.0)
    # |mean| beyond 2.48 standard deviations is what three seeds need: t of 2 degrees, 4.303 / sqrt(3).
    logs = np.array([-1.0, 0.0, 1.0]) + 2.5
    assert over_seeds(np.exp(logs)).low > 1.0 > over_seeds(np.exp(logs - 0.05)).low
    assert np.isnan(over_seeds([0.7]).low)


def test_variance_nearer_to_the_references_is_below_one_from_either_side():
    x = np.random.default_rng(0).standard_normal((256, 8, 8, 1)) + 3.0
    centre = x.mean(axis=0)
    wide, narrow = (centre + factor * (x - centre) for factor in (1.2, 0.9))
    # Variances 1.44 and 0.81 of the reference's.
    assert spread_effect(narrow, wide, x).ratio == pytest.approx(1 / (0.81 * 1.44))
    nearer, farther = spread_effect(narrow, wide, x), spread_effect(wide, narrow, x)
    assert nearer.high < 1.0 < farther.low
    assert nearer.ratio * farther.ratio == pytest.approx(1.0)


@pytest.mark.parametrize(
    "pair",
    [
        (np.ones(3), np.ones(4)),
        (np.ones(1), np.ones(1)),
        (np.array([1.0, np.nan]), np.ones(2)),
        (np.array([2.0, -1.0]), np.ones(2)),
        (np.ones(2), np.zeros(2)),
        (np.zeros(2), np.ones(2)),
    ],
)
def test_errors_that_cannot_be_compared_are_refused(pair):
    with pytest.raises(ValueError, match="an effect needs"):
        paired_effect(*pair)


def test_spreads_of_few_samples_have_an_interval():
    x = np.random.default_rng(0).standard_normal((3, 5))  # a ninth of the resamples repeat one
    found = spread_effect(0.9 * x, 1.2 * x, x)
    assert np.isfinite(found).all()
    assert found.low <= found.ratio <= found.high


def test_spreads_of_constant_samples_are_refused():
    x = np.random.default_rng(0).standard_normal((4, 3))
    with pytest.raises(ValueError, match="finite samples that vary"):
        spread_effect(np.ones((4, 3)), x, x)
    with pytest.raises(ValueError, match="the same two or more"):
        spread_effect(x, x, x[:3])


def test_a_verdict_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one seed"):
        verdict([])
    with pytest.raises(ValueError, match="positive"):
        over_seeds([0.0, 1.0])
