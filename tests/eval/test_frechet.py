"""frechet: scipy's matrix root to 1e-6, closed forms, low rank, extrapolation, first-order error."""

import numpy as np
import pytest
import scipy.linalg

from qdiff_jax.eval import frechet, moments


def gaussian_features(count, dim=8, seed=0, shift=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(dim, dim))
    return shift + scale * rng.normal(size=(count, dim)) @ mix


def fitted(x):
    return x.mean(axis=0), np.cov(x, rowvar=False)


def by_matrix_root(mu1, cov1, mu2, cov2):
    """Heusel et al.'s eq. 6 as the published tools evaluate it."""
    root = scipy.linalg.sqrtm(cov1 @ cov2)
    return np.sum((mu1 - mu2) ** 2) + np.trace(cov1 + cov2 - 2 * root.real)


@pytest.mark.parametrize("count", [400, 9])
def test_equals_the_matrix_root(count):
    a, b = gaussian_features(count), gaussian_features(count, seed=1, shift=0.1, scale=1.2)
    a, b = fitted(a), fitted(b)
    found = frechet.frechet_distance(*a, *b)
    np.testing.assert_allclose(found, by_matrix_root(*a, *b), rtol=1e-6)
    np.testing.assert_allclose(found, frechet.frechet_distance(*b, *a), rtol=1e-9)


def test_closed_form_for_commuting_covariances():
    sd1, sd2 = np.array([1.0, 1e-4, 3.0, 0.0]), np.array([2.0, 3e-4, 0.0, 1.0])
    found = frechet.frechet_distance(np.zeros(4), np.diag(sd1**2), np.ones(4), np.diag(sd2**2))
    np.testing.assert_allclose(found, 4 + np.sum((sd1 - sd2) ** 2), rtol=1e-12)


def test_fewer_samples_than_dimensions():
    """Two disjoint sets of rank 4 in 40 dimensions; the reference is exact arithmetic on their
    4x4 Gram matrices, where the matrix root of the full product is off by roots of rounding."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 40))
    gram = (a - a.mean(0)) @ (b - b.mean(0)).T / 4
    overlap = scipy.linalg.svdvals(gram).sum()
    (mu1, c1), (mu2, c2) = fitted(a), fitted(b)
    expected = np.sum((mu1 - mu2) ** 2) + np.trace(c1) + np.trace(c2) - 2 * overlap
    np.testing.assert_allclose(frechet.frechet_distance(mu1, c1, mu2, c2), expected, rtol=1e-10)
    np.testing.assert_allclose(
        frechet.frechet_distance(mu1, c1, mu2, c2), by_matrix_root(mu1, c1, mu2, c2), atol=1e-3
    )


def test_equal_moments_are_at_distance_zero_over_a_wide_spectrum():
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(60, 60)))[0]
    cov = rotation @ np.diag(np.logspace(2, -9, 60)) @ rotation.T
    found = frechet.frechet_distance(np.zeros(60), cov, np.zeros(60), cov)
    assert abs(found) < 1e-10 * np.trace(cov)


def test_takes_the_moments_of_streams():
    a, b = gaussian_features(50), gaussian_features(60, seed=1)
    expected = frechet.frechet_distance(*fitted(a), *fitted(b))
    own, reference = moments.moments_of(a), moments.moments_of(b)
    np.testing.assert_allclose(frechet.moments_distance(own, reference), expected, rtol=1e-10)
    np.testing.assert_allclose(frechet.distance_to(reference)(own), expected, rtol=1e-7)


def test_extrapolation_removes_the_bias_of_a_finite_sample():
    """Samples of the reference's own Gaussian: the truth is 0, a finite N reads about D^2 / 2N."""
    dim = 12
    reference = moments.Moments(10**9, np.zeros(dim), np.eye(dim) * (10**9 - 1))
    x = np.random.default_rng(0).normal(size=(2000, dim))
    found = frechet.frechet_infinity(x, reference, smallest=200, seed=1)
    assert found.sizes[0] == 200
    assert found.sizes[-1] == 2000
    assert found.distances[0] > 10 * abs(found.distance)
    assert found.slope > 0
    again = frechet.frechet_infinity(x, reference, smallest=200, seed=1)
    assert again.distance == found.distance
    with pytest.raises(ValueError, match="below the 2000 samples"):
        frechet.frechet_infinity(x, reference)
    with pytest.raises(ValueError, match="subsets of 12 samples have singular covariances in 12"):
        frechet.frechet_infinity(x, reference, smallest=12)


def test_influence_is_the_derivative_in_a_sample_s_weight():
    x = gaussian_features(60, dim=4)
    reference = moments.moments_of(gaussian_features(80, dim=4, seed=1, shift=0.3))
    pull = frechet.frechet_influence(x, reference, batch=17)
    np.testing.assert_allclose(pull.sum(), 0.0, atol=1e-9)

    def biased_distance(weights):  # covariance divided by n, as a weight of each sample is defined
        mean = weights @ x
        cov = (x - mean).T @ ((x - mean) * weights[:, None])
        return frechet.frechet_distance(mean, cov, reference.mean, reference.cov)

    uniform, step = np.full(60, 1 / 60), 1e-5
    for index in (0, 7):
        tilted = (1 - step) * uniform
        tilted[index] += step
        slope = (biased_distance(tilted) - biased_distance(uniform)) / step
        np.testing.assert_allclose(pull[index], slope, rtol=0.05, atol=0.3)
    with pytest.raises(ValueError, match="more samples than"):
        frechet.frechet_influence(x[:4], reference)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mu, cov: (mu[:3], cov), "takes a mean"),
        (lambda mu, cov: (mu[:3], cov[:3, :3]), "one dimension"),
        (lambda mu, cov: (mu * np.nan, cov), "not finite"),
        (lambda mu, cov: (mu, cov + np.triu(np.ones_like(cov), 1)), "not symmetric"),
        (lambda mu, cov: (mu, cov - 5 * np.eye(4)), "positive semi-definite"),
    ],
)
def test_misuse_is_explained(change, message):
    mu, cov = np.zeros(4), np.eye(4)
    with pytest.raises(ValueError, match=message):
        frechet.frechet_distance(mu, cov, *change(mu, cov))
