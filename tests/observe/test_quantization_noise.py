"""PTQD's statistics: the numbers of Gaussian noise, the identity, and pairs under guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.diffusion.corrections import correct
from qdiff_jax.diffusion.guidance import classifier_free
from qdiff_jax.diffusion.samplers import ddim
from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.diffusion.timesteps import make_timesteps
from qdiff_jax.observe.quantization_noise import (
    VARIANTS,
    paired,
    pairs,
    ptqd_correction,
    step_noise,
)
from qdiff_jax.observe.trajectory import record_trajectories
from qdiff_jax.quant.timed import select, step_context

SCHEDULE = make_schedule("linear")
EVERY = pytest.mark.parametrize("variant", VARIANTS)


def gaussian(slope, spread, bias, mean=0.0, shape=(200, 20, 20, 4)):
    rng = np.random.default_rng(0)
    eps, noise = rng.standard_normal((2, *shape))
    eps += mean
    return eps, eps + slope * eps + bias + spread * noise


def corrected(eps, quantized, variant, **options):
    found = ptqd_correction([step_noise(eps, quantized, variant)], [7.0], **options)
    row = select(found, step_context(7.0, 0))
    return np.asarray(correct(row, jnp.asarray(quantized, jnp.float32)), np.float64), row


def mse(a, b):
    return np.mean(np.square(a - b))


@EVERY
@pytest.mark.parametrize(
    ("slope", "spread", "bias", "before", "after"),
    [
        (0.1, 0.05, 0.02, 0.01289, 0.00206),
        (0.3, 0.2, 0.05, 0.1329, 0.0237),
        (-0.1, 0.05, 0.02, 0.01289, 0.01249),  # only the bias: a negative slope stays
        (0.0, 0.3, 0.0, 0.0899, 0.0899),
    ],
)
def test_error_of_gaussian_noise_before_and_after(slope, spread, bias, before, after, variant):
    eps, quantized = gaussian(slope, spread, bias)
    np.testing.assert_allclose(mse(quantized, eps), before, rtol=0.01)
    found, row = corrected(eps, quantized, variant)
    np.testing.assert_allclose(mse(found, eps), after, rtol=0.01)
    residual = spread**2 + min(slope, 0.0) ** 2
    np.testing.assert_allclose(row.variance, residual / (1 + max(slope, 0)) ** 2, rtol=0.01)


@EVERY
def test_without_error_the_correction_is_the_identity(variant):
    eps, _ = gaussian(0.0, 0.0, 0.0, shape=(4, 3, 3, 2))
    noise = step_noise(eps, eps, variant)
    assert (noise.slope, noise.variance, noise.snr) == (0.0, 0.0, np.inf)
    _, row = corrected(eps, eps, variant)
    assert (row.scale == 1).all()
    assert (row.shift == 0).all()
    assert row.variance == 0


@EVERY
def test_the_corrected_estimate_never_errs_more_on_the_pairs_themselves(variant):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        eps = rng.standard_normal((8, 4, 4, 3))
        quantized = np.round((1 + rng.uniform(-0.3, 0.3)) * eps + rng.uniform(-0.2, 0.2), 0)
        found, _ = corrected(eps, quantized, variant)
        assert mse(found, eps) <= mse(quantized, eps) * (1 + 1e-6)


def test_fixed_is_unbiased_by_channel_where_the_estimate_has_a_mean():
    eps, quantized = gaussian(0.3, 0.1, np.array([0.0, 0.1, -0.2, 0.4]), mean=0.5)
    for variant in VARIANTS:
        found, _ = corrected(eps, quantized, variant)
        left = np.abs((found - eps).mean(axis=(0, 1, 2))).max()
        assert (left < 1e-3) == (variant == "fixed")


def test_a_term_left_out_leaves_the_others_those_of_the_whole_error():
    """With a mean in the estimate, slope and bias explain parts of the same error."""
    eps, quantized = gaussian(0.3, 0.1, np.array([0.0, 0.1, -0.2, 0.4]), mean=0.5)
    error = quantized - eps
    found, row = corrected(eps, quantized, "fixed", slope=False)
    np.testing.assert_allclose((found - eps).mean(axis=(0, 1, 2)), 0.0, atol=1e-6)
    np.testing.assert_array_equal(row.scale, 1.0)
    residual = error - error.mean(axis=(0, 1, 2))
    np.testing.assert_allclose(row.variance, residual.var(), rtol=1e-5)
    _, row = corrected(eps, quantized, "fixed", bias=False)
    np.testing.assert_array_equal(row.shift, 0.0)
    np.testing.assert_allclose(row.scale, 1 / 1.3, rtol=1e-3)


def test_the_sampler_keeps_its_noise_when_the_variance_is_not_calibrated():
    _, row = corrected(*gaussian(0.1, 0.3, 0.0), "fixed", calibrate_variance=False)
    assert row.variance == 0
    assert (row.scale < 0.95).all()


def labelled(variables, x, ctx, y):
    bias = 0.1 * y.astype(jnp.float32).reshape(-1, 1, 1, 1)
    return variables["gain"] * jnp.tanh(x + 0.001 * ctx.t) + bias


@pytest.mark.parametrize("scale", [None, 1.0, 0.0, 2.5])
def test_pairs_are_of_the_guided_estimate(scale):
    plan = ddim(SCHEDULE, make_timesteps("uniform", 1000, 4))
    guidance = classifier_free(scale, 3)
    trajectory = record_trajectories(
        labelled,
        {"gain": jnp.float32(0.9)},
        plan,
        jax.random.key(0),
        range(5),
        shape=(2, 2, 1),
        y=np.arange(5, dtype=np.int32) % 3,
        guidance=guidance,
    )
    source = paired(trajectory, guidance, plan, SCHEDULE)
    same = list(pairs(labelled, {"gain": jnp.float32(0.9)}, source, batch_size=2))
    other = list(pairs(labelled, {"gain": jnp.float32(1.0)}, source))
    for j, ((full, again), (_, louder)) in enumerate(zip(same, other, strict=True)):
        np.testing.assert_allclose(again, full, atol=1e-6)
        x = trajectory.x[j, :: len(trajectory.branch) // 5]
        np.testing.assert_allclose(
            louder - full, 0.1 * np.tanh(x + 0.001 * trajectory.t[j]), atol=1e-5
        )


def test_pairs_and_statistics_that_do_not_fit_are_refused():
    eps = np.zeros((2, 3))
    with pytest.raises(ValueError, match="variant 'code' .* unknown"):
        step_noise(eps, eps, "code")
    with pytest.raises(ValueError, match="one shape"):
        step_noise(eps, eps[:1])
    with pytest.raises(ValueError, match="timestep 3 is not finite"):
        ptqd_correction([step_noise(eps + [1, 2, 3], eps * np.nan)], [3.0])
