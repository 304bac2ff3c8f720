"""What is measured of calibration and reconstruction: steps of single units, passes, compiles, ranges."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench_timing import interleave, ratio, spent
from qdiff_jax.models.families import make_module, parameter_shapes
from qdiff_jax.models.program import Unit, apply_unit, subtrees, units_with_projections
from qdiff_jax.models.unet_ddpm import UNetConfig, unet_program
from qdiff_jax.observe.capture import run_unit
from qdiff_jax.observe.selectors import CalibrationSet
from qdiff_jax.policy import SitePlan
from qdiff_jax.quant.timed import step_context
from qdiff_jax.runtime.cache import compile_account
from qdiff_jax.runtime.loop import run_steps
from qdiff_jax.stages.objective import initial_optimizer, lp_loss, make_step, sum_of_outputs
from qdiff_jax.stages.reconstruct import ReconstructConfig, reconstruct
from qdiff_jax.stages.stage import Model, QuantState, initial_state, run_stage
from qdiff_jax.stages.unit_steps import step_inputs
from qdiff_jax.stages.unit_trees import (
    only_weights,
    soft_trees,
    trainable_alphas,
    without_kernels,
)
from qdiff_jax.stages.weights import calibrate_weights

BATCH = 32


def random_model(config: UNetConfig) -> Model:
    """The network of a config with drawn parameters: no timing here depends on their values."""
    module = make_module(config)
    shapes = parameter_shapes(config)
    rng = np.random.default_rng(0)

    def draw(leaf):
        fan = max(1, int(np.prod(leaf.shape[:-1])))
        return jnp.asarray(rng.standard_normal(leaf.shape) / np.sqrt(fan), jnp.float32)

    return Model(module, unet_program(config), jax.tree.map(draw, shapes))


def random_set(shape, samples: int, num_classes: int, steps: np.ndarray) -> CalibrationSet:
    """Noise at the steps of a schedule, for timing: nothing here depends on the values."""
    rng = np.random.default_rng(0)
    index = rng.integers(0, len(steps), samples).astype(np.int32)
    x = rng.standard_normal((samples, *shape)).astype(np.float32)
    y = rng.integers(0, num_classes, samples).astype(np.int32)
    branch = np.zeros(samples, np.int32)
    return CalibrationSet(x, np.float32(steps)[index], index, branch, y, np.zeros_like(x))


def range_search(model: Model, plan: SitePlan) -> tuple[QuantState, dict]:
    """Row (c): the MSE search over every weight, compiling included and then again."""
    begin = functools.partial(initial_state, plan, jax.random.key(0))
    with compile_account() as account:
        (state, report), first = spent(lambda: run_stage(calibrate_weights(model), begin()))
    _, warm = spent(lambda: run_stage(calibrate_weights(model), begin()))
    return state, {
        "weights": report["weights"],
        "first_cpu_s": first["cpu_s"],
        "compile_s": account.seconds,
        "warm_cpu_s": warm["cpu_s"],
        "warm_wall_s": warm["wall_s"],
    }


def unit_inputs(model: Model, calibration: CalibrationSet, wanted: set[str]) -> dict:
    """{unit: (inputs, outputs) over the set} of the units asked for, in full precision."""
    env = {"x": calibration.x, "t": calibration.t, "y": calibration.y}
    ctx = step_context(calibration.t, calibration.index, calibration.branch)
    found = {}
    for unit in units_with_projections(model.program):
        inputs = tuple(env[name] for name in unit.inputs)
        none = tuple({} for _ in unit.nodes)
        outputs = run_unit(unit.signature, subtrees(model.params, unit), none, inputs, ctx)
        env.update(zip(unit.outputs, outputs))
        if unit.name in wanted:
            found[unit.name] = (inputs, outputs)
            if len(found) == len(wanted):
                break
    return found


@functools.partial(jax.jit, static_argnames="signature")
def plain_step(signature, kernels, params, inputs, targets):
    """Forward and backward of a block by hand: its loss and the gradient of its own kernels."""

    def loss(kernels):
        merged = tuple(_with_kernels(p, k) for p, k in zip(params, kernels, strict=True))
        outputs = apply_unit(signature, merged, tuple({} for _ in params), inputs)
        return sum(lp_loss(y, target, 2.0) for y, target in zip(outputs, targets))

    return jax.value_and_grad(loss)(kernels)


def _kernels(tree):
    return {name: layer["kernel"] for name, layer in tree.items() if "kernel" in layer}


def _with_kernels(tree, kernels):
    return {
        name: {**layer, "kernel": kernels[name]} if name in kernels else layer
        for name, layer in tree.items()
    }


def unit_step(
    model: Model,
    state: QuantState,
    unit: Unit,
    data: tuple,
    calibration: CalibrationSet,
    loss: Callable,
    rounds: int,
    seconds: float,
) -> dict:
    """Row (a): one step of reconstruction against `plain_step` on a minibatch of the same block.

    Ours is the loop as the stage runs it: drawing the minibatch's rows, gathering them from the cached
    set, soft rounding, regulariser, Adam. Theirs has its minibatch ready and no optimizer. seconds: about
    how long one side runs in a round.
    """
    inputs, targets = (jax.tree.map(jnp.asarray, part) for part in data)
    params = subtrees(model.params, unit)
    kernels = tuple(_kernels(tree) for tree in params)
    batch = jax.tree.map(lambda leaf: leaf[:BATCH], (inputs, targets))

    def theirs(repeats):
        for _ in range(repeats):
            result = plain_step(unit.signature, kernels, params, *batch)
        return jax.block_until_ready(result)

    theirs(1)
    _, once = spent(lambda: theirs(2))
    repeats = int(np.clip(2 * seconds / max(once["cpu_s"], 1e-6), 2, 50))

    config = ReconstructConfig(steps=1_000_000, batch_size=BATCH)
    soft = only_weights(soft_trees(model.params, state.quant, unit))
    trainable = {"alpha": trainable_alphas(soft)}
    carry = {
        "frozen": (tuple(without_kernels(p, q) for p, q in zip(params, soft)), soft),
        "data": {
            "inputs": inputs,
            "targets": targets,
            "ctx": step_context(calibration.t, calibration.index, calibration.branch),
        },
        "trainable": trainable,
        "optimizer": initial_optimizer(trainable),
    }
    # A step past the warm-up, so that the regulariser counts.
    held = {"carry": jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), carry), "at": 200_000}
    step = make_step(unit.signature, loss=loss)

    def ours():
        start, stop = held["at"], held["at"] + repeats
        xs = step_inputs(config, jax.random.key(0), len(calibration), 0, start, stop)
        held["carry"], losses = run_steps(step, held["carry"], xs, donate=True)
        held["at"] = stop
        return jax.block_until_ready(losses)

    times = interleave({"ours": ours, "theirs": lambda: theirs(repeats)}, rounds)
    shapes = [tuple(leaf.shape[1:]) for leaf in jax.tree.leaves(data[0])]
    return {
        "unit": unit.name,
        "inputs": " + ".join("x".join(map(str, s)) or "scalar" for s in shapes),
        "repeats": repeats,
        "ours": times["ours"].summary(repeats),
        "theirs": times["theirs"].summary(repeats),
        **ratio(times["ours"], times["theirs"]),
    }


def counted_loss() -> tuple[Callable, list]:
    """The loss of a unit, and a list that grows by one whenever a step with it is traced."""
    traced: list = []

    def loss(outputs, targets, p):
        traced.append(None)
        return sum_of_outputs(outputs, targets, p)

    return loss, traced


def walk(
    model: Model,
    state: QuantState,
    calibration: CalibrationSet,
    loss: Callable,
    traced: list,
) -> dict:
    """Rows (d) and (e): a reconstruction of few steps and its compiles against its distinct units.

    state: with ranges and no codes. loss, traced: from `counted_loss`, not used before.
    """
    units = units_with_projections(model.program)
    config = ReconstructConfig(steps=2, lr=1.0, batch_size=BATCH, walk_batch=len(calibration))
    work = reconstruct(model, units, calibration, config, loss=loss)
    (state, report), cost = spent(lambda: run_stage(work, state))
    again = reconstruct(
        model,
        units,
        calibration,
        ReconstructConfig(
            steps=1,
            batch_size=BATCH,
            walk_batch=len(calibration),
            trains="scales",
            inputs="full_precision",
        ),
    )
    _, second = run_stage(again, state)
    return {
        "units": len(units),
        "distinct": distinct_units(model, units, calibration),
        "step_compiles": len(traced),
        "backend_compiles": report["compiles"],
        "compile_s": report["compile_seconds"],
        "cpu_s": cost["cpu_s"],
        "passes_weights": report["network_passes"],
        "passes_scales": second["network_passes"],
        "passes_ranges": 1.0,
    }


def distinct_units(model: Model, units, calibration: CalibrationSet) -> int:
    """How many units differ in signature or in the shapes that flow through them."""
    shapes = {
        name: jax.ShapeDtypeStruct((1, *value.shape[1:]), value.dtype)
        for name, value in (("x", calibration.x), ("t", calibration.t), ("y", calibration.y))
    }
    ctx = jax.eval_shape(lambda: step_context(np.zeros(1), np.zeros(1), np.zeros(1)))
    seen = set()
    for unit in units:
        inputs = tuple(shapes[name] for name in unit.inputs)
        seen.add((unit.signature, tuple((s.shape, str(s.dtype)) for s in inputs)))
        run = functools.partial(run_unit, unit.signature)
        none = tuple({} for _ in unit.nodes)
        outputs = jax.eval_shape(run, subtrees(model.params, unit), none, inputs, ctx)
        shapes.update(zip(unit.outputs, outputs))
    return len(seen)
