"""intervals: textbook standard errors, coverage of the truth, fast paths equal the slow ones."""

import numpy as np
import pytest

from qdiff_jax.eval import frechet, intervals, kid, moments
from qdiff_jax.eval.inception_score import inception_score

X = np.random.default_rng(0).normal(size=400)


def test_bootstrap_of_a_mean_has_the_textbook_error_and_is_seeded():
    found = intervals.bootstrap(lambda i: X[i].mean(), len(X), replicates=400, seed=1)
    np.testing.assert_allclose(found.standard_error, X.std(ddof=1) / 20, rtol=0.15)
    assert found.estimate == X.mean()
    assert found.low < found.estimate < found.high
    assert found == intervals.bootstrap(lambda i: X[i].mean(), len(X), replicates=400, seed=1)
    other = intervals.bootstrap(lambda i: X[i].mean(), len(X), replicates=400, seed=2)
    assert other.standard_error != found.standard_error


def test_kinds_reflect_each_other():
    args = {"replicates": 300, "seed": 3, "level": 0.8}
    skewed = np.exp(X)
    both = [
        intervals.bootstrap(lambda i: skewed[i].mean(), len(X), kind=kind, **args)
        for kind in ("percentile", "basic")
    ]
    np.testing.assert_allclose(both[0].low + both[1].high, 2 * skewed.mean(), rtol=1e-12)
    np.testing.assert_allclose(both[0].high + both[1].low, 2 * skewed.mean(), rtol=1e-12)


def test_jackknife_of_a_mean_is_exact_and_finds_the_bias_of_a_variance():
    found = intervals.jackknife(lambda i: X[i].mean(), len(X))
    expected = intervals.mean_interval(X)
    np.testing.assert_allclose(found[:4], expected[:4], rtol=1e-10)
    variance = intervals.jackknife(lambda i: X[i].var(), len(X))
    np.testing.assert_allclose(variance.estimate - variance.bias, X.var(ddof=1), rtol=1e-10)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(5)
    hits = np.zeros(3)
    for seed in range(120):
        x = rng.normal(size=40)

        def mean(i, x=x):
            return x[i].mean()

        for place, found in enumerate(
            (
                intervals.bootstrap(mean, 40, replicates=60, level=0.9, seed=seed),
                intervals.jackknife(mean, 40, groups=10, level=0.9, seed=seed),
                intervals.mean_interval(x, level=0.9),
            )
        ):
            hits[place] += found.low <= 0.0 <= found.high
    assert (hits / 120 > 0.8).all(), hits
    assert (hits / 120 < 0.98).all(), hits


def features(seed, count=200, dim=5):
    return np.random.default_rng(seed).normal(size=(count, dim)) * np.arange(1, dim + 1)


REFERENCE = moments.moments_of(features(9) + 0.3)


def test_frechet_bootstrap_is_the_bootstrap():
    x = features(1, count=50)
    fast = intervals.frechet_bootstrap(x, REFERENCE, replicates=12, seed=4)
    slow = intervals.bootstrap(
        lambda i: frechet.moments_distance(moments.moments_of(x[i]), REFERENCE),
        50,
        replicates=12,
        seed=4,
    )
    np.testing.assert_allclose(fast[:4], slow[:4], rtol=1e-6)
    assert fast.bias > 0  # fewer distinct samples: larger distances


def test_frechet_jackknife_from_the_moments_of_groups():
    x = features(1)
    parts = np.array_split(x, 8)
    found = intervals.frechet_jackknife([moments.moments_of(p) for p in parts], REFERENCE)
    rest = [np.concatenate(parts[:g] + parts[g + 1 :]) for g in range(8)]
    without = [frechet.moments_distance(moments.moments_of(r), REFERENCE) for r in rest]
    expected = np.sqrt(7 / 8 * np.square(without - np.mean(without)).sum())
    np.testing.assert_allclose(found.standard_error, expected, rtol=1e-6)


