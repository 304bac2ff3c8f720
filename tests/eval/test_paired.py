"""paired: float64 numpy by the definitions, scikit-image's SSIM and PSNR, pooled values with intervals."""

import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.eval import paired
from qdiff_jax.runtime.mesh import data_mesh

from ..parity import eval_inputs

CASES = np.load(pathlib.Path(__file__).parents[1] / "parity" / "cases" / "eval_tools.npz")
FIRST, SECOND = eval_inputs.lpips_pair()


def ssim_by_definition(x, y, data_range):
    """Eq. 13 of Wang et al., window by window, in float64."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window = (window / window.sum())[:, :, None]
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (v[top : top + 11, left : left + 11] for v in (x, y))
            mean_a, mean_b = ((window * v).sum(axis=(0, 1)) for v in (a, b))
            var_a = (window * (a - mean_a) ** 2).sum(axis=(0, 1))
            var_b = (window * (b - mean_b) ** 2).sum(axis=(0, 1))
            cov = (window * (a - mean_a) * (b - mean_b)).sum(axis=(0, 1))
            above = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
            values.append(above / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return np.mean(values)


@pytest.mark.parametrize("noise", [0.3, 1e-3])
def test_ssim_equals_the_definition(noise):
    x = np.clip(FIRST[:, :15, :13], -1, 1)
    x = np.where(x > 0.3, 1.0, x).astype(np.float32)  # flat and bright, where float32 would cancel
    y = (x + noise * np.random.default_rng(0).normal(size=x.shape)).astype(np.float32)
    expected = [ssim_by_definition(a, b, 2.0) for a, b in zip(x, y)]
    np.testing.assert_allclose(paired.ssim(x, y), expected, rtol=1e-6)


def test_scikit_image():
    found = paired.ssim(FIRST, SECOND)
    np.testing.assert_allclose(found, CASES["ssim"], rtol=1e-6)
    np.testing.assert_allclose(paired.psnr(FIRST, SECOND), CASES["psnr"], rtol=1e-6)
    halved = paired.ssim(FIRST / 2, SECOND / 2, data_range=1.0)
    np.testing.assert_allclose(halved, CASES["ssim"], rtol=1e-5)


def test_latents_of_any_rank():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 4, 7)).astype(np.float32)
    error = np.square(y.astype(np.float64) - x).mean(axis=1)
    np.testing.assert_allclose(paired.mse(x, y), error, rtol=1e-6)
    energy = np.square(x.astype(np.float64)).mean(axis=1)
    np.testing.assert_allclose(paired.sqnr(x, y), 10 * np.log10(energy / error), rtol=1e-5)


def test_dB_to_six_digits():
    """Images and latents, small errors and large ones."""
    rng = np.random.default_rng(1)
    for shape, noise in (((3, 16, 16, 3), 0.1), ((3, 16, 16, 3), 3e-3), ((3, 4, 200), 1e-2)):
        x = rng.uniform(-1, 1, shape).astype(np.float32)
        y = (x + noise * rng.normal(size=shape)).astype(np.float32)
        inner = tuple(range(1, len(shape)))
        error = np.square(y.astype(np.float64) - x).mean(axis=inner)
        energy = np.square(x.astype(np.float64)).mean(axis=inner)
        np.testing.assert_allclose(paired.sqnr(x, y), 10 * np.log10(energy / error), rtol=1e-6)
        np.testing.assert_allclose(paired.psnr(x, y), 10 * np.log10(4 / error), rtol=1e-6)


def test_same_values_on_eight_devices():
    rng = np.random.default_rng(2)
    x = rng.uniform(-1, 1, (11, 12, 12, 3)).astype(np.float32)
    y = (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32)
    pairs, seen = [(x[:8], y[:8]), (x[8:], y[8:])], []  # the last batch does not divide

    def perceptual(a, b):
        seen.append(len(a.sharding.device_set))
        return jnp.mean(abs(a - b), (1, 2, 3))

    alone = paired.paired_metrics(pairs, perceptual=lambda a, b: jnp.mean(abs(a - b), (1, 2, 3)))
    split = paired.paired_metrics(pairs, perceptual=perceptual, mesh=data_mesh())
    assert seen == [8, 8]
    for name, interval in alone.items():
        np.testing.assert_allclose(split[name][:4], interval[:4], rtol=1e-6)
    with pytest.raises(ValueError, match="one shape"):
        paired.paired_metrics([(x[:5], y[:3])], mesh=data_mesh())


def test_equal_pairs():
    assert np.all(np.asarray(paired.ssim(FIRST, FIRST)) == 1.0)
    assert np.all(np.isposinf(paired.psnr(FIRST, FIRST)))
    assert np.all(np.isposinf(paired.sqnr(FIRST, FIRST)))
    found = paired.paired_metrics([(FIRST, FIRST)])
    assert found["psnr_db"].estimate == math.inf
    assert found["sqnr_db"].estimate == math.inf
    assert found["mse"].high == 0.0


def test_stream_pools_the_error_and_brackets_it():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, size=(12, 16, 16, 3)).astype(np.float32)
    y = (x + rng.uniform(0.02, 0.2, (12, 1, 1, 1)) * rng.normal(size=x.shape)).astype(np.float32)
    found = paired.paired_metrics(
        [(x[:5], y[:5]), (x[5:], y[5:])], perceptual=lambda a, b: jnp.mean(abs(a - b), (1, 2, 3))
    )
    error = np.square(y.astype(np.float64) - x).mean()
    energy = np.square(x.astype(np.float64)).mean()
    np.testing.assert_allclose(found["mse"].estimate, error, rtol=1e-6)
    np.testing.assert_allclose(found["psnr_db"].estimate, 10 * np.log10(4 / error), rtol=1e-6)
    np.testing.assert_allclose(found["sqnr_db"].estimate, 10 * np.log10(energy / error), rtol=1e-6)
    np.testing.assert_allclose(
        found["ssim"].estimate, np.asarray(paired.ssim(x, y)).mean(dtype=np.float64), rtol=1e-6
    )
    np.testing.assert_allclose(found["lpips"].estimate, abs(y - x).mean(), rtol=1e-5)
    for interval in found.values():
        assert interval.low < interval.estimate < interval.high
    # The error dominates the spread of both, so that both widths in dB are about the same.
    widths = [found[n].standard_error for n in ("psnr_db", "sqnr_db")]
    np.testing.assert_allclose(widths[0], widths[1], rtol=0.3)


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="one shape"):
        paired.mse(FIRST, SECOND[:1])
    with pytest.raises(ValueError, match="11 by 11"):
        paired.ssim(FIRST[:, :10], SECOND[:, :10])
    with pytest.raises(ValueError, match="at least two pairs"):
        paired.paired_metrics([])
