import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.diffusion.guidance import classifier_free
from qdiff_jax.diffusion.hooks import Hooks, keep_input
from qdiff_jax.diffusion.sample import sample, sample_scan
from qdiff_jax.diffusion.samplers import ddim, ddpm, dpmpp_2m
from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.diffusion.timesteps import make_timesteps
from qdiff_jax.quant.qparams import from_range
from qdiff_jax.quant.quantizer import fake_quant
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.quant.timed import TimeIndexed, select
from qdiff_jax.runtime.mesh import data_mesh

SCHEDULE = make_schedule("linear")
GRID = make_timesteps("uniform", 1000, 4)
PLAN = ddpm(SCHEDULE, GRID)
KEY = jax.random.key(3)
SHAPE = (4, 4, 2)
Y = np.arange(8, dtype=np.int32)
GUIDED = {"y": Y, "guidance": classifier_free(2.0, 8)}


def step_table(timesteps, qmax=255.0):
    """Per-step ranges of an activation quantizer; the number of levels is data."""
    steps = len(timesteps)
    reach = jnp.linspace(2.0, 4.0, steps)
    levels = jnp.full((steps,), qmax)
    table = from_range(QuantSpec(), -reach, reach, 0.0 * levels, levels)
    return TimeIndexed(table, jnp.asarray(timesteps, jnp.float32), rule="step")


def make_variables(seed=0, grid=GRID, qmax=255.0):
    w = 0.3 * jax.random.normal(jax.random.key(seed), (3, 3, 2, 2))
    embedding = jax.random.normal(jax.random.key(seed + 1), (9, 2))
    return {
        "params": {"w": w, "embedding": embedding},
        "quant": {"conv": {"input": step_table(grid, qmax)}},
    }


VARIABLES = make_variables()


