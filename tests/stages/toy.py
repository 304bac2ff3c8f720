"""A denoiser of points: three quantized dense layers between others that are not. It compiles in a second,
and small as it is it can be trained, so that errors of quantization mean something."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qdiff_jax.diffusion.samplers import ddim
from qdiff_jax.diffusion.schedule import from_betas
from qdiff_jax.models.layers import dense
from qdiff_jax.models.program import Node, run_program
from qdiff_jax.models.registry import predictor
from qdiff_jax.observe.quantization_noise import Paired, paired
from qdiff_jax.observe.selectors import every_step
from qdiff_jax.observe.trajectory import record_trajectories
from qdiff_jax.policy import ACTIVATION, WEIGHT, Rule, make_plan
from qdiff_jax.sites import list_sites
from qdiff_jax.stages.calibrate import ActivationConfig, calibrate_activations
from qdiff_jax.stages.stage import Model, initial_state, run_stage
from qdiff_jax.stages.weights import calibrate_weights

POINT = 16
LAYERS = ("net/l0", "net/l1", "net/l2")


GAINS = (1.0, 1.0, 1.0)


class Net(nn.Module):
    """Residual layers on a point, the time added before the first. gains: of what each of them reads."""

    width: int
    gains: tuple[float, ...] = GAINS

    @nn.compact
    def __call__(self, x, t, train=False):
        frequency = jnp.exp(-math.log(1e4) * jnp.arange(16, dtype=jnp.float32) / 16)
        angle = t[:, None] * frequency[None] * 10
        time = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        time = nn.silu(dense(self, "t", time, self.width))
        h = dense(self, "in", x, self.width)
        for i in range(3):
            u = nn.silu(h + time if i == 0 else h)
            h = h + dense(self, f"l{i}", u * self.gains[i], self.width)
        return dense(self, "out", h, POINT)


class Toy(nn.Module):
    width: int
    gains: tuple[float, ...] = GAINS

    @nn.compact
    def __call__(self, x, t, y=None, train=False):
        return run_program(
            self, program(self.width, self.gains), {"x": x, "t": t, "y": y}, train=train
        )


@functools.cache
def program(width: int, gains: tuple[float, ...] = GAINS):
    return (Node("net", Net(width, gains, parent=None), ("x", "t")),)


@functools.cache
def module(width: int, gains: tuple[float, ...] = GAINS) -> Toy:
    return Toy(width, gains)


def example(batch: int = 2):
    return np.zeros((batch, POINT), np.float32), np.zeros(batch, np.float32)


@functools.cache
def model(width: int = 16) -> Model:
    """With random weights; those of the third layer ten times smaller."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module(width).init, jax.random.key(0), *example())["params"]

    def draw(path, leaf):
        z = rng.standard_normal(leaf.shape) / (np.sqrt(leaf.shape[0]) if leaf.ndim > 1 else 10)
        return jnp.asarray(z * (0.1 if path[-2].key == "l2" else 1.0), jnp.float32)

    return Model(module(width), program(width), jax.tree_util.tree_map_with_path(draw, shapes))


def plan(width: int, w_bits: int | None, a_bits: int | None):
    """The three layers in the middle, all else in full precision."""
    sites = list_sites(module(width), *example())
    activation = ACTIVATION if a_bits else None
    rules = [Rule("weights", name, ("weight",), w_bits, WEIGHT) for name in LAYERS]
    rules += [Rule("inputs", name, ("input",), a_bits, activation) for name in LAYERS]
    rest = Rule("all else in full precision", "*", ("weight", "input"), None, None)
    return make_plan(sites, (*rules, rest))


@functools.cache
def schedule(steps: int = 100):
    """The forward process of the toy: 100 steps, or fewer of the same kind."""
    return from_betas("toy", np.linspace(1e-3, 0.12, steps))


def sampler(steps: int = 100, eta: float = 0.0):
    return ddim(schedule(steps), np.arange(steps, dtype=np.float64), eta=eta)


class Recorded(NamedTuple):
    paired: Paired
    calibration: object


def record(teacher: Model, steps: int, samples: int, seed: int) -> Recorded:
    """Trajectories of a network, and all of their states as a calibration set."""
    plan_of_sampler = sampler(steps)
    trajectory = record_trajectories(
        predictor(teacher.module),
        {"params": teacher.params, "quant": {}},
        plan_of_sampler,
        jax.random.key(seed),
        range(samples),
        shape=(POINT,),
        scan=True,
    )
    states = every_step(jax.random.key(seed + 1), trajectory)
    return Recorded(paired(trajectory, None, plan_of_sampler, schedule(steps)), states)


def calibrated(teacher: Model, calibration, timesteps, w_bits=4, a_bits=4, method="mse"):
    """Ranges of the three layers: weights by `method`, activations by MSE."""
    state = initial_state(plan(teacher.module.width, w_bits, a_bits), jax.random.key(7))
    config = ActivationConfig(observer="mse", batch_size=len(calibration))
    for stage in (
        calibrate_weights(teacher, method=method),
        calibrate_activations(teacher, calibration, timesteps, config),
    ):
        state, _ = run_stage(stage, state)
    return state
