"""Deviation, noise, sensitivity, grids, softmax, Taylor, pairs: numbers whose value is known beforehand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.analysis.beneficial import (
    FULL_ONLY,
    beneficial_noise,
    compare_frechet,
    compare_pairs,
)
from qdiff_jax.analysis.deviation import rollout_states, trajectory_deviation
from qdiff_jax.analysis.forced import forced_eps
from qdiff_jax.analysis.grids import activation_bounds
from qdiff_jax.analysis.histograms import grid_use, quantization_histograms
from qdiff_jax.analysis.noise import noise_correlation, regress
from qdiff_jax.analysis.sensitivity import layer_sensitivity
from qdiff_jax.analysis.softmax import fit_power_law, softmax_power_law
from qdiff_jax.analysis.taylor import taylor_argument
from qdiff_jax.diffusion.corrections import affine_table, hooks_of
from qdiff_jax.eval.moments import moments_of
from qdiff_jax.quant.qparams import from_range
from qdiff_jax.quant.spec import QuantSpec

SHIFT = 0.1


@pytest.fixture(scope="module")
def shifted(unet):
    """A "quantized" network whose estimate is full precision's plus SHIFT, everywhere."""
    params = jax.tree.map(lambda leaf: leaf, unet.model.params)
    params["out"]["conv_out"]["bias"] = params["out"]["conv_out"]["bias"] + SHIFT
    return {"params": params, "quant": {}}