def test_the_three_errors_of_a_frechet_distance_agree_with_repetition():
    values = [
        frechet.moments_distance(moments.moments_of(features(seed, 800)), REFERENCE)
        for seed in range(100, 220)
    ]
    truth = np.std(values, ddof=1)
    errors = []
    for seed in range(6):
        x = features(seed, 800)
        groups = [moments.moments_of(p) for p in np.array_split(x, 20)]
        errors.append(
            [
                intervals.frechet_bootstrap(x, REFERENCE, replicates=40).standard_error,
                intervals.frechet_jackknife(groups, REFERENCE).standard_error,
                intervals.frechet_interval(x, REFERENCE).standard_error,
            ]
        )
    np.testing.assert_allclose(np.mean(errors, axis=0), truth, rtol=0.25)


def test_kernel_interval_is_the_jackknife_to_first_order():
    x, y = features(1, count=60), features(2, count=9)
    found = intervals.kernel_interval(x, y)
    slow = intervals.jackknife(lambda i: kid.mmd2(x[i], y), 60)
    np.testing.assert_allclose(found.estimate, slow.estimate, rtol=1e-10)
    np.testing.assert_allclose(found.standard_error, slow.standard_error, rtol=0.05)


ADM = {"splits": None, "split_size": 5000, "shuffle": False}


def posteriors(seed, count=240):
    """Logits of images that are mostly of one class each, some surer than others."""
    rng = np.random.default_rng(seed)
    sure = 3.0 * rng.gamma(2.0, size=(count, 1))
    return sure * np.eye(6)[rng.integers(0, 6, count)] + rng.normal(size=(count, 6))


@pytest.mark.parametrize(
    "rule", [ADM, {"splits": 4, "shuffle": True}], ids=["one split", "four splits"]
)
def test_the_score_s_interval_covers_as_often_as_it_says(rule):
    draws = [posteriors(seed) for seed in range(150)]
    scores = np.array([inception_score(x, **rule).mean for x in draws])
    found = [intervals.score_interval(x, **rule) for x in draws]
    hits = np.mean([one.low <= scores.mean() <= one.high for one in found])
    assert 0.89 <= hits <= 0.99, hits
    errors = [one.standard_error for one in found]
    np.testing.assert_allclose(np.mean(errors), scores.std(ddof=1), rtol=0.15)
    np.testing.assert_allclose([one.estimate for one in found], scores, rtol=1e-12)


def test_the_score_without_a_group_is_that_of_the_rest():
    x = posteriors(0, count=40)
    found = intervals.score_interval(x, groups=40, **ADM)  # groups of one
    slow = intervals.jackknife(lambda i: inception_score(x[i], **ADM).mean, 40)
    np.testing.assert_allclose(found[:5], slow[:5], rtol=1e-9)
    # A last split of a single sample, which no group can be taken from, is no obstacle.
    few = intervals.score_interval(x, groups=4, splits=None, split_size=13, shuffle=False)
    assert np.isfinite(few.standard_error)
    with pytest.raises(ValueError, match="at least 50 samples, one for each group"):
        intervals.score_interval(x, groups=50, **ADM)


def test_misuse_is_explained():
    def nothing(i):
        return float("nan")

    with pytest.raises(ValueError, match="not finite"):
        intervals.bootstrap(nothing, 5)
    with pytest.raises(ValueError, match="kind of"):
        intervals.bootstrap(nothing, 5, kind="bca")
    with pytest.raises(ValueError, match="do not make 9 groups"):
        intervals.jackknife(nothing, 5, groups=9)
    with pytest.raises(ValueError, match="between 0 and 1"):
        intervals.mean_interval(X, level=95)
    with pytest.raises(ValueError, match="at least two values"):
        intervals.mean_interval(X[:1])
    with pytest.raises(ValueError, match="two groups"):
        intervals.frechet_jackknife([REFERENCE], REFERENCE)
