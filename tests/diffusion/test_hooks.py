import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.diffusion.guidance import classifier_free
from qdiff_jax.diffusion.hooks import IDENTITY, Hooks, keep_estimate, keep_input, no_state
from qdiff_jax.diffusion.noise import initial_noise, normal, sample_keys, step_keys
from qdiff_jax.diffusion.sample import sample
from qdiff_jax.diffusion.samplers import ddim, dpmpp_2m
from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.diffusion.timesteps import make_timesteps
from qdiff_jax.quant.timed import step_context

SCHEDULE = make_schedule("linear")
GRID = make_timesteps("uniform", 1000, 5)
ETA1 = ddim(SCHEDULE, GRID, eta=1.0)
KEY = jax.random.key(7)
SHAPE = (4, 4, 2)
VARIABLES = {"params": {"w": jnp.float32(0.9)}}


def predict(variables, x, ctx, y):
    return variables["params"]["w"] * jnp.tanh(x + 0.001 * ctx.t)


def run(plan=ETA1, hooks=IDENTITY, indices=range(4), **options):
    return sample(predict, VARIABLES, plan, KEY, indices, shape=SHAPE, hooks=hooks, **options)


def plain_loop(plan, eps_of=lambda j, eps: eps, sigma_of=lambda j, sigma: sigma):
    """The sampler written out without hooks; for comparison to the last bit."""
    keys = jax.jit(sample_keys)(KEY, jnp.arange(4, dtype=jnp.uint32))
    x = jax.jit(initial_noise, static_argnums=1)(keys, SHAPE)
    state = plan.sampler.init(x)

    @jax.jit
    def step(variables, keys, state, x, t, j, row, eps_of_j):
        eps = predict(variables, x, step_context(t, j), None)
        fresh = normal(step_keys(keys, j, 0), x)
        return plan.sampler.step(row, state, x, eps_of(j, eps), sigma_of(j, row["sigma"]), fresh)

    for j in reversed(range(plan.steps)):
        row = jax.tree.map(lambda values: values[j], plan.rows)  # noqa: B023
        state, x = step(VARIABLES, keys, state, x, plan.timesteps[j], plan.index[j], row, None)
    return np.asarray(x)


@pytest.mark.parametrize("plan", [ETA1, dpmpp_2m(SCHEDULE, GRID + 1)], ids=["ddim", "dpmpp_2m"])
def test_identity_changes_no_bit(plan):
    np.testing.assert_array_equal(run(plan).x, plain_loop(plan))


def affine_after(tables, ctx, x, eps, sigma, key, call_model):
    """eps' = a_j eps + d_j with the residual variance s_j taken out of the sampler's noise."""
    a, d, s, c = (tables[name][ctx.index] for name in ("a", "d", "s", "c"))
    return tables, a * eps + d, jnp.sqrt(jnp.maximum(sigma * sigma - c * c * s, 0.0))


def affine(scale=1.0):
    steps = np.arange(5, dtype=np.float32)
    tables = {
        "a": 1.0 - 0.02 * scale * steps,
        "d": 0.01 * scale * steps,
        "s": 0.05 + 0.02 * scale * steps,
        "c": ETA1.rows["eps_coefficient"],
    }
    return Hooks(lambda x: jax.tree.map(jnp.asarray, tables), keep_input, affine_after), tables


def test_corrected_estimate_and_noise_level_enter_every_term():
    hooks, tables = affine()
    tables = jax.tree.map(jnp.asarray, tables)
    expected = plain_loop(
        ETA1,
        eps_of=lambda j, eps: tables["a"][j] * eps + tables["d"][j],
        sigma_of=lambda j, sigma: jnp.sqrt(
            jnp.maximum(sigma**2 - tables["c"][j] ** 2 * tables["s"][j], 0.0)
        ),
    )
    corrected = run(hooks=hooks).x
    np.testing.assert_allclose(corrected, expected, atol=1e-5)
    assert np.abs(corrected - run().x).max() > 0.05


def test_absorbed_variance_keeps_the_variance_of_the_step():
    """c^2 s + sigma'^2 = sigma^2 where the step's own noise can absorb the error."""
    hooks, tables = affine()
    for j in range(5):
        sigma = ETA1.rows["sigma"][j]
        _, _, left = hooks.after(
            jax.tree.map(jnp.asarray, tables), step_context(0.0, j), 0.0, 0.0, sigma, None, None
        )
        added = tables["c"][j] ** 2 * tables["s"][j]
        np.testing.assert_allclose(left**2, max(sigma**2 - added, 0.0), atol=1e-7)


