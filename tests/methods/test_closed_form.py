"""Closed-form rounding end to end: below nearest rounding on a U-Net and on a transformer, with and
without quantized activations, and inside BRECQ and TFMQ-DM."""

import functools

import jax
import numpy as np
import pytest

from qdiff_jax.methods.brecq import brecq
from qdiff_jax.methods.closed_form import closed_form
from qdiff_jax.methods.rtn import rtn
from qdiff_jax.methods.tfmq import tfmq
from qdiff_jax.models.families import example_inputs
from qdiff_jax.models.registry import load
from qdiff_jax.named_policies import policy
from qdiff_jax.observe.selectors import CalibrationSet
from qdiff_jax.policy import make_plan
from qdiff_jax.quant.timed import select, step_context
from qdiff_jax.sites import list_sites
from qdiff_jax.stages.calibrate import ActivationConfig
from qdiff_jax.stages.layer_rounding import ClosedFormConfig
from qdiff_jax.stages.reconstruct import ReconstructConfig
from qdiff_jax.stages.stage import Model, fold_weights, initial_state, run_stage

from .. import tiny_unet

TIMESTEPS = np.float32([100.0, 500.0, 900.0])
ACTIVATIONS = ActivationConfig(observer="minmax", batch_size=24)
ROUNDING = ClosedFormConfig(walk_batch=24, check_samples=24)


@functools.cache
def network(name: str) -> Model:
    if name == "dit":
        return load("random:dit").model
    net = tiny_unet.network(tiny_unet.SMALL)
    return Model(net.module, net.program, net.params)


@functools.cache
def images(name: str, seed: int = 0) -> CalibrationSet:
    x, _, y = example_inputs(network(name).module.config, 48)
    rng = np.random.default_rng(seed)
    index = np.resize(np.arange(3, dtype=np.int32), 48)
    # Smooth over space: neighbouring inputs of a convolution are correlated, as in images.
    x = np.cumsum(rng.standard_normal(x.shape), axis=1).astype(np.float32) * 0.5
    y = None if y is None else rng.integers(0, 10, 48).astype(np.int32)
    return CalibrationSet(x, TIMESTEPS[index], index, np.zeros(48, np.int32), y, np.zeros_like(x))


def error(name: str, quant) -> float:
    """Relative squared error of the prediction on images that did not calibrate."""
    model, held = network(name), images(name, seed=1)
    params, left = fold_weights(model.params, quant)
    ctx = step_context(held.t, held.index, held.branch)
    full = _predict(model.module, {"params": model.params, "quant": {}}, held)
    made = _predict(model.module, {"params": params, "quant": select(left, ctx)}, held)
    return float(np.sum((made - full) ** 2) / np.sum(full**2))


@functools.partial(jax.jit, static_argnames="module", compiler_options=tiny_unet.QUICK)
def _apply(module, variables, x, t, y):
    return module.apply(variables, x, t, y)


def _predict(module, variables, held) -> np.ndarray:
    return np.asarray(_apply(module, variables, held.x, held.t, held.y), np.float64)


def run(name: str, method, a_bits, **options) -> float:
    model = network(name)
    sites = list_sites(model.module, *example_inputs(model.module.config))
    state = initial_state(make_plan(sites, policy("common", sites, 4, a_bits)), jax.random.key(0))
    sets = (images(name), TIMESTEPS)
    if method is not rtn:
        sets = (images(name), *sets)
    for stage in method(model, *sets, activations=ACTIVATIONS, **options).stages:
        state, _ = run_stage(stage, state)
    return error(name, state.quant)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "unet"])
@pytest.mark.parametrize("a_bits", [None, 8])
def test_far_below_nearest_rounding(name, a_bits):
    made = run(name, closed_form, a_bits, rounding=ROUNDING)
    assert made < 0.6 * run(name, rtn, a_bits)


@pytest.mark.slow
def test_weights_make_up_for_four_bit_activations():
    blind = ClosedFormConfig(walk_batch=24, check_samples=24, activations=False)
    aware = run("unet", closed_form, 4, rounding=ROUNDING)
    assert aware < run("unet", closed_form, 4, rounding=blind)


@pytest.mark.slow
@pytest.mark.parametrize("method", [brecq, tfmq])
def test_as_the_rounding_of_other_methods(method):
    steps = ReconstructConfig(steps=1, batch_size=8)
    options = {"rounding": "closed_form", "closed_form": ROUNDING, "weights": steps}
    assert run("unet", method, 8, **options) < 0.6 * run("unet", rtn, 8)


@pytest.mark.parametrize("method", [brecq, tfmq])
def test_unknown_rounding_lists_those_there_are(method):
    sets = (images("unet"), images("unet"), TIMESTEPS)
    with pytest.raises(ValueError, match=r"rounding 'gptq' is unknown.*closed_form"):
        method(network("unet"), *sets, rounding="gptq")
