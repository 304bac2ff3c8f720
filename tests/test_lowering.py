"""Sampling, calibration and reconstruction lower for TPU and CUDA; no such device is needed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.diffusion.sample import sample_scan
from qdiff_jax.diffusion.samplers import ddim
from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.export.integer import lowered_int_dots
from qdiff_jax.models.program import subtrees, units_with_projections
from qdiff_jax.models.registry import predictor
from qdiff_jax.observe.observers import minmax
from qdiff_jax.observe.taps import Tap
from qdiff_jax.quant.hessian_size import Limit
from qdiff_jax.quant.moments import chunk_moments
from qdiff_jax.quant.qparams import from_range
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.runtime.mesh import data_mesh
from qdiff_jax.sites import SiteQuant, nest_sites
from qdiff_jax.stages import calibrate, objective
from qdiff_jax.stages.layer_rounding import ClosedFormConfig, round_layer
from qdiff_jax.stages.unit_moments import _level_function
from qdiff_jax.stages.unit_structure import plan_unit, unit_layers
from qdiff_jax.stages.unit_trees import (
    only_weights,
    soft_trees,
    trainable_alphas,
    without_kernels,
)

from .tiny_unet import SMALL, STEPS, inputs, network, quantized

PLATFORMS = ["tpu", "cuda"]


def sampling(quant):
    """(function of arrays, its arguments): a whole DDIM trajectory from a seed."""
    net, side = network(SMALL), SMALL.resolution
    plan = ddim(make_schedule("linear"), np.float64(sorted(STEPS)))

    def sample(variables, seed, indices):
        key = jax.random.key(seed)
        shape = (side, side, SMALL.in_channels)
        return sample_scan(predictor(net.module), variables, plan, key, indices, shape=shape)[0]

    variables = {"params": net.params, "quant": quant}
    return sample, (variables, np.uint32(0), np.arange(2, dtype=np.uint32))


def calibration():
    """One batch of mixed steps through the tapped network, half of the observers by step."""
    net = network(SMALL)
    quant = nest_sites({site.name: SiteQuant(tap=Tap()) for site in net.sites})
    names = [f"{site.name}:{site.operands[0]}" for site in net.sites]
    observer = minmax()
    observers = {
        "step": {name: observer.init(len(STEPS)) for name in names[::2]},
        "shared": {name: observer.init(1) for name in names[1::2]},
    }
    x, t = inputs(SMALL, 3)
    index = np.arange(3, dtype=np.int32)
    batch = {"x": x, "t": t, "index": index, "branch": 0 * index, "y": None, "number": index}
    observe = functools.partial(calibrate._observe, net.module, observer)
    return observe, ({"params": net.params, "quant": quant}, batch, observers)


def reconstruction():
    """Steps of learned rounding on a residual block with its time projection, as one scan."""
    net = network(SMALL)
    unit = {u.name: u for u in units_with_projections(net.program)}["up_0_block_0"]
    quant = quantized(SMALL, packed=False)

    def start(params):
        trees = only_weights(soft_trees(params, quant, unit))
        weights = tuple(map(without_kernels, subtrees(params, unit), trees))
        trainable = {"alpha": trainable_alphas(trees)}
        side = (SMALL.resolution, SMALL.resolution)
        shapes = {
            "temb": (4 * SMALL.channels,),
            "mid_block_2": (*side, SMALL.channels),
            "down_0_block_0": (*side, SMALL.channels),
            "up_0_block_0": (*side, SMALL.channels),
        }
        values = {name: jnp.zeros((6, *shape)) for name, shape in shapes.items()}
        step = jnp.zeros(6)
        ctx = calibrate.StepContext(step, step.astype(jnp.int32), step.astype(jnp.int32))
        data = {
            "inputs": tuple(values[name] for name in unit.inputs),
            "targets": tuple(values[name] for name in unit.outputs),
            "ctx": ctx,
        }
        carry = {"frozen": (weights, trees), "data": data, "trainable": trainable}
        return {**carry, "optimizer": objective.initial_optimizer(trainable)}

    rate = np.ones(5, np.float32)
    rows, keys = np.zeros((5, 2), np.int32), np.zeros((5, 2), np.uint32)
    xs = objective.StepInputs(rows, rate, rate, rate, rate, keys)
    step = objective.make_step(unit.signature)
    return functools.partial(jax.lax.scan, step), (jax.eval_shape(start, net.params), xs)


def closed_form_moments():
    """The second moments of the closing convolution of a residual block, from one chunk of samples."""
    net = network(SMALL)
    unit = {u.name: u for u in units_with_projections(net.program)}["mid_block_2"]
    side = (SMALL.resolution, SMALL.resolution, SMALL.channels)
    shapes = {"temb": (4 * SMALL.channels,)}
    inputs = tuple(jnp.zeros((6, *shapes.get(name, side))) for name in unit.inputs)
    params = subtrees(net.params, unit)
    keys = [layer.key for layer in unit_layers(unit.signature, params, inputs)]
    plan = plan_unit(unit.signature, params, inputs, keys)
    (level,) = (i for i, members in enumerate(plan.levels) if plan.layers[members[-1]].closes == 0)
    run = _level_function(
        unit.signature, plan, level, "block_fp_output", Limit(), data_mesh(jax.devices()[:1])
    )
    step = jnp.zeros(6)
    picks = [np.zeros((6, 4), np.int32) for _ in plan.levels[level]]
    batch = {
        "inputs": inputs,
        "ctx": calibrate.StepContext(step, step.astype(jnp.int32), step.astype(jnp.int32)),
        "picks": picks,
        "targets": {},
        "outputs": {"0": jnp.zeros((6, *side))},
        "full_inputs": {},
        "weights": jnp.ones(6),
    }
    return run, (params, tuple({} for _ in unit.nodes), {}, batch)


def closed_form_rounding():
    """From moments to codes and bias: factors, target, GPTQ."""
    rows, columns = 12, 5
    grid = from_range(
        QuantSpec(granularity="channel"), -jnp.ones(columns), jnp.ones(columns), 0, 15
    )
    kernel, bias = jnp.zeros((rows, columns)), jnp.zeros(columns)
    moments = chunk_moments(jnp.eye(rows), jnp.zeros((rows, columns)), jnp.ones(rows))
    config = ClosedFormConfig()
    return lambda *given: round_layer(*given, config), (kernel, bias, grid, moments)


def lowered(function, args, platform) -> str:
    exported = jax.export.export(jax.jit(function), platforms=[platform])(*args)
    assert exported.platforms == (platform,)
    return exported.mlir_module()


@pytest.mark.parametrize("platform", PLATFORMS)
def test_sampling_with_step_tables(platform):
    sample, args = sampling(quantized(SMALL, tables=True))
    assert lowered_int_dots(sample, *args, platforms=[platform]) == 0
    text = lowered(sample, args, platform)
    # One loop over the steps, whose body convolves in floating point.
    assert text.count("stablehlo.while") == 1
    convolutions = sum(site.operator.kind == "conv" for site in network(SMALL).sites)
    assert text.count("stablehlo.convolution") == convolutions


@pytest.mark.parametrize("platform", PLATFORMS)
def test_sampling_with_packed_integers_multiplies_integers(platform):
    sample, args = sampling(quantized(SMALL, w_bits=4, execute=True))
    # One product at every site, of the one step that the loop repeats.
    executing = len(network(SMALL).sites)
    assert lowered_int_dots(sample, *args, platforms=[platform]) == executing


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_calibration_step(platform):
    assert "stablehlo.reduce" in lowered(*calibration(), platform)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_closed_form_rounding(platform):
    assert "stablehlo.dot_general" in lowered(*closed_form_moments(), platform)
    factor = {"tpu": "stablehlo.cholesky", "cuda": "cusolver_potrf"}[platform]
    assert factor in lowered(*closed_form_rounding(), platform)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_reconstruction_steps(platform):
    text = lowered(*reconstruction(), platform)
    assert text.count("stablehlo.while") == 1
    assert text.count("feature_group_count = 1 ") == text.count("stablehlo.convolution") > 3
