"""Ranges, skips, outliers, temporal features: a fault that is planted must be found, at its size."""

import jax
import numpy as np
import pytest

from qdiff_jax.analysis.outliers import channel_outliers, largest_over_median
from qdiff_jax.analysis.ranges import activation_ranges, widest_over_narrowest
from qdiff_jax.analysis.skips import ashman, sarle, skip_concatenations
from qdiff_jax.analysis.subject import (
    NotApplicable,
    make_subject,
    parse_bits,
    round_to_nearest,
    to_json,
)
from qdiff_jax.analysis.temporal import grid_for, temporal_information
from qdiff_jax.quant.timed import TimeIndexed
from qdiff_jax.sites import SiteQuant


def with_params(subject, **leaves):
    """The subject with parameters changed: block__op__leaf=function of the old value."""

    def change(path, leaf):
        name = "__".join(entry.key for entry in path)
        return leaves[name](leaf) if name in leaves else leaf

    params = jax.tree_util.tree_map_with_path(change, subject.model.params)
    return subject._replace(model=subject.model._replace(params=params))


@pytest.mark.slow
def test_a_range_that_grows_with_the_timestep_is_measured(unet):
    growth = 2.0 ** np.arange(4, dtype=np.float32)
    x = np.random.default_rng(0).uniform(-1, 1, unet.trajectory.x.shape).astype(np.float32)
    x = x * growth[:, None, None, None, None]
    subject = unet._replace(trajectory=unet.trajectory.replace(x=x))
    seen = []
    result = activation_ranges(subject, lambda done, total: seen.append((done, total)))
    at = result.names.index("conv_in/conv:input")
    by_step = x.reshape(4, -1)
    expected = by_step.max(axis=1) - by_step.min(axis=1)
    np.testing.assert_allclose(result.width[:, at], expected, rtol=1e-6)
    assert result.ratio[at] == pytest.approx(expected.max() / expected.min(), rel=1e-5)
    assert result.verdict["largest_ratio"] >= result.verdict["median_ratio"] >= 1.0
    # The site of the picture sees the image: a time layer's range would say nothing of channels.
    assert not result.temporal[result.names.index(result.site)]
    assert result.channels.shape[0] == 4
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_ranges_that_vanish():
    width = np.array([[1.0, 0.0, 0.0], [4.0, 2.0, 0.0]])
    np.testing.assert_array_equal(widest_over_narrowest(width), [4.0, np.inf, 1.0])


@pytest.mark.slow
def test_a_wide_part_is_found_and_splitting_it_pays(unet):
    """What the last but one block writes is the h of the last concatenation."""
    layers = [
        f"up_0_block_0__{op}__{leaf}"
        for op in ("conv2", "nin_shortcut")
        for leaf in ("kernel", "bias")
    ]
    wide = with_params(unet, **dict.fromkeys(layers, lambda leaf: 30.0 * leaf))
    before, after = skip_concatenations(unet), skip_concatenations(wide)
    assert after.verdict["largest_at"] == "up_0_block_1"
    at = after.blocks.index("up_0_block_1")
    assert after.ratio[at] > 5 > before.ratio[at]
    assert after.std[:, at, 0].min() > after.std[:, at, 1].max()  # it is h that is wide
    # An affine grid's error goes with the square of its step.
    assert after.split_gain[at] > 25 > before.split_gain[at]
    assert after.separation[at] > 2
    np.testing.assert_allclose((after.densities * np.diff(after.edges)[None]).sum(axis=1), 1.0)


@pytest.mark.slow
def test_a_transformer_has_no_skips(dit):
    with pytest.raises(NotApplicable, match="no block of this model concatenates a skip"):
        skip_concatenations(dit)


