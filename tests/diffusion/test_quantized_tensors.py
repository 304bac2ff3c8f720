"""PTQ4DM's sampler in 8 bits: posterior mean, noise level and state on grids, nothing else changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.diffusion.quantized_tensors import quantize_tensors, tensor_ranges
from qdiff_jax.diffusion.sample import sample
from qdiff_jax.diffusion.samplers import make_plan
from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.diffusion.timesteps import make_timesteps
from qdiff_jax.methods.run import make_sampler
from qdiff_jax.observe.trajectory import record_trajectories

KEY = jax.random.key(0)
SHAPE = (4, 4, 1)
GRID = make_timesteps("uniform", 1000, 5)


SPREAD = 0.5  # of the data


def predict(variables, x, ctx, y):
    """The ideal denoiser of independent normal pixels."""
    alpha_bar = jnp.asarray(make_schedule("linear").alpha_bar, jnp.float32)
    alpha_bar = alpha_bar[ctx.t.astype(jnp.int32)]
    return x * jnp.sqrt(1.0 - alpha_bar) / (alpha_bar * SPREAD**2 + 1.0 - alpha_bar)


def plan(name="ddim", **options):
    return make_plan(name, make_schedule("linear"), GRID, **options)


def drawn(sampler, record=False):
    return sample(predict, {}, sampler, KEY, range(6), shape=SHAPE, record=record)


def ranges(sampler):
    recorded = record_trajectories(predict, {}, sampler, KEY, range(6), shape=SHAPE)
    return recorded, tensor_ranges(sampler, recorded)


@pytest.mark.parametrize("sampler", [plan(), plan(eta=1.0), plan("ddpm", variance="fixed_small")])
def test_every_state_lies_on_its_grid_and_eight_bits_cost_little(sampler):
    _, found = ranges(sampler)
    quantized = quantize_tensors(sampler, 8, found)
    made = drawn(quantized, record=True)
    lo, hi = found["state"]
    step = (hi - lo) / 255
    handed_on = np.concatenate([made.record.x[:-1], made.x[None]])  # all but x_T
    codes = handed_on / step
    np.testing.assert_allclose(codes, np.round(codes), atol=2e-3)
    full = drawn(sampler).x
    errors = {
        bits: np.square(drawn(quantize_tensors(sampler, bits, found)).x - full).mean()
        for bits in (8, 4)
    }
    assert errors[8] < 1e-2 * np.square(full).mean()
    assert errors[4] > 20 * errors[8]


def test_ranges_are_those_of_the_trajectories():
    sampler = plan(eta=1.0)
    recorded, found = ranges(sampler)
    assert found["sigma"] == (0.0, float(sampler.rows["sigma"].max()))
    assert found["state"][1] >= recorded.x.max()
    deterministic, of_ddim = ranges(plan())
    # Without fresh noise the mean is the next state itself.
    assert of_ddim["mean"][1] >= deterministic.x[:-1].max() - 1e-6
    with pytest.raises(ValueError, match="holds 2 steps and the sampler 5"):
        tensor_ranges(
            plan(), record_trajectories(predict, {}, plan(), KEY, [0], shape=SHAPE, steps=[0, 1])
        )


def test_the_plan_is_said_in_the_json_of_a_bundle():
    _, found = ranges(plan())
    config = {"name": "ddim", "spacing": "uniform", "steps": 5, "options": {"eta": 0.0}}
    schedule = {"schedule": "linear", "timesteps": 1000}
    plain = make_sampler(schedule, config)
    np.testing.assert_array_equal(drawn(plain).x, drawn(plan()).x)
    made = make_sampler(schedule, {**config, "tensors": {"bits": 8, "ranges": found}})
    np.testing.assert_array_equal(drawn(made).x, drawn(quantize_tensors(plan(), 8, found)).x)


def test_what_cannot_be_quantized_is_refused():
    recorded, found = ranges(plan())
    with pytest.raises(ValueError, match="choose 2 to 8"):
        quantize_tensors(plan(), 16, found)
    with pytest.raises(ValueError, match=r"lack \['sigma'\]"):
        quantize_tensors(plan(), 8, {"mean": (0, 1), "state": (0, 1)})
    with pytest.raises(ValueError, match="'dpmpp_2m' remembers earlier steps"):
        tensor_ranges(plan("dpmpp_2m"), recorded)