def shift_before(shift, ctx, x):
    return shift, x + shift[ctx.index]


def test_input_correction_reaches_network_and_update():
    shift = jnp.linspace(0.5, 0.1, 5)
    hooks = Hooks(lambda x: shift, shift_before, keep_estimate)
    result = run(ddim(SCHEDULE, GRID), hooks=hooks, record=True)
    np.testing.assert_allclose(
        result.record.eps[:, :, 0],
        0.9 * np.tanh(result.record.x + 0.001 * GRID.reshape(-1, 1, 1, 1, 1)),
        atol=1e-6,
    )
    # By hand from one recorded (shifted) state to the next.
    x, eps = result.record.x[4].astype(np.float64), result.record.eps[4, :, 0]
    now, then = SCHEDULE.alpha_bar[GRID.astype(int)[[4, 3]]]
    x0 = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
    expected = np.sqrt(then) * x0 + np.sqrt(1 - then) * eps + float(shift[3])
    np.testing.assert_allclose(result.record.x[3], expected, atol=1e-5)


def probe_after(state, ctx, x, eps, sigma, key, call_model):
    """At step 2 the mean of a second evaluation becomes a bias that all later steps subtract."""
    bias, visits = state
    bias = jax.lax.cond(
        ctx.index == 2, lambda: jnp.mean(call_model(0.0 * x, ctx) - eps), lambda: bias
    )
    return (bias, visits + 1), eps - bias, sigma


def test_second_evaluation_state_and_guided_estimate():
    seen = []

    def labelled(variables, x, ctx, y):
        return jnp.zeros_like(x) + y.astype(jnp.float32).reshape(-1, 1, 1, 1) + 0.1 * jnp.tanh(x)

    def spy_after(state, ctx, x, eps, sigma, key, call_model):
        state, eps, sigma = probe_after(state, ctx, x, eps, sigma, key, call_model)
        jax.debug.callback(lambda *args: seen.append(args), ctx.index, eps, x, state, ordered=True)
        return state, eps, sigma

    hooks = Hooks(lambda x: (jnp.float32(0.0), jnp.int32(0)), keep_input, spy_after)
    sample(
        labelled,
        {},
        ddim(SCHEDULE, GRID),
        KEY,
        [3],
        shape=SHAPE,
        hooks=hooks,
        y=np.array([2], np.int32),
        guidance=classifier_free(3.0, 1),
    )
    jax.effects_barrier()
    assert [int(index) for index, *_ in seen] == [4, 3, 2, 1, 0]
    assert [int(state[1]) for *_, state in seen] == [1, 2, 3, 4, 5]
    biases = np.array([float(state[0]) for *_, state in seen])
    guided = [1.0 + 3.0 * (2.0 - 1.0) + 0.1 * np.tanh(x) for _, _, x, _ in seen]
    # call_model evaluates the guided network at x = 0: 4 everywhere.
    np.testing.assert_allclose(biases, [0, 0] + [4.0 - guided[2].mean()] * 3, atol=1e-5)
    for (_, eps, _, _), plain, bias in zip(seen, guided, biases):
        np.testing.assert_allclose(eps, plain - bias, atol=1e-5)


def noisy_after(state, ctx, x, eps, sigma, key, call_model):
    return state, normal(key, x), jnp.zeros_like(sigma)


def test_noise_of_a_hook_belongs_to_the_sample_and_the_step():
    plan = ddim(SCHEDULE, GRID, eta=1.0)
    hooks = Hooks(no_state, keep_input, noisy_after)
    whole = run(plan, hooks=hooks).x
    np.testing.assert_allclose(run(plan, hooks=hooks, batch_size=2).x, whole, atol=1e-6)
    np.testing.assert_allclose(run(plan, hooks=hooks, indices=[2]).x[0], whole[2], atol=1e-6)
    keys = sample_keys(KEY, jnp.arange(2))
    x = jnp.zeros((2, 2000))
    draws = [normal(step_keys(keys, j, purpose), x) for j in (0, 1) for purpose in (0, 1)]
    draws.append(initial_noise(keys, (2000,)))
    correlation = np.corrcoef(np.concatenate([np.asarray(draw) for draw in draws]))
    assert np.abs(correlation - np.eye(10)).max() < 0.1
