"""Recomputing whole blocks: the prediction and every gradient are those of the network that keeps all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.models.program import apply_unit, subtrees
from qdiff_jax.models.registry import predictor
from qdiff_jax.policy import ACTIVATION
from qdiff_jax.quant.timed import TimeIndexed, step_context
from qdiff_jax.runtime.remat import recomputed_unit
from qdiff_jax.sites import SiteQuant, nest_sites
from qdiff_jax.stages.block_groups import image_blocks, tapped_program
from qdiff_jax.stages.finetune import rematerialised

from .. import tiny_unet
from ..methods.cases import NETWORKS, TIMESTEPS, calibration


def given(name):
    net = NETWORKS[name].tiny.network(NETWORKS[name].config)
    x, y = calibration().x[:2] / 3, calibration().y[:2]
    assert 3 in y or len(set(y.tolist())) == 2  # labels matter
    return net, x, y


def tables(net):
    """An activation table by step at every layer, so fine that rounding hides no difference."""
    grid = tiny_unet.qparams(ACTIVATION, (0, 2**20), -32.0, 32.0)
    rows = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(TIMESTEPS)), grid)
    table = TimeIndexed(rows, jnp.asarray(TIMESTEPS), "step")
    return nest_sites({s.name: SiteQuant(lhs=table) for s in net.sites if s.has_weight})


def same(found, expected):
    """To 3e-4 of the largest entry of each array, as a code of the tables is 6e-5, and to float32 beside the
    largest of all: the bias of keys has no gradient, which a softmax does not see."""
    rounding = 1e-6 * max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (found, expected))):
        size = np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-4 * size + rounding, err_msg=str(path))


@pytest.mark.parametrize("name", ["dit", pytest.param("unet", marks=pytest.mark.slow)])
def test_predictions_and_gradients_with_skips_labels_and_time(name):
    """Of all parameters, under step tables."""
    net, x, y = given(name)
    weights = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    ctx = step_context(TIMESTEPS[1], 1)

    def run(predict):
        def loss(params, quant):
            made = predict({"params": params, "quant": quant}, x, ctx, y)
            return jnp.sum(weights * made**2), made

        step = jax.jit(jax.grad(loss, has_aux=True), compiler_options=tiny_unet.QUICK)
        return jax.device_get(step(net.params, tables(net)))

    plain, light = (
        run(f) for f in (predictor(net.module), rematerialised(net.module, net.program))
    )
    same(light, plain)
    moved = [np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain[0])]
    assert np.mean(moved) > 0.8  # a block that has lost its gradient would agree with nothing


@pytest.mark.slow
def test_tapped_values_and_their_gradients():
    """Where a loss reads the inside of the network too, as BinaryDM's does."""
    net, x, y = given("dit")
    unit = tapped_program(net.program, image_blocks(net.program)[:-1])
    values = {"x": x, "t": np.full(2, TIMESTEPS[1]), "y": y}
    inputs = tuple(values[name] for name in unit.inputs)

    def run(apply):
        def loss(params):
            empty = tuple({} for _ in unit.nodes)
            made = apply(unit.signature, subtrees(params, unit), empty, inputs)
            return sum(jnp.sum(jnp.sin(value)) for value in made), made

        step = jax.jit(jax.grad(loss, has_aux=True), compiler_options=tiny_unet.QUICK)
        return jax.device_get(step(net.params))

    plain, light = (run(apply) for apply in (apply_unit, recomputed_unit))
    same(light, plain)
    assert len(plain[1]) == len(unit.outputs) > 2
