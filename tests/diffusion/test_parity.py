"""Trajectories of the reference implementations over an analytic network, step by step."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.diffusion.guidance import classifier_free
from qdiff_jax.diffusion.sample import sample
from qdiff_jax.diffusion.samplers import ddim, ddpm, dpmpp_2m
from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.diffusion.timesteps import make_timesteps
from qdiff_jax.quant.timed import step_context

CASES = pathlib.Path(__file__).parents[1] / "parity" / "cases"
KEY = jax.random.key(0)


def load(name):
    with np.load(CASES / f"{name}.npz", allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files if key != "meta"}
        return arrays, json.loads(str(stored["meta"]))


def analytic_tables():
    """The two scalars of the analytic network at every timestep, made in float64."""
    t = np.arange(1000.0)
    alpha_bar = np.exp(-(1e-4 * t + 9.95e-6 * t**2))
    k1 = np.sqrt(1 - alpha_bar) / (0.25 * alpha_bar + 1 - alpha_bar)
    m = 0.4 * np.cos(np.arange(48.0)).reshape(1, 3, 4, 4)
    tables = {"k1": k1, "k2": np.sqrt(alpha_bar), "m": m}
    return {name: table.astype(np.float32) for name, table in tables.items()}


def analytic(variables, x, ctx, y):
    """eps = k1(t) (x - k2(t) m) + 0.05 sin(2 x + 0.004 t), plus 0.3 y cos(x) with labels."""
    t = ctx.t.astype(jnp.int32)
    eps = variables["k1"][t] * (x - variables["k2"][t] * variables["m"])
    eps = eps + 0.05 * jnp.sin(2.0 * x + 0.004 * ctx.t)
    if y is not None:
        eps = eps + 0.3 * y.astype(jnp.float32).reshape(-1, 1, 1, 1) * jnp.cos(x)
    return eps


def run(plan, case, **options):
    noise = case["in/x_T"]
    return sample(
        analytic, analytic_tables(), plan, KEY, range(2), noise=noise, record=True, **options
    )


def error(ours, theirs):
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def test_ddim_quadratic_grid_with_repeated_timesteps():
    case, _ = load("native_ddim_cifar_quad100")
    grid = make_timesteps("quad", 1000, 100)
    np.testing.assert_array_equal(grid, case["out/seq"])
    assert np.sum(np.diff(grid) == 0) == 4
    result = run(ddim(make_schedule("linear"), grid), case)
    visited = np.concatenate([result.record.x[::-1], result.x[None]])
    assert error(visited, case["out/trajectory"]) < 4e-6
    assert error(result.x, case["out/final"]) < 4e-6


def test_dpm_solver_plus_plus_2m():
    case, meta = load("sched_dpmpp_2m_20_leading_sdv1")
    config = meta["config"]
    grid = make_timesteps("solver_leading", 1000, 20, offset=config["steps_offset"])
    np.testing.assert_array_equal(grid[::-1], case["out/timesteps"])
    schedule = make_schedule("scaled_linear", 1000)
    np.testing.assert_allclose(schedule.alpha_bar, case["out/alphas_cumprod"], rtol=1e-5)
    # final_sigmas_type "sigma_min" ends on the first training timestep, not on a clean image.
    result = run(dpmpp_2m(schedule, grid, final="first"), case)
    visited = np.concatenate([result.record.x[::-1], result.x[None]])
    assert error(visited, case["out/trajectory"]) < 3e-6
    assert error(result.record.eps[::-1, :, 0], case["out/model_outputs"]) < 3e-6


@pytest.mark.parametrize("form", ["batch", "calls"])
def test_guided_ddim_of_the_latent_models(form):
    case, meta = load("native_ldm_ddim_imagenet_20_cfg3")
    grid = make_timesteps("uniform", 1000, 20, offset=1)
    np.testing.assert_array_equal(grid, case["out/ddim_timesteps"])
    schedule = make_schedule("scaled_linear", beta_start=0.0015, beta_end=0.0195)
    guidance = classifier_free(meta["cfg"], 0, form=form)
    plan = ddim(schedule, grid, final="first")
    result = run(plan, case, y=np.array([1, 2], np.int32), guidance=guidance)
    visited = np.concatenate([result.record.x[::-1], result.x[None]])
    assert error(visited, case["out/trajectory"]) < 3e-6


def test_ancestral_sampling_with_learned_variance():
    case, _ = load("native_dit_spaced_50")
    grid = make_timesteps("spaced", 1000, 50)
    np.testing.assert_array_equal(grid, case["out/timestep_map"])
    plan = ddpm(make_schedule("linear"), grid, variance="learned_range")
    tables = {name: jnp.asarray(table) for name, table in analytic_tables().items()}

    def channels_last(array):
        return jnp.moveaxis(jnp.asarray(array), 1, -1)

    tables["m"] = channels_last(tables["m"])

    @jax.jit
    def step(visit, x, noise):
        t, rows = visit
        eps = analytic(tables, x, step_context(t), None)
        eps, sigma = plan.sampler.read(rows, jnp.concatenate([eps, jnp.tanh(eps)], axis=-1))
        return plan.sampler.step(rows, (), x, eps, sigma, noise)[1]

    x, visited = channels_last(case["in/x_T"]), []
    for i, j in enumerate(reversed(range(50))):
        visit = jax.tree.map(lambda row: row[j], (plan.timesteps, plan.rows))  # noqa: B023
        x = step(visit, x, channels_last(case["in/noise"][i]))
        visited.append(np.moveaxis(np.asarray(x), -1, 1))
    assert error(np.stack(visited), case["out/trajectory"]) < 3e-6
