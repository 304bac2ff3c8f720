"""Blocks by side and by depth, read off the programs of the models there are."""

import functools

import numpy as np
import pytest

from qdiff_jax.models.registry import miniature
from qdiff_jax.stages.block_groups import (
    depth_groups,
    head_and_tail,
    image_blocks,
    side_shares,
    tapped_program,
    value_shapes,
)

from ..tiny_unet import TINY, inputs, network
from . import chain


@functools.cache
def of_unet():
    net = network(TINY)
    x, t = inputs(TINY, 1)
    return net.program, value_shapes(net.program, net.params, {"x": x, "t": t, "y": None})


def of_dit():
    made = miniature("random:dit").model
    example = {"x": np.zeros((1, 8, 8, 1), np.float32), "t": np.zeros(1, np.float32)}
    example["y"] = np.zeros(1, np.int32)
    return made.program, value_shapes(made.program, made.params, example)


def test_depths_of_a_unet_begin_in_its_middle():
    program, shapes = of_unet()
    groups = depth_groups(program, shapes)
    assert groups[0] == (
        "mid_block_1_temb_proj",
        "mid_block_2_temb_proj",
        "mid_block_1",
        "mid_attn_1",
        "mid_block_2",
    )
    images = [[n for n in group if not n.endswith("_temb_proj")] for group in groups[1:]]
    assert images[0] == ["down_0_downsample", "down_1_block_0", "up_1_block_0", "up_1_block_1"]
    # What the whole time path shares joins the outermost group.
    assert images[1][:3] == ["temb", "conv_in", "down_0_block_0"]
    assert images[1][3:] == ["up_1_upsample", "up_0_block_0", "up_0_block_1", "out"]
    placed = [name for group in groups for name in group]
    assert sorted(placed) == sorted(node.name for node in program)


def test_head_and_tail_are_blocks_at_a_share_of_the_side():
    program, shapes = of_unet()
    assert side_shares(program, shapes)["down_1_block_0"] == 0.5
    assert set(head_and_tail(program, shapes, 0.5)) == {n.name for n in program} - {"temb"}
    outer = head_and_tail(program, shapes, 0.6)
    assert "down_0_block_0" in outer and "down_0_block_0_temb_proj" in outer  # noqa: PT018
    assert not any(name.startswith(("mid", "down_1", "up_1_block")) for name in outer)
    assert head_and_tail(program, shapes, 2.0) == ()


def test_a_transformer_is_one_depth_at_half_the_side():
    program, shapes = of_dit()
    assert {s for n, s in side_shares(program, shapes).items() if n != "final_layer"} == {0.5}
    groups = depth_groups(program, shapes)
    assert [set(group) for group in groups[:-1]] == [
        {"x_embedder", "blocks_0", "blocks_0_adaLN", "blocks_1", "blocks_1_adaLN"}
    ]
    assert set(groups[-1]) == {"t_embedder", "final_layer_adaLN", "final_layer"}


def test_taps_come_in_the_order_of_the_program_and_the_prediction_last():
    unit = tapped_program(chain.PROGRAM, ("b", "mix"))
    assert unit.outputs == ("mix", "b", "c")
    assert unit.inputs == ("t", "x")
    assert image_blocks(chain.PROGRAM) == ("mix", "a", "b", "c")
    with pytest.raises(ValueError, match=r"taps \['bb'\] are no blocks"):
        tapped_program(chain.PROGRAM, ("bb",))
