"""The DiT: the published model's size, its numbers, and how its blocks are quantized."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.export.qtensor import QTensor
from qdiff_jax.models.dit import DiT, DiTBlock, DiTConfig, dit_program, position_table
from qdiff_jax.models.families import example_inputs, make_module, parameter_shapes
from qdiff_jax.models.program import (
    check_order,
    temporal_nodes,
    units_with_projections,
    units_with_time_block,
)
from qdiff_jax.models.registry import predictor
from qdiff_jax.named_policies import policy
from qdiff_jax.policy import make_plan
from qdiff_jax.quant.timed import TimeIndexed, step_context
from qdiff_jax.sites import SiteQuant, list_sites, nest_sites

from ..tiny_unet import QUICK, STEPS, kernel_of_site, nearest, qparams, random_params

TINY = DiTConfig(
    width=16,
    depth=2,
    heads=2,
    patch=2,
    resolution=8,
    in_channels=1,
    num_classes=3,
    learn_sigma=False,
)


@functools.cache
def params_of(config):
    return random_params(parameter_shapes(config))


@functools.cache
def forward(config):
    return jax.jit(make_module(config).apply, compiler_options=QUICK)


def inputs(config, batch=3):
    shape = (batch, config.resolution, config.resolution, config.in_channels)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return x, np.resize(np.float32(STEPS), batch), np.arange(batch, dtype=np.int32)


def test_the_position_table_encodes_the_column_first():
    table = position_table(8, 4).reshape(4, 4, 8)
    np.testing.assert_array_equal(table[0, :, :4], table[3, :, :4])  # the first half knows no row
    np.testing.assert_array_equal(table[:, 0, 4:], table[:, 3, 4:])
    # Row 2, column 3: sine and cosine of the column at frequency 1, then of the row.
    expected = [np.sin(3), np.cos(3), np.sin(2), np.cos(2)]
    np.testing.assert_allclose(table[2, 3, [0, 2, 4, 6]], expected, atol=1e-6)


def test_every_block_starts_as_the_identity():
    params = make_module(TINY).init(jax.random.key(0), *example_inputs(TINY))["params"]
    out = forward(TINY)({"params": params}, *inputs(TINY))
    np.testing.assert_array_equal(out, np.zeros_like(out))
    x = jax.random.normal(jax.random.key(1), (2, 4, 16))
    block = DiTBlock(heads=2, hidden=32)
    weights = random_params(jax.eval_shape(block.init, jax.random.key(0), x, jnp.zeros((2, 96))))
    np.testing.assert_array_equal(block.apply(weights, x, jnp.zeros((2, 96))), x)


def test_the_label_and_its_absence_matter_and_must_be_given():
    x, t, _ = inputs(TINY, 2)
    one, null = (
        forward(TINY)({"params": params_of(TINY)}, x, t, np.full(2, label, np.int32))
        for label in (1, 3)
    )
    assert np.abs(one - null).max() > 1e-3
    with pytest.raises(ValueError, match="conditional on 3 classes: pass y"):
        DiT(TINY).apply({"params": params_of(TINY)}, x, t)
    free = dataclasses.replace(TINY, num_classes=None)
    out = forward(free)({"params": params_of(free)}, x, t)
    assert out.shape == x.shape
    assert "y_embedder" not in params_of(free)["t_embedder"]


def test_a_learned_variance_is_left_out_unless_asked_for():
    config = dataclasses.replace(TINY, learn_sigma=True)
    x, t, y = inputs(config, 2)
    variables = {"params": params_of(config), "quant": {}}
    both = predictor(make_module(config), variance=True)(variables, x, step_context(t), y)
    assert both.shape == (2, 8, 8, 2)
    eps = predictor(make_module(config))(variables, x, step_context(t), y)
    np.testing.assert_array_equal(eps, both[..., :1])


@pytest.mark.parametrize("group", [units_with_projections, units_with_time_block])
def test_units_cover_the_program_and_equal_blocks_share_a_signature(group):
    program = dit_program(TINY)
    units = group(program)
    check_order(program, units, ("x", "t", "y"))
    first, second = (
        next(unit for unit in units if unit.nodes[-1] == name) for name in ("blocks_0", "blocks_1")
    )
    assert first.signature == second.signature
    assert set(temporal_nodes(program)) == {
        "t_embedder",
        "blocks_0_adaLN",
        "blocks_1_adaLN",
        "final_layer_adaLN",
    }


def quantized(config, execute):
    """The common policy at W8A8 with step tables, by hand; softmax in [0, 1], the rest in +-6."""
    sites = list_sites(make_module(config), *example_inputs(config))
    plan = make_plan(sites, policy("common", sites, 8, 8))

    def activation(entry):
        lo, hi = (0.0, 1.0) if entry.operand == "softmax" else (-6.0, 6.0)
        rows = [qparams(entry.spec, entry.codes, lo * f, hi * f) for f in (1.0, 0.9, 0.8)]
        table = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *rows)
        return TimeIndexed(table, jnp.asarray(STEPS, jnp.float32), "exact")

    flat = {}
    for site in sites:
        left, right = (plan.of(site.name)[role] for role in site.operands)
        if site.has_weight:
            kernel = np.asarray(kernel_of_site(params_of(config), site.name))
            rows = kernel.reshape(-1, kernel.shape[-1])
            grid = qparams(right.spec, right.codes, rows.min(0), rows.max(0))
            rhs = nearest(kernel, grid, right.bits)
        else:
            rhs = activation(right)
        flat[site.name] = SiteQuant(
            activation(left), rhs, execute=execute, product=not site.has_weight
        )
    return nest_sites(flat)


def test_integers_executed_equal_the_simulation_with_a_step_for_each_sample():
    x, t, y = inputs(TINY)
    predict = jax.jit(predictor(make_module(TINY)), compiler_options=QUICK)
    results = [
        predict(
            {"params": params_of(TINY), "quant": quantized(TINY, execute)}, x, step_context(t), y
        )
        for execute in (False, True)
    ]
    full = forward(TINY)({"params": params_of(TINY)}, x, t, y)
    gap = np.abs(results[0] - full).max()
    assert np.abs(results[0] - results[1]).max() < 0.05 * gap  # a code may flip, no more
    assert 0 < gap < 0.5
    assert isinstance(quantized(TINY, True)["blocks_0"]["mlp_fc2"].rhs, QTensor)


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    expected, out = (forward(c)({"params": params_of(TINY)}, *inputs(TINY)) for c in (TINY, config))
    assert out.dtype == jnp.float32
    assert 1e-4 < np.abs(out - expected).max() / np.abs(expected).max() < 0.05


def test_sizes_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="width=100 must be divisible by heads=16"):
        DiTConfig(width=100)
    with pytest.raises(ValueError, match="resolution=30 must be divisible by patch=4"):
        DiTConfig(resolution=30, patch=4)
    with pytest.raises(ValueError, match="dtype 'float16'"):
        DiTConfig(dtype="float16")
    with pytest.raises(ValueError, match="semantics 'hf' is not one of .*official.*diffusers"):
        DiTConfig(semantics="hf")
