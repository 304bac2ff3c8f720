"""Every sampler against the schedulers of diffusers and the published codes, call by call.

The cases come from tests/parity/make_schedulers.py; the network is analytic and the same on both sides.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.diffusion.euler import sigma_at
from qdiff_jax.diffusion.flow import dynamic_mu, flow_euler, flow_sigmas
from qdiff_jax.diffusion.sample import sample
from qdiff_jax.diffusion.samplers import make_plan
from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.diffusion.timesteps import make_timesteps
from qdiff_jax.methods.run import make_sampler

CASES = pathlib.Path(__file__).parents[1] / "parity" / "cases" / "schedulers.npz"
LINEAR = make_schedule("linear")
SCALED = make_schedule("scaled_linear")


def case(name):
    with np.load(CASES, allow_pickle=False) as stored:
        assert name in json.loads(str(stored["meta"]))
        return {
            key.split("/")[1]: stored[key] for key in stored.files if key.startswith(name + "/")
        }


def plan(sampler, schedule, spacing, steps, *, offset=0, **options):
    grid = make_timesteps(spacing, 1000, steps, offset=offset)
    return make_plan(sampler, schedule, grid, **options)


def tables(timesteps):
    """The coefficients of the network in float64, by step index."""
    t = np.asarray(timesteps, np.float64)
    alpha_bar = np.exp(-(1e-4 * t + 9.95e-6 * t**2))
    columns = {
        "k1": np.sqrt(1 - alpha_bar) / (0.25 * alpha_bar + 1 - alpha_bar),
        "k2": np.sqrt(alpha_bar),
        "phase": 0.004 * t,
    }
    m = 0.4 * np.cos(np.arange(12.0)).reshape(1, 3, 2, 2)
    return jax.tree.map(np.float32, {**columns, "m": m})


def network(variables, x, ctx, y):
    k1, k2, phase = (variables[name][ctx.index] for name in ("k1", "k2", "phase"))
    return k1 * (x - k2 * variables["m"]) + 0.05 * jnp.sin(2.0 * x + phase)


def error(ours, theirs):
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


TRAILING = flow_sigmas(10, mu=0.8, spacing="trailing")
DETERMINISTIC = {
    "ddim": plan("ddim", LINEAR, "uniform", 10),
    "ddim_v": plan("ddim", LINEAR, "uniform", 10, prediction="v"),
    "ddim_trailing": plan("ddim", LINEAR, "trailing", 7, stride=142),
    "ddim_linspace": plan("ddim", LINEAR, "linspace", 10, stride=100),
    "plms_4": plan("plms", SCALED, "uniform", 4, offset=1),
    "plms_10": plan("plms", SCALED, "uniform", 10, offset=1),
    "plms_v": plan("plms", SCALED, "uniform", 10, offset=1, prediction="v"),
    "dpmpp_linspace": plan("dpmpp_2m", SCALED, "solver_linspace", 16),
    "dpmpp_leading": plan("dpmpp_2m", SCALED, "solver_leading", 10, offset=1),
    "dpmpp_trailing": plan("dpmpp_2m", SCALED, "trailing", 10),
    "dpmpp_euler_at_final": plan(
        "dpmpp_2m", SCALED, "solver_linspace", 16, final="first", euler_at_final=True
    ),
    "compvis_dpm_20": plan("dpmpp_2m", SCALED, "solver_linspace_fractional", 20, final="first"),
    "compvis_dpm_10": plan("dpmpp_2m", SCALED, "solver_linspace_fractional", 10, final="first"),
    "dpmpp_v_sigma_min": plan(
        "dpmpp_2m",
        SCALED,
        "solver_linspace",
        10,
        final="first",
        lower_order_final=False,
        prediction="v",
    ),
    "euler_linspace": plan("euler", SCALED, "linspace_fractional", 11),
    "euler_leading": plan("euler", SCALED, "leading", 10, offset=1, start="unit"),
    "euler_trailing": plan("euler", SCALED, "trailing", 10),
    "euler_v": plan("euler", SCALED, "linspace_fractional", 11, prediction="v"),
    "k_euler": plan("euler", SCALED, "linspace_fractional", 11, interpolation="log_sigma"),
    "flow": flow_euler(flow_sigmas(10)),
    "flow_shift3": flow_euler(flow_sigmas(10, shift=3.0)),
    "flow_dynamic": flow_euler(TRAILING),
}


def follow(ours, reference):
    """The sampler makes the reference's network calls, one by one, and ends where it ends."""
    np.testing.assert_allclose(ours.timesteps[::-1], reference["t"], rtol=1e-6, atol=1e-4)
    noise = reference["x_T"]
    result = sample(
        network,
        tables(reference["t"][::-1]),
        ours,
        jax.random.key(0),
        range(2),
        noise=noise,
        record=True,
    )
    assert error(result.record.x[::-1], reference["x"]) < 1e-5
    assert error(result.x, reference["final"]) < 1e-5


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_deterministic_sampler_follows_the_reference_call_by_call(name):
    follow(DETERMINISTIC[name], case(name))