def test_bimodality_measures_on_known_distributions():
    rng = np.random.default_rng(0)
    assert sarle(rng.uniform(size=20000)) == pytest.approx(5 / 9, abs=0.01)
    assert sarle(rng.normal(size=20000)) == pytest.approx(1 / 3, abs=0.01)
    two = np.concatenate([rng.normal(-4, 1, 5000), rng.normal(4, 1, 5000)])
    assert sarle(two) > 0.8
    assert ashman(two[:5000], two[5000:]) == pytest.approx(8.0, rel=0.05)


@pytest.mark.slow
def test_a_planted_channel_outlier_is_found(dit):
    """A bias of 50 passes GELU as 50 and enters the next dense layer in one channel."""
    planted = with_params(dit, blocks_1__mlp_fc1__bias=lambda b: b.at[3].set(50.0))
    result = channel_outliers(planted)
    assert result.verdict["largest_at"] == "blocks_1/mlp_fc2:input"
    assert result.magnitudes.argmax() == 3
    assert result.verdict["largest_ratio"] == pytest.approx(
        result.magnitudes[3] / np.median(result.magnitudes)
    )
    assert result.verdict["largest_ratio"] > 5 * channel_outliers(dit).verdict["largest_ratio"]
    assert result.verdict["codes_left"] < 256 / 10
    assert set(result.kinds) == {"dense", "temporal"}


def test_outliers_of_dead_channels():
    assert largest_over_median(np.zeros(5)) == 1.0
    assert largest_over_median(np.array([0, 0, 0, 1.0])) == np.inf


@pytest.mark.slow
def test_features_that_no_longer_tell_the_time_are_mistaken(unet):
    deaf = with_params(unet, temb__dense_0__kernel=lambda k: 0.0 * k)
    variants = {"same": unet.full, "deaf": deaf.full}
    grid = grid_for(unet, variants, count=40)
    assert len(grid) == 40
    result = temporal_information(unet, variants, grid)
    assert result.verdict["same/mismatch"] == 0.0
    assert result.verdict["same/error"] < 1e-12
    assert not np.any(result.shift["same"])
    # One feature for all timesteps is right at one of them.
    assert result.verdict["deaf/mismatch"] >= 1 - 2 / 40
    assert result.verdict["deaf/error"] > 1e-3
    assert result.verdict["neighbour_cosine"] > result.verdict["far_cosine"]
    # It resembles the same t' at every t, so t' - t falls by t.
    assert len(np.unique(np.round(result.shift["deaf"][0] + grid))) == 1


@pytest.mark.slow
def test_step_tables_are_asked_at_the_timesteps_they_know(unet):
    table = TimeIndexed(np.zeros((4, 1)), np.asarray(unet.trajectory.t), "step")
    quant = {"temb": {"dense_0": SiteQuant(lhs=table)}}
    grid = grid_for(unet, {"tables": {"params": {}, "quant": quant}})
    np.testing.assert_array_equal(grid, unet.trajectory.t)


@pytest.mark.slow
def test_a_rounded_variant_has_codes_for_weights_and_activations(unet):
    variables = round_to_nearest(unet, "w4a32")
    assert not variables["quant"]  # weights are folded, activations stay as they are
    kernel = np.asarray(variables["params"]["down_0_block_0"]["conv1"]["kernel"])
    assert max(len(np.unique(kernel[..., c])) for c in range(kernel.shape[-1])) <= 16


@pytest.mark.parametrize("bits", ["w4", "4a8", "w1a8", "w4a16", "w4a8 "])
def test_bits_are_checked(bits):
    with pytest.raises(ValueError, match="are not understood; write w4a8"):
        parse_bits(bits)
    assert parse_bits("w3a32") == (3, None)


def test_one_sample_is_too_few():
    with pytest.raises(ValueError, match="at least 2 samples"):
        make_subject(None, None, samples=1, calibration=1)


def test_results_as_json():
    value = {"a": np.array([1.0, np.nan]), "b": (np.int32(2), float("inf")), "c": {"d": True}}
    assert to_json(value) == {"a": [1.0, None], "b": [2, None], "c": {"d": True}}