def predict(variables, x, ctx, y):
    """A quantized convolution with a label embedding."""
    params = variables["params"]
    x = fake_quant(select(variables["quant"], ctx)["conv"]["input"], x)
    eps = jax.lax.conv_general_dilated(
        x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    if y is not None:
        eps = eps + params["embedding"][y].reshape(-1, 1, 1, 2)
    return jnp.tanh(eps)


def run(indices=range(8), plan=PLAN, variables=VARIABLES, **options):
    return sample(predict, variables, plan, KEY, indices, shape=SHAPE, **options)


@pytest.fixture(scope="module")
def whole():
    return run(**GUIDED, record=True)


def test_result_does_not_depend_on_the_batches(whole):
    done = []
    halves = run(**GUIDED, batch_size=4, on_batch=done.append, record=True)
    np.testing.assert_allclose(halves.x, whole.x, atol=1e-5)
    np.testing.assert_allclose(halves.record.x, whole.record.x, atol=1e-5)
    np.testing.assert_allclose(halves.record.eps, whole.record.eps, atol=1e-5)
    assert done == [4, 8]
    done.clear()
    ragged = run(**GUIDED, batch_size=3, on_batch=done.append)
    np.testing.assert_allclose(ragged.x, whole.x, atol=1e-5)
    assert done == [3, 6, 8]
    some = run([6, 1], y=Y[[6, 1]], guidance=GUIDED["guidance"])
    np.testing.assert_allclose(some.x, whole.x[[6, 1]], atol=1e-5)
    distances = np.abs(whole.x[:, None] - whole.x[None]).max(axis=(2, 3, 4))
    assert distances[~np.eye(8, dtype=bool)].min() > 0.1


def drifting_after(state, ctx, x, eps, sigma, key, call_model):
    table, drift = state
    return (table, 0.5 * drift), table[ctx.index] * eps + drift, sigma


def test_result_does_not_depend_on_the_devices(whole):
    mesh = data_mesh()
    assert mesh.size == 8
    np.testing.assert_allclose(run(**GUIDED, mesh=mesh).x, whole.x, atol=1e-5)
    # Five samples over eight devices are filled up and cut again.
    five = run(range(5), y=Y[:5], guidance=GUIDED["guidance"], mesh=mesh)
    np.testing.assert_allclose(five.x, whole.x[:5], atol=1e-5)
    # A hook's tables are replicated, what it derived from x_T is split with it.
    hooks = Hooks(lambda x: (jnp.ones((4,)), 0.1 * x), keep_input, drifting_after)
    corrected = [run(**GUIDED, hooks=hooks, mesh=place).x for place in (None, mesh)]
    np.testing.assert_allclose(corrected[1], corrected[0], atol=1e-5)
    assert np.abs(corrected[0] - whole.x).max() > 0.01
    with pytest.raises(ValueError, match="cannot be split over 8 devices"):
        run(**GUIDED, mesh=mesh, batch_size=4)


def test_scan_and_pure_form_agree_with_the_host_loop(whole):
    scanned = run(**GUIDED, record=True, scan=True)
    pure = jax.jit(
        lambda variables, y, key, indices: sample_scan(
            predict,
            variables,
            PLAN,
            key,
            indices,
            shape=SHAPE,
            y=y,
            guidance=GUIDED["guidance"],
            record=True,
        )
    )
    x, (states, outputs) = pure(VARIABLES, Y, KEY, np.arange(8, dtype=np.uint32))
    for result in ((scanned.x, scanned.record.x, scanned.record.eps), (x, states, outputs)):
        np.testing.assert_allclose(result[0], whole.x, atol=1e-5)
        np.testing.assert_allclose(result[1], whole.record.x, atol=1e-5)
        np.testing.assert_allclose(result[2], whole.record.eps, atol=1e-5)


def test_pure_form_is_exported_for_accelerators():
    def generate(variables, key, indices):
        plan = ddim(SCHEDULE, GRID)
        return sample_scan(predict, variables, plan, key, indices, shape=SHAPE)[0]

    arguments = (VARIABLES, jax.random.key_data(KEY), np.arange(2, dtype=np.uint32))
    wrapped = jax.jit(lambda v, data, i: generate(v, jax.random.wrap_key_data(data), i))
    exported = jax.export.export(wrapped, platforms=["cpu", "cuda", "tpu"])(
        *jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    )
    # Step tables and quantizer parameters are arguments of the exported program as plain leaves.
    assert exported.platforms == ("cpu", "cuda", "tpu")
    leaves, structure = jax.tree.flatten((arguments, {}))
    assert exported.in_tree == structure
    expected = run(range(2), plan=ddim(SCHEDULE, GRID)).x
    np.testing.assert_allclose(exported.call(*arguments), expected, atol=1e-5)


def scaled_after(table, ctx, x, eps, sigma, key, call_model):
    return table, table[ctx.index] * eps, sigma


def test_new_numbers_compile_nothing():
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(predict, n=1)

    def go(plan=PLAN, variables=VARIABLES, scale=2.0, table=1.0, key=KEY):
        hooks = Hooks(lambda x: jnp.full((4,), table), keep_input, scaled_after)
        guidance = classifier_free(scale, 8)
        return sample(
            counted,
            variables,
            plan,
            key,
            range(8),
            shape=SHAPE,
            y=Y,
            guidance=guidance,
            hooks=hooks,
            batch_size=4,
        ).x

    grid = make_timesteps("trailing", 1000, 4)
    results = [
        go(),
        go(variables=make_variables(seed=5)),
        go(variables=make_variables(qmax=15.0)),
        go(plan=ddpm(SCHEDULE, GRID, variance="fixed_small", clip_x0=1.0)),
        go(plan=ddpm(make_schedule("cosine"), grid), variables=make_variables(grid=grid)),
        go(scale=3.0),
        go(table=0.5),
        go(key=jax.random.key(4)),
    ]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert np.abs(one - other).max() > 1e-3
    # The counter does count: another shape is another trace.
    with pytest.raises(AssertionError, match="traced > 1 times"):
        sample(counted, VARIABLES, PLAN, KEY, range(8), shape=(6, 6, 2), y=Y, batch_size=4)


def test_a_schedule_that_was_not_calibrated_is_refused():
    with pytest.raises(ValueError, match="conv/input.*timestep 249"):
        run(plan=ddpm(SCHEDULE, make_timesteps("trailing", 1000, 4)))


def test_record_is_ascending_and_continuous():
    plan = ddim(SCHEDULE, GRID)
    full = run(plan=plan, record=True)
    np.testing.assert_array_equal(full.record.t, GRID)
    np.testing.assert_array_equal(full.record.index, [0, 1, 2, 3])
    assert full.record.x.shape == (4, 8, *SHAPE)
    assert full.record.eps.shape == (4, 8, 1, *SHAPE)
    # DDIM without noise, by hand: from the state at index 3 to the one at index 2.
    now, then = SCHEDULE.alpha_bar[GRID.astype(int)[[3, 2]]]
    x, eps = full.record.x[3], full.record.eps[3, :, 0]
    x0 = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
    expected = np.sqrt(then) * x0 + np.sqrt(1 - then) * eps
    np.testing.assert_allclose(full.record.x[2], expected, atol=1e-5)
    some = run(plan=plan, record=[3, 1], batch_size=4)
    np.testing.assert_array_equal(some.record.index, [1, 3])
    np.testing.assert_allclose(some.record.x, full.record.x[[1, 3]], atol=1e-6)


@pytest.mark.parametrize("make", [ddim, dpmpp_2m])
def test_initial_noise_may_be_given(make):
    grid = GRID + 1
    variables = make_variables(grid=grid)
    noise = np.array(jax.random.normal(jax.random.key(0), (4, *SHAPE)))
    plan = make(SCHEDULE, grid)
    results = [
        sample(predict, variables, plan, key, range(4), noise=noise, record=True)
        for key in jax.random.split(KEY)
    ]
    np.testing.assert_array_equal(results[0].record.x[-1], noise)
    # Deterministic samplers do not look at the key beyond x_T.
    np.testing.assert_array_equal(results[0].x, results[1].x)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="either the shape of one sample or the initial noise"):
        sample(predict, VARIABLES, PLAN, KEY, range(2))
    with pytest.raises(ValueError, match="must have 3 rows"):
        run(range(3), y=Y)
    with pytest.raises(ValueError, match="non-empty vector of integers"):
        run([])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        run(batch_size=0)
    with pytest.raises(ValueError, match="recorded steps must lie in 0..3"):
        run(record=[4])
