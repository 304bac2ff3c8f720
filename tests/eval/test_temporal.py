"""temporal: cosine distances and mismatches on embeddings whose geometry is known."""

import numpy as np
import pytest

from qdiff_jax.eval.temporal import temporal_agreement


def circle(degrees):
    angle = np.deg2rad(np.asarray(degrees, np.float64))
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


FULL = circle([0, 30, 60, 90])


def test_distance_is_one_minus_cosine_averaged_over_sites():
    full = {"a": FULL, "b": 3.0 * FULL}
    quantized = {"a": 0.5 * circle([1, 32, 63, 94]), "b": FULL}
    result = temporal_agreement(full, quantized)
    expected = 1.0 - np.cos(np.deg2rad([1, 2, 3, 4]))
    np.testing.assert_allclose(result.cosine_sites["a"], expected, rtol=1e-12)
    np.testing.assert_allclose(result.cosine_rows, expected / 2, rtol=1e-9)
    assert result.cosine == pytest.approx(expected.mean() / 2)
    assert result.mismatch == 0.0


def test_tiny_distances_keep_their_digits():
    turn = 1e-6  # 1 - cos is 5e-13: the cosine itself, subtracted from 1, would keep 3 digits
    quantized = circle(np.rad2deg(turn) + np.array([0, 30, 60, 90]))
    result = temporal_agreement({"a": FULL}, {"a": quantized})
    np.testing.assert_allclose(result.cosine, turn**2 / 2, rtol=1e-6)


def test_mismatch_counts_embeddings_nearer_to_another_timestep():
    quantized = {"a": circle([0, 46, 60, 90]), "b": FULL}  # 46 degrees is nearer to 60 than to 30
    result = temporal_agreement({"a": FULL, "b": FULL}, quantized)
    assert result.mismatch == 1 / 8
    np.testing.assert_array_equal(result.mismatch_rows, [0, 0.5, 0, 0])
    np.testing.assert_array_equal(result.nearest["a"], [0, 2, 2, 3])


def test_a_common_turn_is_a_distance_before_it_is_a_mismatch():
    """Half the spacing is the limit; the last timestep has no later one to be taken for."""
    assert temporal_agreement({"a": FULL}, {"a": circle([14, 44, 74, 104])}).mismatch == 0.0
    assert temporal_agreement({"a": FULL}, {"a": circle([16, 46, 76, 106])}).mismatch == 0.75


def test_repeated_timesteps_are_not_mismatches():
    rng = np.random.default_rng(0)
    full = rng.normal(size=(6, 64))[[0, 1, 1, 2, 3, 3]]
    assert temporal_agreement({"a": full}, {"a": full}).mismatch == 0.0


def test_a_dead_embedding_has_no_direction():
    quantized = FULL.copy()
    quantized[1] = 0.0
    result = temporal_agreement({"a": FULL}, {"a": quantized})
    np.testing.assert_allclose(result.cosine_rows, [0, 1, 0, 0], atol=1e-15)
    np.testing.assert_array_equal(result.mismatch_rows, [0, 1, 0, 0])


def test_sites_may_have_different_widths():
    rng = np.random.default_rng(1)
    full = {"a": rng.normal(size=(4, 3)), "b": rng.normal(size=(4, 7)).astype(np.float32)}
    assert temporal_agreement(full, dict(reversed(full.items()))).cosine == 0.0


@pytest.mark.parametrize(
    ("full", "quantized", "message"),
    [
        ({}, {}, "at least one"),
        ({"a": FULL}, {"b": FULL}, r"\['a'\].*\['b'\]"),
        ({"a": FULL}, {"a": FULL[:3]}, "'a' differ in shape"),
        ({"a": FULL[0]}, {"a": FULL[0]}, r"are \[R, C\]"),
        ({"a": FULL, "b": FULL[:2]}, {"a": FULL, "b": FULL[:2]}, "same timesteps"),
        ({"a": 0 * FULL}, {"a": FULL}, "zero at rows"),
        ({"a": FULL}, {"a": np.where(FULL > 0.99, np.nan, FULL)}, r"not finite at rows \[0, 3\]"),
    ],
)
def test_misuse_is_explained(full, quantized, message):
    with pytest.raises(ValueError, match=message):
        temporal_agreement(full, quantized)
