"""Preconditioning of consistency models: the boundary, unit variance, the clip."""

import numpy as np
import pytest

from qdiff_jax.diffusion.consistency import SIGMA_MAX, SIGMA_MIN, denoised, preconditioning


def test_at_the_lowest_level_the_image_is_what_comes_in():
    at = preconditioning(np.full(2, SIGMA_MIN))
    x = np.random.default_rng(0).uniform(-1, 1, (2, 3, 3, 1)).astype(np.float32)
    np.testing.assert_array_equal(denoised(at, x, np.full_like(x, 7)), x)


def test_the_network_reads_and_writes_at_unit_scale():
    """Var(data) = sigma_data^2: c_in x has variance 1, and far out the image is c_out F = F / 2."""
    sigma = np.array([SIGMA_MAX, 2.0, 0.1])
    at = preconditioning(sigma)
    np.testing.assert_allclose(at.inward**2 * (sigma**2 + 0.25), 1, rtol=1e-6)
    np.testing.assert_allclose(at.t, 250 * np.log(sigma), rtol=1e-6)
    np.testing.assert_allclose((at.skip[0], at.out[0]), (3.9e-5, 0.499978), rtol=3e-3)
    other = preconditioning(2.0, sigma_min=1.0, sigma_data=1.0)
    np.testing.assert_allclose((other.skip, other.out), (1 / 2, 1 / np.sqrt(5)), rtol=1e-6)


def test_the_clip():
    at = preconditioning(np.array([SIGMA_MAX]))
    x, estimate = np.zeros((1, 2), np.float32), np.float32([[3.0, -3.0]])
    np.testing.assert_array_equal(denoised(at, x, estimate), [[1, -1]])
    free = denoised(at, x, estimate, clip=None)
    np.testing.assert_allclose(free, [[1.49993, -1.49993]], rtol=1e-4)


def test_a_level_without_noise_is_refused():
    with pytest.raises(ValueError, match=r"noise levels must be above 0, got 0\.0"):
        preconditioning(np.array([1.0, 0.0]))
