import collections

import jax
import numpy as np
import pytest

from qdiff_jax.observe.selectors import every_step, select_calibration, uniform
from qdiff_jax.observe.trajectory import Trajectory

KEY = jax.random.key(0)


def numbered(steps, samples, branches=1):
    """A trajectory in which every state carries its own position and row as pixel values."""
    rows = samples * branches
    position, row = np.meshgrid(np.arange(steps), np.arange(rows), indexing="ij")
    x = np.stack([position, row], axis=-1).astype(np.float32)[:, :, None, None, :]
    return Trajectory(
        x=x,
        t=10.0 * np.arange(steps, dtype=np.float32),
        index=np.arange(steps, dtype=np.int32),
        y=100 + np.arange(rows, dtype=np.int32),
        eps=-x,
        branch=np.tile(np.arange(branches, dtype=np.int32), samples),
        sample=np.repeat(np.arange(samples), branches),
    )


@pytest.mark.parametrize(
    ("recorded", "steps", "count"), [(100, 20, 20), (50, 25, 25), (20, 8, 10), (7, 7, 7), (9, 1, 1)]
)
@pytest.mark.parametrize("branches", [1, 2])
def test_uniform_takes_equally_many_of_every_chosen_step(recorded, steps, count, branches):
    chosen = uniform(KEY, numbered(recorded, 6, branches), steps, 4)
    histogram = collections.Counter(chosen.index.tolist())
    assert sorted(histogram) == list(range(0, recorded, recorded // steps))
    assert len(histogram) == count
    assert set(histogram.values()) == {4 * branches}
    assert len(chosen) == count * 4 * branches
    rows = chosen.x[:, 0, 0, 1]
    assert rows.max() == 4 * branches - 1


@pytest.mark.parametrize(
    "select", [lambda t, k: uniform(k, t, 10, 8), lambda t, k: every_step(k, t)]
)
def test_items_stay_whole_and_are_shuffled_without_repeats(select):
    trajectory = numbered(20, 8, branches=2)
    chosen = select(trajectory, KEY)
    position, row = chosen.x[:, 0, 0, 0].astype(int), chosen.x[:, 0, 0, 1].astype(int)
    np.testing.assert_array_equal(chosen.eps_fp, -chosen.x)
    np.testing.assert_array_equal(chosen.t, trajectory.t[position])
    np.testing.assert_array_equal(chosen.index, position)
    np.testing.assert_array_equal(chosen.branch, row % 2)
    np.testing.assert_array_equal(chosen.y, 100 + row)
    assert len(set(zip(position, row))) == len(chosen)
    # Shuffled: neither the steps nor the rows come in order, and the key decides.
    correlation = np.corrcoef(np.arange(len(chosen)), position)[0, 1]
    assert abs(correlation) < 0.3
    assert len(set(position[:16])) > 4
    other = select(trajectory, jax.random.key(1))
    assert np.any(other.index != chosen.index)
    np.testing.assert_array_equal(np.sort(other.index), np.sort(chosen.index))
    np.testing.assert_array_equal(select(trajectory, KEY).x, chosen.x)


def test_every_step_may_be_limited_and_labels_may_be_absent():
    trajectory = numbered(5, 8).replace(y=None)
    chosen = every_step(KEY, trajectory, per_step=3)
    assert collections.Counter(chosen.index.tolist()) == dict.fromkeys(range(5), 3)
    assert chosen.y is None
    assert len(every_step(KEY, trajectory)) == 40


def test_selectors_by_name():
    trajectory = numbered(10, 2)
    by_name = select_calibration("uniform", KEY, trajectory, steps=5, per_step=2)
    np.testing.assert_array_equal(by_name.x, uniform(KEY, trajectory, 5, 2).x)
    with pytest.raises(ValueError, match="unknown selector 'density'.*every_step.*uniform"):
        select_calibration("density", KEY, trajectory)
    with pytest.raises(ValueError, match="steps must lie in 1..10"):
        uniform(KEY, trajectory, 11, 1)
    with pytest.raises(ValueError, match="per_step=3 .* holds 2"):
        uniform(KEY, trajectory, 5, 3)
