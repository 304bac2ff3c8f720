"""What layers are aimed at, against NumPy on explicit rows: sums of branches, shortcuts, gates, plain layers.

Two units of dense layers whose forward pass is written twice, as a module and in NumPy, with inputs that
differ between the streams and weights that are moved as if they were rounded.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from qdiff_jax.models.layers import dense
from qdiff_jax.models.program import Signature
from qdiff_jax.quant.moments import cross_moment, refit_bias, toward_target
from qdiff_jax.quant.timed import step_context
from qdiff_jax.runtime.mesh import data_mesh
from qdiff_jax.stages.layer_rounding import _factors
from qdiff_jax.stages.unit_moments import Sampling, full_pass, level_pass
from qdiff_jax.stages.unit_structure import plan_unit, unit_layers

SAMPLES, POSITIONS, WIDE, DEEP = 24, 3, 4, 6


class Residual(nn.Module):
    """shortcut(x) + last(tanh(first(x) + time(emb) + given)), as a residual block with its projection."""

    @nn.compact
    def __call__(self, x, emb, given, train=False):
        h = dense(self, "first", x, DEEP) + dense(self, "time", emb, DEEP)[:, None, :]
        h = dense(self, "last", jnp.tanh(h + given[:, None, :]), WIDE)
        return dense(self, "shortcut", x, WIDE) + h


class Gated(nn.Module):
    """x + g proj(x), and on it an MLP with a gate of its own, as a diffusion transformer's block."""

    @nn.compact
    def __call__(self, x, gates, train=False):
        first, second = jnp.split(gates, 2, axis=-1)
        x = x + first[:, None, :] * dense(self, "proj", jnp.sin(x), WIDE)
        h = dense(self, "up", jnp.tanh(x), DEEP)
        return x + second[:, None, :] * dense(self, "down", jnp.tanh(h), WIDE)


UNITS = {
    "residual": (Residual(parent=None), ((POSITIONS, WIDE), (5,), (DEEP,))),
    "gated": (Gated(parent=None), ((POSITIONS, WIDE), (2 * WIDE,))),
}


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Case:
    """A unit with all that its passes take and give; weights of samples are not equal."""

    def __init__(self, name):
        self.name = name
        module, shapes = UNITS[name]
        self.inputs = tuple(draw(i, SAMPLES, *shape) for i, shape in enumerate(shapes))
        self.met = tuple(v + 0.1 * draw(9 + i, *v.shape) for i, v in enumerate(self.inputs))
        count = len(shapes)
        self.signature = Signature((module,), (tuple(range(count)),), (count,))
        made = module.init(jax.random.key(0), *(v[:1] for v in self.inputs))["params"]
        self.params = {
            op: {k: draw(20 + i + j, *v.shape) * 0.5 for j, (k, v) in enumerate(leaves.items())}
            for i, (op, leaves) in enumerate(sorted(made.items()))
        }
        self.moved = {
            op: {k: v + 0.05 * draw(40, *v.shape) for k, v in leaves.items()}
            for op, leaves in self.params.items()
        }
        keys = [layer.key for layer in unit_layers(self.signature, (self.params,), self.inputs)]
        first = tuple(v[:2] for v in self.inputs)
        self.plan = plan_unit(self.signature, (self.params,), first, keys)
        self.weights = np.abs(draw(50, SAMPLES)) + 0.1
        self.sampling = Sampling(0, 8, self.weights)
        self.mesh = data_mesh(jax.devices()[:1])

    def params_at(self, op):
        """Moved where a layer is rounded before `op`, as it was elsewhere."""
        order = [layer.op for layer in self.plan.layers]
        level = next(m for m in self.plan.levels if order.index(op) in m)
        before = set(order[: level[0]])
        return {o: (self.moved if o in before else self.params)[o] for o in order}

    def moments(self, op, target):
        index = [layer.op for layer in self.plan.layers].index(op)
        level = next(i for i, members in enumerate(self.plan.levels) if index in members)
        times = np.zeros(SAMPLES, np.float32)
        found = level_pass(
            self.signature,
            self.plan,
            level,
            (self.params_at(op),),
            ({},),
            self.met,
            self.inputs,
            *full(self.name, target),
            step_context(times, times.astype(np.int32), times.astype(np.int32)),
            self.sampling,
            self.mesh,
            target,
        )
        return found[self.plan.levels[level].index(index)]


@functools.cache
def case(name):
    return Case(name)


@functools.cache
def full(name, target):
    own = case(name)
    return full_pass(
        own.signature,
        own.plan,
        (own.params,),
        own.inputs,
        own.sampling,
        own.mesh,
        lambda i, shape, dtype: np.empty(shape, dtype),
        target,
    )


def layer(params, op, x):
    return x @ params[op]["kernel"].astype(np.float64) + params[op]["bias"]


