"""Sources of training batches: the teacher's trajectory as it unfolds is the trajectory that is recorded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.diffusion.guidance import classifier_free, evaluate
from qdiff_jax.diffusion.samplers import ddim
from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.diffusion.timesteps import make_timesteps
from qdiff_jax.observe.quantization_noise import paired, reference_at
from qdiff_jax.observe.sources import Sampling, SourceConfig, cached, make_source, online
from qdiff_jax.observe.trajectory import record_trajectories

SCHEDULE = make_schedule("linear")
PLAN = ddim(SCHEDULE, make_timesteps("uniform", 1000, 4), eta=1.0)
KEY = jax.random.key(5)
SHAPE = (2, 2, 3)
NULL = 7


def predict(variables, x, ctx, y):
    t = jnp.asarray(ctx.t)
    eps = jnp.tanh(x + 0.001 * (t if t.ndim == 0 else t.reshape(-1, 1, 1, 1)))
    return eps if y is None else eps + 0.1 * y.astype(jnp.float32).reshape(-1, 1, 1, 1)


@functools.partial(jax.jit, static_argnames="draw")
def drawn(draw, memory, visit, data, guidance):
    """(memory, batch, the guided estimate of the batch's states)."""

    def estimate(x, ctx, y):
        return evaluate(predict, guidance, {}, x, ctx, y)[0]

    memory, batch = draw(memory, visit, data, estimate)
    calls = None if guidance is None else guidance.replace(form="calls")
    return memory, batch, evaluate(predict, calls, {}, batch.x, batch.ctx, batch.y)[0]


def run(source, first, stop, memory=None):
    """(batches of steps first..stop-1, memory, guided estimates)."""
    memory = jax.jit(source.init)(KEY) if memory is None else memory
    visits, batches, estimates = source.inputs(KEY, first, stop), [], []
    for i in range(stop - first):
        visit = jax.tree.map(lambda leaf: leaf[i], visits)  # noqa: B023
        memory, batch, estimate = drawn(source.draw, memory, visit, source.data, source.guidance)
        batches.append(jax.device_get(batch))
        estimates.append(np.asarray(estimate))
    return batches, memory, estimates


SLOW = pytest.mark.slow  # a compile each


@pytest.mark.parametrize("scale", [pytest.param(None, marks=SLOW), 3.0])
def test_an_online_trajectory_is_what_the_sampler_records(scale):
    """State by state and estimate by estimate, fresh noise of eta 1 included: the teacher alone advances."""
    guidance = classifier_free(scale, NULL)
    source = online(PLAN, shape=SHAPE, batch_size=3, guidance=guidance, classes=NULL)
    batches, _, _ = run(source, 0, 8)
    for trajectory in range(2):
        part = batches[4 * trajectory : 4 * trajectory + 4]
        y = np.asarray(part[0].y)
        indices = np.arange(3) + 3 * trajectory
        recorded = record_trajectories(
            predict, {}, PLAN, KEY, indices, shape=SHAPE, y=y, guidance=guidance
        )
        source_of_pairs = paired(recorded, guidance, PLAN, SCHEDULE)
        every = 1 if scale is None else 2
        for i, batch in enumerate(part):
            position = 3 - i
            assert batch.ctx.index == position
            assert batch.ctx.t == PLAN.timesteps[position]
            np.testing.assert_array_equal(batch.y, y)
            np.testing.assert_allclose(batch.x, recorded.x[position, ::every], atol=1e-5)
            np.testing.assert_allclose(
                batch.target, reference_at(source_of_pairs, position), atol=1e-5
            )
    assert not np.array_equal(batches[0].x, batches[4].x)


def test_going_on_from_a_saved_memory_gives_the_same_batches():
    guidance = classifier_free(3.0, NULL)
    source = online(PLAN, shape=SHAPE, batch_size=3, guidance=guidance, classes=NULL)
    whole, end, _ = run(source, 0, 7)
    _, memory, _ = run(source, 0, 3)
    rest, again, _ = run(source, 3, 7, memory=memory)
    for a, b in zip(jax.tree.leaves((whole[3:], end)), jax.tree.leaves((rest, again))):
        np.testing.assert_array_equal(a, b)


@functools.cache
def recorded(scale=None):
    guidance = classifier_free(scale, NULL)
    y = np.arange(5, dtype=np.int32)
    options = {"shape": SHAPE, "y": y, "guidance": guidance}
    made = record_trajectories(predict, {}, PLAN, KEY, range(5), **options)
    return paired(made, guidance, PLAN, SCHEDULE)


@pytest.mark.parametrize(
    ("order", "scale"),
    [("trajectory", 3.0), pytest.param("mixed", None, marks=SLOW), ("mixed", 3.0)],
)
def test_cached_states_carry_their_guided_estimates(order, scale):
    source = cached(recorded(scale), batch_size=4, order=order)
    batches, _, estimates = run(source, 0, 8)
    for batch, expected in zip(batches, estimates):
        np.testing.assert_allclose(batch.target, expected, atol=1e-5)
    seen = [np.atleast_1d(batch.ctx.index) for batch in batches]
    if order == "trajectory":
        assert [s.tolist() for s in seen] == [[3], [2], [1], [0], [3], [2], [1], [0]]
        assert source.guidance.form == "batch"
    else:
        assert all(s.shape == (4,) for s in seen)
        assert set(np.concatenate(seen)) == {0, 1, 2, 3}
        assert source.guidance is None or source.guidance.form == "calls"


def test_cached_states_carry_conditions_of_several_parts():
    """As PixArt's: a caption and its mask."""
    given = recorded()
    y = {"context": np.arange(15.0).reshape(5, 3), "mask": np.arange(5) % 2}
    trajectory = given.trajectory.replace(y=y)
    source = cached(given._replace(trajectory=trajectory), batch_size=4, order="mixed")
    visits = jax.tree.map(lambda leaf: leaf[0], source.inputs(KEY, 0, 1))
    _, batch = source.draw(source.init(KEY), visits, source.data, None)
    for name, rows in y.items():
        np.testing.assert_array_equal(batch.y[name], rows[visits["row"]])


@pytest.mark.parametrize("order", ["mixed", "trajectory"])
def test_noise_as_the_target_is_diffusion_training_on_the_final_images(order):
    source = cached(recorded(), batch_size=4, target="noise", order=order)
    (batch, other), _, _ = run(source, 0, 2)
    assert np.shape(batch.ctx.index) == ((4,) if order == "mixed" else ())
    alpha_bar = recorded().alpha_bar[batch.ctx.index].reshape(-1, 1, 1, 1)
    image = (batch.x - np.sqrt(1 - alpha_bar) * batch.target) / np.sqrt(alpha_bar)
    finals = np.asarray(source.data["image"])
    found = [np.abs(finals - one).max(axis=(1, 2, 3)).argmin() for one in image]
    np.testing.assert_allclose(image, finals[found], atol=1e-4)
    np.testing.assert_array_equal(batch.y, np.asarray(source.data["y"])[found])
    assert not np.array_equal(batch.target, other.target)
    assert source.guidance is None


@pytest.mark.parametrize("order", ["mixed", "trajectory"])
def test_targets_are_compared_in_one_order(order):
    """The teacher's estimates and noise, at the same steps and of the same samples."""
    pair = [cached(recorded(), batch_size=4, order=order, target=t) for t in ("teacher", "noise")]
    visits = [source.inputs(KEY, 0, 8) for source in pair]
    jax.tree.map(np.testing.assert_array_equal, *visits)


def test_what_a_source_lacks_is_said():
    with pytest.raises(ValueError, match="give `sampling`"):
        make_source(SourceConfig(), 4, None, recorded())
    with pytest.raises(ValueError, match="give `paired`"):
        make_source(SourceConfig(kind="cached"), 4, None, None)
    with pytest.raises(ValueError, match="kind='cached'"):
        SourceConfig(target="noise")
    with pytest.raises(ValueError, match="kind is 'live'"):
        SourceConfig(kind="live")
    sampling = Sampling(SCHEDULE, "uniform", None, SHAPE, None, None)
    with pytest.raises(ValueError, match="no classes"):
        make_source(SourceConfig(guidance_scale=1.5), 4, sampling, None)


def test_an_online_source_follows_the_config():
    sampling = Sampling(SCHEDULE, "uniform", classifier_free(3.0, NULL), SHAPE, NULL, NULL)
    source = make_source(SourceConfig(guidance_scale=1.5, sampling_steps=10), 4, sampling, None)
    assert float(source.guidance.scale) == 1.5
    assert len(source.timesteps) == 10
    assert float(source.data.rows["sigma"][-1]) > 0  # eta 1
    own = make_source(SourceConfig(sampling_steps=0), 4, sampling, None)
    np.testing.assert_array_equal(own.timesteps, make_timesteps("uniform", 1000, 4))
    assert float(own.guidance.scale) == 3.0