STOCHASTIC = {
    "ddim_latent_eta": plan("ddim", SCALED, "uniform", 10, offset=1, eta=0.7, final="first"),
    "ddpm_fixed_small": plan("ddpm", LINEAR, "uniform", 10, variance="fixed_small"),
    "ddpm_fixed_large": plan("ddpm", LINEAR, "uniform", 10, variance="fixed_large"),
    "ddpm_learned_range": plan("ddpm", LINEAR, "uniform", 10, variance="learned_range"),
    "ddpm_v_clipped": plan(
        "ddpm", LINEAR, "uniform", 10, variance="fixed_small", clip_x0=1.0, prediction="v"
    ),
}


def follow_with_noise(ours, reference):
    """As `follow`, with the fresh noise that the reference drew."""
    np.testing.assert_array_equal(ours.timesteps[::-1], reference["t"])
    variables = tables(reference["t"][::-1])
    learned = ours.sampler.name == "ddpm_learned_range"

    @jax.jit
    def advance(visit, x, noise):
        index, row = visit
        where = jax.tree.map(lambda table: table[index] if table.ndim == 1 else table, variables)
        eps = where["k1"] * (x - where["k2"] * where["m"])
        eps = eps + 0.05 * jnp.sin(2.0 * x + where["phase"])
        output = jnp.concatenate([eps, jnp.tanh(eps)], axis=1) if learned else eps
        # Channels are last here and second there.
        estimate, sigma = ours.sampler.read(row, jnp.moveaxis(output, 1, -1))
        estimate = jnp.moveaxis(estimate, -1, 1)
        sigma = jnp.moveaxis(sigma, -1, 1) if jnp.ndim(sigma) else sigma
        return ours.sampler.step(row, (), x, estimate, sigma, noise)[1]

    variables = jax.tree.map(jnp.asarray, variables)
    x = reference["x_T"]
    for i, j in enumerate(reversed(range(ours.steps))):
        assert error(np.asarray(x), reference["x"][i]) < 1e-5
        visit = jax.tree.map(lambda row: row[j], (ours.index, ours.rows))  # noqa: B023
        x = advance(visit, x, reference["noise"][i])
    assert error(np.asarray(x), reference["final"]) < 1e-5


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_sampler_follows_the_reference_given_its_noise(name):
    follow_with_noise(STOCHASTIC[name], case(name))


def test_sigma_between_two_training_steps():
    """Halfway: the mean in diffusers, the geometric mean in k-diffusion."""
    ends = sigma_at(SCALED, np.array([0.0, 1.0]), "sigma")
    np.testing.assert_allclose(ends**2, (1 / SCALED.alpha_bar - 1)[:2], rtol=1e-9)
    middle = np.array([0.5])
    assert sigma_at(SCALED, middle, "sigma")[0] == pytest.approx(ends.mean())
    assert sigma_at(SCALED, middle, "log_sigma")[0] == pytest.approx(np.sqrt(ends.prod()))
    assert ends.mean() > 1.01 * np.sqrt(ends.prod())


def test_sigmas_of_flow_matching():
    # FLUX at 1024x1024: 4096 tokens; the reference moves 1/T twice by a fixed shift, mu never.
    assert dynamic_mu(4096) == pytest.approx(1.15)
    assert dynamic_mu(256) == pytest.approx(0.5)
    assert flow_sigmas(1)[0] == 1.0
    once = 3e-3 / 1.002
    assert flow_sigmas(5, shift=3.0)[0] == pytest.approx(3 * once / (1 + 2 * once))
    assert flow_sigmas(5, mu=1.0)[0] == pytest.approx(np.e * 1e-3 / (1 + (np.e - 1) * 1e-3))
    np.testing.assert_allclose(flow_sigmas(4, spacing="trailing"), [0.25, 0.5, 0.75, 1.0])


def test_the_velocity_of_a_straight_line_is_followed_exactly():
    x0, eps = jax.random.normal(jax.random.key(0), (2, 20))
    ours = flow_euler(flow_sigmas(3, shift=3.0))
    x = eps
    for j in reversed(range(3)):
        row = {name: values[j] for name, values in ours.rows.items()}
        np.testing.assert_allclose(x, row["signal"] * x0 + row["noise"] * eps, atol=1e-6)
        x = ours.sampler.step(row, (), x, eps - x0, row["sigma"], eps)[1]
    np.testing.assert_allclose(x, x0, atol=1e-6)


