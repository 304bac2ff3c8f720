import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.diffusion.guidance import classifier_free, combine
from qdiff_jax.diffusion.sample import sample
from qdiff_jax.diffusion.samplers import ddim
from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.diffusion.timesteps import make_timesteps
from qdiff_jax.observe.archive import load_arrays, save_arrays
from qdiff_jax.observe.trajectory import Trajectory, record_trajectories

GRID = make_timesteps("uniform", 1000, 5)
PLAN = ddim(make_schedule("linear"), GRID)
KEY = jax.random.key(0)
SHAPE = (2, 2, 3)


def predict(variables, x, ctx, y):
    eps = jnp.tanh(x + 0.001 * ctx.t)
    return eps if y is None else eps + y.astype(jnp.float32).reshape(-1, 1, 1, 1)


def test_without_guidance_a_row_is_a_sample():
    trajectory = record_trajectories(predict, {}, PLAN, KEY, [4, 7, 9], shape=SHAPE, batch_size=2)
    assert trajectory.x.shape == trajectory.eps.shape == (5, 3, *SHAPE)
    np.testing.assert_array_equal(trajectory.t, GRID)
    np.testing.assert_array_equal(trajectory.index, np.arange(5))
    np.testing.assert_array_equal(trajectory.sample, [4, 7, 9])
    np.testing.assert_array_equal(trajectory.branch, [0, 0, 0])
    assert trajectory.y is None
    # State, timestep and output of one position belong together.
    expected = np.tanh(trajectory.x + 0.001 * GRID.reshape(-1, 1, 1, 1, 1))
    np.testing.assert_allclose(trajectory.eps, expected, atol=1e-6)


@pytest.mark.parametrize("form", ["batch", "calls"])
def test_guidance_gives_a_row_per_branch(form):
    y = np.array([1, 2], np.int32)
    guidance = classifier_free(3.0, 5, form=form)
    options = {"shape": SHAPE, "y": y, "guidance": guidance}
    trajectory = record_trajectories(predict, {}, PLAN, KEY, [0, 1], **options)
    np.testing.assert_array_equal(trajectory.branch, [0, 1, 0, 1])
    np.testing.assert_array_equal(trajectory.sample, [0, 0, 1, 1])
    np.testing.assert_array_equal(trajectory.y, [1, 5, 2, 5])
    assert trajectory.y.dtype == np.int32
    np.testing.assert_array_equal(trajectory.x[:, 0], trajectory.x[:, 1])
    expected = np.tanh(trajectory.x + 0.001 * GRID.reshape(-1, 1, 1, 1, 1))
    labels = trajectory.y.reshape(1, -1, 1, 1, 1).astype(np.float32)
    np.testing.assert_allclose(trajectory.eps, expected + labels, atol=1e-5)
    # The last visited step leads from the recorded state to the sample: alpha_bar_prev is 1.
    eps = combine(guidance, trajectory.eps[0, 0::2], trajectory.eps[0, 1::2])
    x0 = (trajectory.x[0, 0::2] - 0.01 * eps) / np.sqrt(1 - 1e-4)
    np.testing.assert_allclose(sample(predict, {}, PLAN, KEY, [0, 1], **options).x, x0, rtol=1e-5)


def test_one_branch_only():
    y = np.array([1, 2], np.int32)
    for scale, labels, branch in ((1.0, [1, 2], [0, 0]), (0.0, [5, 5], [1, 1])):
        trajectory = record_trajectories(
            predict,
            {},
            PLAN,
            KEY,
            [0, 1],
            shape=SHAPE,
            y=y,
            guidance=classifier_free(scale, 5),
            steps=[0, 4],
        )
        np.testing.assert_array_equal(trajectory.y, labels)
        np.testing.assert_array_equal(trajectory.branch, branch)
        np.testing.assert_array_equal(trajectory.index, [0, 4])
        np.testing.assert_array_equal(trajectory.t, GRID[[0, 4]])
        assert trajectory.eps.shape == (2, 2, *SHAPE)


@pytest.mark.parametrize("y", [None, np.arange(3), {"context": np.ones((3, 2)), "mask": np.eye(3)}])
def test_conditions_of_any_kind_are_kept_on_disk(y, tmp_path):
    arrays = [np.full((2, 3), i, np.float32) for i in range(6)]
    made = Trajectory(*arrays[:3], y, *arrays[3:])
    save_arrays(tmp_path / "t.npz", made)
    found = load_arrays(tmp_path / "t.npz", Trajectory, optional=("y",))
    jax.tree.map(np.testing.assert_array_equal, made, found)
    if y is None:
        with pytest.raises(ValueError, match="not those of Trajectory"):
            load_arrays(tmp_path / "t.npz", Trajectory)
