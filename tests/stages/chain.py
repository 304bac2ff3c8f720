"""A miniature network for the stages: a time block, a mixing block and three identical conv blocks.

Small enough to compile in a few seconds, and with everything a stage distinguishes: temporal nodes,
blocks that share a signature, a product of two activations, one output.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qdiff_jax.models.program import Node, run_program, subtrees, units_with_time_block
from qdiff_jax.models.unet_ddpm import TimeEmbedding, TimeProjection, conv
from qdiff_jax.named_policies import policy
from qdiff_jax.observe.capture import run_unit
from qdiff_jax.observe.selectors import CalibrationSet
from qdiff_jax.observe.taps import Tap
from qdiff_jax.operators import QK
from qdiff_jax.policy import make_plan
from qdiff_jax.quant.timed import step_context
from qdiff_jax.sites import SiteQuant, flatten_sites, list_sites, nest_sites, op
from qdiff_jax.stages.stage import Model, fold_weights, initial_state, run_stage
from qdiff_jax.stages.weights import calibrate_weights

WIDTH, SIDE = 6, 4
TIMESTEPS = np.float32([0.0, 250.0, 500.0, 750.0])
KEY = jax.random.key(7)


class Mix(nn.Module):
    """x -> conv, plus the temporal feature."""

    @nn.compact
    def __call__(self, x, temb, train=False):
        return conv(self, "conv", x, WIDTH) + temb[:, None, None, :]


class Block(nn.Module):
    """Residual convolution, scaled by the mean product of the map with itself."""

    @nn.compact
    def __call__(self, x, train=False):
        h = nn.silu(x)
        flat = h.reshape(h.shape[0], -1, WIDTH)
        gate = nn.sigmoid(jnp.mean(op(self, "qk", QK, flat, flat), axis=(1, 2)) * 0.1)
        return x + gate[:, None, None, None] * conv(self, "conv", h, WIDTH)


PROGRAM = (
    Node("temb", TimeEmbedding(4, None, "float32", parent=None), ("t",)),
    Node("proj", TimeProjection(WIDTH, parent=None), ("temb",)),
    Node("mix", Mix(parent=None), ("x", "proj")),
    Node("a", Block(parent=None), ("mix",)),
    Node("b", Block(parent=None), ("a",)),
    Node("c", Block(parent=None), ("b",)),
)
UNITS = units_with_time_block(PROGRAM)  # "time", "mix", "a", "b", "c": three signatures
TEMPORAL = ("temb/*", "proj/*")


class Chain(nn.Module):
    @nn.compact
    def __call__(self, x, t, y=None, train=False):
        return run_program(self, PROGRAM, {"x": x, "t": t, "y": y}, train=train)


@functools.cache
def model() -> Model:
    """Weights of correlated columns, so that their rounding can be improved on."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "bias":
            return jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32)
        fan = np.prod(leaf.shape[:-1])
        return jnp.asarray(rng.standard_normal(leaf.shape) / np.sqrt(fan), jnp.float32)

    shapes = jax.eval_shape(Chain().init, jax.random.key(0), *example())["params"]
    return Model(Chain(), PROGRAM, jax.tree_util.tree_map_with_path(draw, shapes))


def example(batch: int = 2):
    return np.zeros((batch, SIDE, SIDE, 3), np.float32), np.zeros(batch, np.float32)


@functools.cache
def plan(w_bits: int | None = 4, a_bits: int | None = 8, name: str = "official:qdiffusion"):
    sites = list_sites(Chain(), *example())
    return make_plan(sites, policy(name, sites, w_bits, a_bits))


def calibration(per_step: int = 8, seed: int = 0, steps=range(4)) -> CalibrationSet:
    """per_step samples of each step, shuffled; inputs correlated over channels, scaled by the step."""
    rng = np.random.default_rng(seed)
    index = rng.permutation(np.repeat(np.asarray(steps, np.int32), per_step))
    z = rng.standard_normal((len(index), SIDE, SIDE, 1))
    x = z * np.array([1.0, 0.9, -0.8]) + 0.1 * rng.standard_normal((len(index), SIDE, SIDE, 3))
    x = (x * (1.0 + index[:, None, None, None])).astype(np.float32)
    branch = np.zeros(len(index), np.int32)
    return CalibrationSet(x, TIMESTEPS[index], index, branch, None, np.zeros_like(x))


def state(w_bits: int | None = 4, a_bits: int | None = 8, method: str = "minmax"):
    """A state whose weights have ranges and no codes."""
    begun = initial_state(plan(w_bits, a_bits), KEY)
    return run_stage(calibrate_weights(model(), method=method), begun)[0]


@jax.jit
def _tapped(params, x, t):
    sites = {entry.site for entry in plan().entries}
    taps = nest_sites({name: SiteQuant(tap=Tap("value")) for name in sites})
    variables = {"params": params, "quant": taps}
    return model().module.apply(variables, x, t, mutable=["observed"])[1]["observed"]


def site_values(params, calibrated: CalibrationSet) -> dict[str, np.ndarray]:
    """{"site:operand": every activation operand over the set}, read with value taps."""
    flat = {}
    for name, report in flatten_sites(_tapped(params, calibrated.x, calibrated.t)).items():
        site, _, operand = name.removesuffix("/value").rpartition("/")
        flat[f"{site}:{operand}"] = np.asarray(report)
    return flat


def context(calibrated: CalibrationSet):
    return step_context(calibrated.t, calibrated.index, calibrated.branch)


def leaves_equal(a, b) -> bool:
    """Equal structures and bit-identical leaves."""
    same = jax.tree.structure(a) == jax.tree.structure(b)
    return same and all(
        np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def run_until(stage, carry, position: int, chunk: int = 50):
    """Run a reconstruction stage up to the beginning of the unit at `position`."""
    while carry.position < position:
        carry = stage.run(carry, chunk)
    return carry


def block_errors(quant, calibrated: CalibrationSet, p: float = 2.0) -> dict[str, float]:
    """Mean |error|^p of every unit's outputs on full-precision inputs."""
    params, left = fold_weights(model().params, quant)
    env = {"x": calibrated.x, "t": calibrated.t, "y": None}
    ctx = context(calibrated)
    errors = {}
    for unit in UNITS:
        inputs = tuple(env[name] for name in unit.inputs)
        none = tuple({} for _ in unit.nodes)
        full = run_unit(unit.signature, subtrees(model().params, unit), none, inputs, ctx)
        made = run_unit(unit.signature, subtrees(params, unit), subtrees(left, unit), inputs, ctx)
        pairs = [np.abs(np.asarray(f) - np.asarray(m)) ** p for f, m in zip(full, made)]
        errors[unit.name] = float(np.mean([pair.mean() for pair in pairs]))
        env.update(zip(unit.outputs, full))
    return errors


def output_error(quant, calibrated: CalibrationSet) -> float:
    """Mean squared error of the network's output, weights quantized and activations not."""
    params, _ = fold_weights(model().params, quant)
    apply = jax.jit(model().module.apply)
    full = apply({"params": model().params}, calibrated.x, calibrated.t)
    return float(jnp.mean((apply({"params": params}, calibrated.x, calibrated.t) - full) ** 2))