@pytest.mark.parametrize("name", [*DETERMINISTIC, *STOCHASTIC])
def test_eps_coefficient_is_the_sensitivity_of_the_step_to_the_estimate(name):
    ours = {**DETERMINISTIC, **STOCHASTIC}[name]
    x, noise = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    for j in (0, 1, ours.steps - 1):
        row = {key: values[j] for key, values in ours.rows.items()}
        if name == "ddpm_v_clipped":
            row["clip"] = np.float32(np.inf)
        state = ours.sampler.init(jnp.asarray(x))
        ahead, here = (
            ours.sampler.step(row, state, x, np.full_like(x, shift), row["sigma"], noise)[1]
            for shift in (1.0, 0.0)
        )
        np.testing.assert_allclose(ahead - here, row["eps_coefficient"], rtol=2e-4, atol=3e-6)


def test_plans_from_json_configs():
    """What the published protocols set, a model's prediction included, reaches the plan."""
    latent = {"beta_start": 0.0015, "beta_end": 0.0195}
    schedule = {"schedule": "scaled_linear", "timesteps": 1000, "options": latent}
    asked = {"name": "ddim", "spacing": "uniform", "steps": 20, "grid": {"offset": 1}}
    made = make_sampler(schedule, {**asked, "options": {"eta": 1.0, "final": "first"}})
    expected = plan(
        "ddim",
        make_schedule("scaled_linear", **latent),
        "uniform",
        20,
        offset=1,
        eta=1.0,
        final="first",
    )
    jax.tree.map(np.testing.assert_array_equal, made, expected)
    velocity = make_sampler({**schedule, "prediction": "v"}, asked)
    assert velocity.sampler is DETERMINISTIC["ddim_v"].sampler
    flow = {"schedule": "flow", "timesteps": 1000}
    sd3 = {"name": "flow_euler", "spacing": "scheduler", "steps": 10, "options": {"shift": 3.0}}
    jax.tree.map(
        np.testing.assert_array_equal, make_sampler(flow, sd3), DETERMINISTIC["flow_shift3"]
    )
    with pytest.raises(ValueError, match="'ddim' does not sample a model with the schedule 'flow'"):
        make_sampler(flow, asked)
    with pytest.raises(ValueError, match="'flow_euler' does not sample .* 'scaled_linear'"):
        make_sampler(schedule, sd3)
    with pytest.raises(ValueError, match="'flow_euler' .* no grid of timesteps.*leave grid out"):
        make_sampler(flow, {**sd3, "grid": {"offset": 1}})
    with pytest.raises(ValueError, match=r"'flow_euler' has no option \['eta'\].*'shift', 'mu'"):
        make_sampler(flow, {**sd3, "options": {"eta": 0.0}})


def test_mistakes_are_named():
    grid = make_timesteps("uniform", 1000, 10)
    with pytest.raises(ValueError, match="plms needs at least 2 timesteps"):
        make_plan("plms", LINEAR, grid[:1])
    with pytest.raises(ValueError, match="plms cannot visit a timestep twice"):
        make_plan("plms", LINEAR, make_timesteps("quad", 1000, 100))
    with pytest.raises(ValueError, match=r"'plms' has no option \['eta'\].*'final'"):
        make_plan("plms", LINEAR, grid, eta=1.0)
    for stride in (0, 1.5):
        with pytest.raises(ValueError, match=f"stride must be a positive integer.*got {stride}"):
            make_plan("ddim", LINEAR, grid, stride=stride)
    with pytest.raises(ValueError, match="a sampler by strides cannot visit a timestep twice"):
        make_plan("ddim", LINEAR, make_timesteps("quad", 1000, 100), stride=10)
    with pytest.raises(ValueError, match="unknown prediction 'x0'.*eps.*v"):
        make_plan("ddim", LINEAR, grid, prediction="x0")
    with pytest.raises(ValueError, match="unknown interpolation 'spline'"):
        make_plan("euler", LINEAR, grid, interpolation="spline")
    with pytest.raises(ValueError, match="unknown start 'zero'"):
        make_plan("euler", LINEAR, grid, start="zero")
    with pytest.raises(ValueError, match="leave the range 0..999"):
        make_plan("euler", LINEAR, grid + 100)
    with pytest.raises(ValueError, match="not both"):
        flow_sigmas(10, shift=3.0, mu=0.5)
    with pytest.raises(ValueError, match="unknown spacing 'karras' of sigmas"):
        flow_sigmas(10, spacing="karras")
    with pytest.raises(ValueError, match="shift must be positive"):
        flow_sigmas(10, shift=0.0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        flow_sigmas(0)
    with pytest.raises(ValueError, match="strictly ascending"):
        flow_euler(np.array([0.5, 0.5]))
    with pytest.raises(ValueError, match="above 0 and up to 1"):
        flow_euler(np.array([0.0, 0.5]))
    with pytest.raises(ValueError, match="no slope"):
        dynamic_mu(10, base=(4, 0.1), largest=(4, 0.2))