def residual(params, x, emb, given):
    """(first, time, shortcut, output) of `Residual` in float64."""
    first, time = layer(params, "first", x), layer(params, "time", emb)
    h = np.tanh(first + time[:, None, :] + given[:, None, :])
    shortcut = layer(params, "shortcut", x)
    return first, time, shortcut, shortcut + layer(params, "last", h)


def gated(params, x, gates):
    """(the stream behind the first branch, output) of `Gated` in float64."""
    first, second = np.split(gates.astype(np.float64), 2, axis=-1)
    x = x + first[:, None, :] * layer(params, "proj", np.sin(x))
    h = layer(params, "down", np.tanh(layer(params, "up", np.tanh(x))))
    return x, x + second[:, None, :] * h


def check(moments, r, weights):
    """Mean and energy of r [N, P, C] with weights [N, P], and its cross moment with nothing left out."""
    r, weights = r.reshape(-1, r.shape[-1]), weights.reshape(-1)
    share = weights / weights.sum()
    mean = share @ r
    np.testing.assert_allclose(moments.target_mean, mean, rtol=0, atol=2e-5 * np.abs(r).max())
    energy = share @ (r - mean) ** 2
    np.testing.assert_allclose(moments.energy / moments.weight, energy, rtol=1e-3)
    np.testing.assert_allclose(moments.weight, weights.sum(), rtol=1e-4)


def every_position(weights, r):
    return np.broadcast_to(weights[:, None], r.shape[:2])


BLOCK = "block_fp_output"


def test_a_sum_makes_up_for_all_its_parts():
    """`first` for the input that is added to it, `time` for what `first` and that input still lack, `last`
    for the output with its shortcut, and `shortcut`, rounded before, for itself."""
    own = case("residual")
    assert [op for level in own.plan.levels for op in (own.plan.layers[i].op for i in level)] == [
        "first",
        "time",
        "shortcut",
        "last",
    ]
    first, time, shortcut, output = residual(own.params, *own.inputs)
    lacks = (own.inputs[2] - own.met[2])[:, None, :]

    def now(op):
        return residual(own.params_at(op), *own.met)

    wanted = {
        "first": first - now("first")[0] + lacks,
        "time": (time - now("time")[1] + (first - now("time")[0]).mean(1))[:, None, :] + lacks,
        "shortcut": shortcut - now("shortcut")[2],
        "last": output - now("last")[3],
    }
    for op, r in wanted.items():
        check(own.moments(op, BLOCK), r, every_position(own.weights, r))


@pytest.mark.parametrize(("op", "which"), [("proj", 0), ("down", 1)])
def test_behind_a_gate_the_lack_is_divided_by_it_and_rows_weigh_by_its_square(op, which):
    own = case("gated")
    gates = np.split(own.met[1].astype(np.float64), 2, axis=-1)[which]
    known = np.split(own.inputs[1].astype(np.float64), 2, axis=-1)[which]
    power = np.average(known**2, axis=0, weights=own.weights)
    lack = gated(own.params, *own.inputs)[which] - gated(own.params_at(op), *own.met)[which]
    r = lack * (gates / (gates**2 + 0.05 * power))[:, None, :]
    weights = own.weights * np.mean(gates**2 / power, axis=1)
    check(own.moments(op, BLOCK), r, every_position(weights, r))


def test_a_layer_of_its_own_is_the_least_squares_solution():
    """Without a ridge, and before rounding: weights and bias of the best fit of the full-precision output
    to the inputs that are met."""
    own = case("residual")
    moments = own.moments("first", "layer_fp_output")
    options = dict(act_order=True, asymmetric=True, centred=True, double=False)
    ridged = _factors(moments.spread, moments.mean, moments.weight, 0.01, 0.0, **options)[2]
    kernel, bias = (jnp.asarray(own.params["first"][k]) for k in ("kernel", "bias"))
    made = toward_target(kernel, ridged, cross_moment(moments))
    target = layer(own.params, "first", own.inputs[0]).reshape(-1, DEEP)
    rows = np.concatenate([own.met[0], np.ones((SAMPLES, POSITIONS, 1))], axis=-1)
    root = np.sqrt(np.repeat(own.weights, POSITIONS))[:, None]
    best = np.linalg.lstsq(root * rows.reshape(-1, WIDE + 1), root * target, rcond=None)[0]
    np.testing.assert_allclose(made, best[:-1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(refit_bias(bias, kernel, made, moments), best[-1], atol=1e-4)


def test_a_layer_that_aims_at_itself_lacks_nothing():
    moments = case("residual").moments("last", "layer_quantized_input")
    np.testing.assert_array_equal(moments.energy, 0.0)
    np.testing.assert_array_equal(moments.cross, 0.0)
