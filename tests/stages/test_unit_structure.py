"""What closed-form rounding finds in the units of real models: who closes a branch, who is added to whom."""

import functools

import jax
import numpy as np
import pytest

from qdiff_jax.models.families import example_inputs
from qdiff_jax.models.program import (
    make_unit,
    subtrees,
    units_with_projections,
    units_with_time_block,
)
from qdiff_jax.models.registry import load
from qdiff_jax.observe.capture import run_unit
from qdiff_jax.stages.unit_structure import plan_unit, unit_layers


@functools.cache
def values(name):
    """{node or input: value on two samples} of a miniature in full precision."""
    model = load(f"random:{name}").model
    x, t, y = example_inputs(model.module.config, 2)
    rng = np.random.default_rng(0)
    found = {"x": rng.standard_normal(x.shape).astype(np.float32), "t": np.float32([3.0, 700.0])}
    found["y"] = None if y is None else np.int32([1, 4])
    if isinstance(y, dict):
        found["y"] = {**y, "context": rng.standard_normal(y["context"].shape).astype(np.float32)}
    for node in model.program:
        unit = make_unit(node.name, model.program, (node.name,), keep=(node.name,))
        given = tuple(found[name] for name in unit.inputs)
        params = subtrees(model.params, unit)
        (made,) = run_unit(unit.signature, params, ({},), given, None)
        found[node.name] = jax.device_get(made)
    return found


def planned(name, unit_name, grouping=units_with_projections):
    """{op: Layer} of a unit, and its levels as tuples of ops."""
    model = load(f"random:{name}").model
    unit = next(unit for unit in grouping(model.program) if unit.name == unit_name)
    inputs = tuple(values(name)[value] for value in unit.inputs)
    params = subtrees(model.params, unit)
    keys = [layer.key for layer in unit_layers(unit.signature, params, inputs)]
    plan = plan_unit(unit.signature, params, inputs, keys)
    layers = {layer.op: layer for layer in plan.layers}
    assert len(layers) == len(plan.layers)
    names = tuple(tuple(plan.layers[i].op for i in level) for level in plan.levels)
    return plan, layers, names, unit


def test_a_residual_block_is_closed_by_its_second_convolution():
    plan, layers, levels, _ = planned("miniature", UP)
    assert [op for op, layer in layers.items() if layer.closes is not None] == ["conv2"]
    assert layers["conv2"].unit_gain
    # The shortcut is decided before it, so that it makes up for the shortcut's error too.
    order = [op for level in levels for op in level]
    assert order.index("nin_shortcut") < order.index("conv2") == len(order) - 1
    # The time projection is added to the first convolution, and corrects it: fitted after it.
    assert order.index("conv1") < order.index("dense")
    assert layers["dense"].summands == (order.index("conv1"),)


def test_the_projection_of_a_time_block_is_an_input_that_is_added():
    _, layers, _, unit = planned("miniature", UP, units_with_time_block)
    assert "dense" not in layers
    (added,) = layers["conv1"].input_summands
    assert unit.inputs[added].endswith("temb_proj")


def test_attention_is_closed_by_its_projection():
    _, layers, levels, _ = planned("miniature", ATTENTION)
    assert levels == (("q", "k", "v"), ("proj_out",))
    closing = {op: (layer.closes, layer.unit_gain) for op, layer in layers.items()}
    assert closing.pop("proj_out") == (0, True)
    assert set(closing.values()) == {(None, False)}


def closing(layers):
    """{op: (whether behind a gate, which layers have to be silent)} of the layers that close an output."""
    return {
        op: (not layer.unit_gain, tuple(op for _, op in layer.silenced))
        for op, layer in layers.items()
        if layer.closes is not None
    }


def test_both_branches_of_a_diffusion_transformer_are_closed_through_their_gates():
    _, layers, levels, _ = planned("dit", "blocks_0")
    assert closing(layers) == {"attn_proj": (True, ("mlp_fc1", "mlp_fc2")), "mlp_fc2": (True, ())}
    order = [op for level in levels for op in level]
    assert order[-4:] == ["attn_qkv", "attn_proj", "mlp_fc1", "mlp_fc2"]


@pytest.mark.slow
def test_three_branches_of_a_transformer_that_reads_a_caption():
    _, layers, levels, _ = planned("pixart", "blocks_0")
    behind = ("cross_attn_q_linear", "cross_attn_proj", "mlp_fc1", "mlp_fc2")
    wanted = {
        "attn_proj": (True, behind),
        "cross_attn_proj": (False, behind[2:]),
        "mlp_fc2": (True, ()),
    }
    assert closing(layers) == wanted
    order = [op for level in levels for op in level]
    assert sorted(wanted, key=order.index) == list(wanted)


UP, ATTENTION = "up_0_block_0", "mid_attn_1"


@pytest.mark.parametrize("unit", [UP, ATTENTION])
def test_only_the_layers_asked_for_are_planned(unit):
    model = load("random:miniature").model
    held = next(u for u in units_with_projections(model.program) if u.name == unit)
    inputs = tuple(values("miniature")[value] for value in held.inputs)
    params = subtrees(model.params, held)
    keys = [layer.key for layer in unit_layers(held.signature, params, inputs)]
    plan = plan_unit(held.signature, params, inputs, keys[:1])
    assert [layer.key for layer in plan.layers] == keys[:1]
    assert plan_unit(held.signature, params, inputs, []).layers == ()