@pytest.mark.slow
def test_the_sampler_is_recorded_as_it_runs(unet):
    states = rollout_states(unet, unet.full)
    np.testing.assert_allclose(states[1:], unet.trajectory.x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(forced_eps(unet, unet.full), unet.trajectory.eps, atol=1e-4)


@pytest.mark.slow
def test_a_constant_error_moves_each_step_by_its_coefficient(unet, shifted):
    result = trajectory_deviation(unet, {"full": unet.full, "shifted": shifted})
    assert result.verdict["full/final"] == 0.0
    energy = np.mean(rollout_states(unet, unet.full)[:-1] ** 2, axis=(1, 2, 3, 4))
    expected = (unet.sampler.rows["eps_coefficient"] * SHIFT) ** 2 / energy
    np.testing.assert_allclose(result.single["shifted"], expected, rtol=1e-3)
    # Nothing has accumulated before the first step that is visited, the noisiest.
    first = [values["shifted"][-1] for values in (result.accumulated, result.single)]
    assert first[0] == pytest.approx(first[1], rel=1e-3)
    # Errors of one sign add up, which independent ones would not.
    assert result.verdict["shifted/amplification"] > 1


def test_the_regression_recovers_how_noise_was_made():
    rng = np.random.default_rng(0)
    eps, fresh = rng.normal(size=(2, 200_000))
    found = regress(eps, 0.1 * eps + 0.02 + 0.05 * fresh)
    assert found.slope == pytest.approx(0.1, abs=1e-3)
    assert found.bias == pytest.approx(0.02, abs=1e-3)
    assert found.r2 == pytest.approx(0.01 / 0.0125, abs=5e-3)
    assert found.residual_std == pytest.approx(0.05, rel=1e-2)
    assert found.skewness == pytest.approx(0.0, abs=0.05)
    assert found.kurtosis == pytest.approx(0.0, abs=0.05)
    heavy = regress(eps, rng.laplace(size=eps.size))
    assert heavy.kurtosis == pytest.approx(3.0, abs=0.3)
    assert heavy.r2 < 1e-3
    assert regress(eps, 0 * eps) == (0.0,) * 6


@pytest.mark.slow
def test_a_constant_error_is_bias_and_follows_nothing(unet, shifted):
    result = noise_correlation(unet, {"shifted": shifted})
    np.testing.assert_allclose(result.bias["shifted"], SHIFT, rtol=1e-3)
    np.testing.assert_allclose(result.slope["shifted"], 0.0, atol=1e-4)
    assert result.points.shape[0] == 2
    # What is sampled with a correction is measured with it.
    steps = np.asarray(unet.sampler.timesteps)
    ones = np.ones((len(steps), 1))
    hooks = hooks_of(affine_table(ones, -SHIFT * ones, 0 * steps, steps), unet.sampler)
    corrected = noise_correlation(unet, {"shifted": shifted}, hooks={"shifted": hooks})
    np.testing.assert_allclose(corrected.bias["shifted"], 0.0, atol=1e-5)


@pytest.mark.slow
def test_a_layer_that_multiplies_with_zero_is_not_sensitive(unet):
    params = jax.tree.map(lambda leaf: leaf, unet.model.params)
    dead = params["up_0_block_1"]["conv2"]
    dead["kernel"] = 0 * dead["kernel"]
    subject = unet._replace(model=unet.model._replace(params=params))
    result = layer_sensitivity(subject, bits=(2, 8), evaluations=8)
    weight = result.weights.index("up_0_block_1/conv2:weight")
    activation = result.activations.index("up_0_block_1/conv2:input")
    assert result.weight_error[:, weight].max() < 1e-9
    assert result.activation_error[:, activation].max() < 1e-9
    # Six more bits divide an error's square by about 4^6.
    ratio = np.median(result.weight_error[0]) / np.median(result.weight_error[1])
    assert 300 < ratio < 30_000
    assert 0.2 < result.verdict["weights/share_of_top_5"] <= 1.0


@pytest.mark.slow
def test_bounds_cover_what_the_trajectories_hold(unet):
    lo, hi = activation_bounds(unet)["conv_in/conv:input"]
    assert (lo, hi) == (unet.trajectory.x.min(), unet.trajectory.x.max())


def test_uniform_values_use_a_whole_grid():
    values = np.random.default_rng(0).uniform(0, 1, 50_000)
    grid = from_range(QuantSpec(), 0.0, 1.0, 0, 15)
    use = grid_use(grid, values)
    np.testing.assert_allclose(use.levels, np.arange(16) / 15, atol=1e-6)
    # Signal 1/3, error step^2 / 12.
    assert use.sqnr_db == pytest.approx(10 * np.log10(900), abs=0.1)
    assert 3.9 < use.entropy <= 4.0
    assert use.clipped == 0.0
    half = grid_use(from_range(QuantSpec(), 0.0, 0.5, 0, 15), values)
    assert half.clipped == pytest.approx(0.5 - 0.5 / 30, abs=0.01)
    assert half.sqnr_db < use.sqnr_db


@pytest.mark.slow
def test_more_bits_raise_the_signal_to_noise_ratio_by_six_decibels_each(unet):
    coarse, fine = (quantization_histograms(unet, bits=bits) for bits in ("w4a6", "w6a8"))
    for name, least in (("median_weight_sqnr", 8), ("median_activation_sqnr", 11)):
        assert least < fine.verdict[name] - coarse.verdict[name] < 14
    assert fine.verdict["median_weight_entropy"] > coarse.verdict["median_weight_entropy"]
    with pytest.raises(ValueError, match="need both widths"):
        quantization_histograms(unet, bits="w4a32")


def test_power_laws_and_exponentials_are_told_apart():
    """Exponent 2.5 and the mean likelihood ratios +.42 and -.08 are those of the distributions."""
    rng = np.random.default_rng(0)
    pareto = fit_power_law((1 - rng.uniform(size=100_000)) ** (-1 / 1.5))
    assert pareto.exponent == pytest.approx(2.5, rel=0.02)
    assert pareto.tail_exponent == pytest.approx(2.5, rel=0.05)
    assert pareto.tail_r2 > 0.99
    assert pareto.likelihood > 0.3
    exponential = fit_power_law(1.0 + rng.exponential(size=100_000))
    assert exponential.likelihood < -0.03
    assert exponential.tail_r2 < pareto.tail_r2
    assert np.isnan(fit_power_law(np.full(100, 0.25))).all()


@pytest.mark.slow
def test_every_attention_layer_is_fitted_at_every_step(dit):
    result = softmax_power_law(dit)
    assert result.names == ("blocks_0/attn_pv", "blocks_1/attn_pv")
    assert result.fits.shape == (4, 2, 4)
    assert set(result.curves) == {f"{dit.trajectory.t[i]:g}" for i in (0, 2, 3)}
    for x, share in result.curves.values():
        assert np.all(np.diff(x) >= 0)
        assert share[0] == 1.0


@pytest.mark.slow
def test_the_second_order_prediction_holds_for_small_perturbations(unet):
    result = taylor_argument(unet, settings=("w8a32", "w2a32", "w8a8"), evaluations=8)
    assert result.verdict["ratio_w8a32"] == pytest.approx(1.0, abs=0.05)
    assert result.cosine[0] > 0.99
    # A tenth of the perturbation: the remainder shrinks with it, whatever the bits.
    along = result.along[:, 0] / (result.predicted * result.fractions[0] ** 2)
    full = result.along[:, -1] / result.predicted
    np.testing.assert_allclose(result.along[:, -1], result.loss)
    assert abs(along[1] - 1) < abs(full[1] - 1)
    assert along[0] == pytest.approx(1.0, abs=0.05)
    assert result.predicted[1] > 100 * result.predicted[0]
    assert result.loss[2] > result.loss[0]


def test_pairs_are_compared_seed_by_seed():
    fine = np.array([1.0, 2.0, 3.0, 4.0])
    pair = compare_pairs(fine, fine + [0.5, 0.5, 0.5, 0.0], more_is_better=True)
    assert pair.mean == pytest.approx(0.375)
    assert pair.half_width == pytest.approx(1.96 * 0.25 / 2)
    assert pair.wins == (3 + 0.5) / 4
    assert compare_pairs(fine, fine + 1, more_is_better=False).wins == 0.0


def test_a_variant_nearer_to_real_images_is_found_nearer():
    """Features of mean m and unit covariance are m^2 D from real ones of mean 0: 0, .25 D and D."""
    rng, dim = np.random.default_rng(0), 4
    real = moments_of(rng.normal(size=(20_000, dim)))
    own = rng.normal(size=(2_000, dim))
    features = {"full": own, "fine": own + 1.0, "coarse": own + 0.5}
    found = compare_frechet(features, "fine", "coarse", real)
    assert found["full"].estimate == pytest.approx(0.0, abs=0.02)
    assert found["fine"].estimate == pytest.approx(dim, rel=0.05)
    assert found["difference"].estimate == pytest.approx(-0.75 * dim, rel=0.05)
    assert found["difference"].low < -0.75 * dim < found["difference"].high < -2.5
    # Pairs of one noise: what both owe to it falls out of the difference.
    alone = sum((found[n].high - found[n].estimate) ** 2 for n in ("fine", "coarse")) ** 0.5
    assert found["difference"].high - found["difference"].estimate < 0.8 * alone
    same = compare_frechet({**features, "coarse": own + 1.0}, "fine", "coarse", real)["difference"]
    assert (same.low, same.estimate, same.high) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="in 4 features needs more than 4 samples and was given 4"):
        compare_frechet({n: f[:4] for n, f in features.items()}, "fine", "coarse", real)


