"""PTQ4DM's selectors: which steps they draw, one of every trajectory."""

import collections

import jax
import numpy as np
import pytest

from qdiff_jax.observe.selectors import ndtc, ndtc_positions, one_step, random_steps

from .test_selectors import KEY, numbered


@pytest.mark.parametrize(
    ("mean", "std", "first", "last"), [(0.4, 0.4, 0.159, 0.067), (0.4, 0.5, 0.212, 0.115)]
)
def test_acceptance_n1_masses_at_both_ends(mean, std, first, last):
    """Of a clamped normal: Phi(-mean / std) at 0, 1 - Phi((1 - mean) / std) at the noisiest step."""
    drawn = ndtc_positions(KEY, 1000, 100_000, mean=mean, std=std)
    assert drawn.min() == 0
    assert drawn.max() == 999
    assert np.mean(drawn == 0) == pytest.approx(first, abs=0.005)
    assert np.mean(drawn == 999) == pytest.approx(last, abs=0.005)
    inside = np.mean(drawn[(drawn > 0) & (drawn < 800)] < 400)
    # Symmetric about the mean of the unclamped normal, which lies nearer to the image.
    assert inside == pytest.approx(0.5, abs=0.01)


def test_an_item_is_one_step_of_a_trajectory_of_its_own():
    chosen = ndtc(KEY, numbered(50, 64))
    assert len(chosen) == 64
    np.testing.assert_array_equal(chosen.x[:, 0, 0, 0], chosen.index)
    np.testing.assert_array_equal(chosen.t, 10.0 * chosen.index)
    assert sorted(chosen.x[:, 0, 0, 1]) == list(range(64))
    other = ndtc(jax.random.key(1), numbered(50, 64))
    assert np.any(np.sort(other.index) != np.sort(chosen.index))
    np.testing.assert_array_equal(ndtc(KEY, numbered(50, 64)).x, chosen.x)


def test_trajectories_go_round_and_bring_both_branches():
    chosen = ndtc(KEY, numbered(10, 4, branches=2), count=8)
    assert len(chosen) == 16
    pairs = collections.Counter(chosen.x[:, 0, 0, 1].astype(int).tolist())
    assert pairs == dict.fromkeys(range(8), 2)
    np.testing.assert_array_equal(chosen.branch, chosen.x[:, 0, 0, 1] % 2)
    steps = {b: np.sort(chosen.index[chosen.branch == b]) for b in (0, 1)}
    np.testing.assert_array_equal(steps[0], steps[1])


def test_acceptance_n2_the_mirror_bug_pairs_a_state_with_the_opposite_step():
    right = ndtc(KEY, numbered(50, 64))
    wrong = ndtc(KEY, numbered(50, 64), mirror_bug=True)
    for field in ("t", "index", "y", "branch"):
        np.testing.assert_array_equal(getattr(wrong, field), getattr(right, field))
    np.testing.assert_array_equal(wrong.x[:, 0, 0, 0], 49 - wrong.index)
    np.testing.assert_array_equal(wrong.x[:, 0, 0, 1], right.x[:, 0, 0, 1])


def test_what_it_is_compared_with():
    flat = random_steps(KEY, numbered(5, 1000))
    share = np.bincount(flat.index, minlength=5) / 1000
    np.testing.assert_allclose(share, 0.2, atol=0.05)
    same = one_step(KEY, numbered(5, 8), count=4, position=3)
    assert set(same.index.tolist()) == {3}
    assert sorted(same.x[:, 0, 0, 1]) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="position must lie in 0..4"):
        one_step(KEY, numbered(5, 8), position=5)
    with pytest.raises(ValueError, match="at least one item"):
        random_steps(KEY, numbered(5, 8), count=0)