def test_real_images_need_a_classifier_and_pairs_enough():
    real = moments_of(np.eye(3))
    pair = {"ode": {"fine": {}, "coarse": {}}}
    with pytest.raises(ValueError, match="compares real images by a classifier"):
        beneficial_noise({"ode": None}, pair, real=real)
    with pytest.raises(ValueError, match="in 3 features needs more than that many pairs.* are 2"):
        beneficial_noise({"ode": None}, pair, lambda x: (x, x), real=real, seeds=range(2))
    with pytest.raises(ValueError, match="compares two variants"):
        beneficial_noise({"ode": None}, {"ode": {"fine": {}}})


@pytest.mark.slow
def test_a_worse_variant_is_found_worse(unet, shifted):
    def classify(images):
        flat = jnp.asarray(images).reshape(len(images), -1)
        return flat[:, :10], flat[:, :3]

    pair = {"fine": unet.full, "coarse": shifted}
    result = beneficial_noise({"ode": unet}, {"ode": pair}, classify)
    assert result.metrics == ("distance", "confidence", "feature_distance")
    assert result.verdict["ode/distance/coarse_better"] == -1
    assert result.verdict["ode/distance/wins"] == 0.0
    np.testing.assert_allclose(result.values["ode/fine/distance"], 0.0)
    assert result.verdict["measured_against"] == FULL_ONLY
    assert result.frechet == {}
    assert beneficial_noise({"ode": unet}, {"ode": pair}).metrics == ("distance",)
    # Real images as full precision draws them: what is shifted away from it is shifted from them.
    real = moments_of(np.asarray(classify(rollout_states(unet, unet.full)[0])[1]))
    seeds = range(4, 14)
    near = beneficial_noise({"ode": unet}, {"ode": pair}, classify, real=real, seeds=seeds)
    assert near.verdict["pairs"] == len(near.values["ode/fine/distance"]) == 10
    assert near.verdict["measured_against"] == "full precision and real images"
    assert near.frechet["ode/full"] == near.frechet["ode/fine"]
    gap = near.frechet["ode/coarse"].estimate - near.frechet["ode/fine"].estimate
    assert near.verdict["ode/frechet"] == pytest.approx(gap, rel=1e-6)
    # The trajectories' own seeds come first, and pair by pair they are the same numbers.
    np.testing.assert_allclose(
        near.values["ode/coarse/distance"][:4], result.values["ode/coarse/distance"], rtol=1e-3
    )
