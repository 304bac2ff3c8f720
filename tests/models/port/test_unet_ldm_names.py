"""Names of the released U-Nets: literal ones, whole checkpoints, and diffusers' numbering."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from qdiff_jax.models.port.strict import our_place
from qdiff_jax.models.port.unet_ldm import BUFFERS, from_native, native_table, unet_tensors
from qdiff_jax.models.port.unet_ldm_diffusers import block_names, from_diffusers, native_key
from qdiff_jax.models.unet_ldm_published import PUBLISHED
from qdiff_jax.runtime.state_dicts import load_state_dict

from ..ldm_cases import CONFIGS, published_shapes, state_dict

# Keys and shapes as they stand in the released files.
NATIVE = {
    "lsun_beds256": (
        ("time_embed.0.weight", (896, 224), "time_embed/dense_0/kernel"),
        ("input_blocks.0.0.weight", (224, 3, 3, 3), "input_blocks_0_0/conv/kernel"),
        ("input_blocks.3.0.op.bias", (224,), "input_blocks_3_0/op/bias"),
        ("input_blocks.4.0.in_layers.0.weight", (224,), "input_blocks_4_0/in_layers_0/scale"),
        (
            "input_blocks.4.0.skip_connection.weight",
            (448, 224, 1, 1),
            "input_blocks_4_0/skip_connection/kernel",
        ),
        (
            "input_blocks.4.0.emb_layers.1.weight",
            (448, 896),
            "input_blocks_4_0_emb_layers_1/dense/kernel",
        ),
        ("input_blocks.4.1.qkv.weight", (1344, 448, 1), "input_blocks_4_1/qkv/kernel"),
        ("middle_block.1.proj_out.bias", (896,), "middle_block_1/proj_out/bias"),
        (
            "output_blocks.2.0.in_layers.2.weight",
            (896, 672 + 896, 3, 3),
            "output_blocks_2_0/in_layers_2/kernel",
        ),
        ("output_blocks.2.2.conv.weight", (896, 896, 3, 3), "output_blocks_2_2/conv/kernel"),
        ("out.0.bias", (224,), "out/out_0/bias"),
        ("out.2.weight", (3, 224, 3, 3), "out/out_2/kernel"),
    ),
    "lsun_churches256": (
        (
            "input_blocks.3.0.out_layers.3.weight",
            (192, 192, 3, 3),
            "input_blocks_3_0/out_layers_3/kernel",
        ),
        (
            "output_blocks.2.1.emb_layers.1.bias",  # no attention at the lowest resolution
            (1536,),
            "output_blocks_2_1_emb_layers_1/dense/bias",
        ),
        (
            "output_blocks.5.2.in_layers.0.bias",
            (768,),
            "output_blocks_5_2/in_layers_0/bias",
        ),
    ),
    "sd-v1-4": (
        ("input_blocks.1.1.norm.weight", (320,), "input_blocks_1_1_proj_in/norm/scale"),
        (
            "input_blocks.1.1.proj_in.weight",
            (320, 320, 1, 1),
            "input_blocks_1_1_proj_in/proj_in/kernel",
        ),
        (
            "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
            (320, 768),
            "input_blocks_1_1_transformer_blocks_0/attn2_to_k/kernel",
        ),
        (
            "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.bias",
            (320,),
            "input_blocks_1_1_transformer_blocks_0/attn1_to_out_0/bias",
        ),
        (
            "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight",
            (10240, 1280),
            "middle_block_1_transformer_blocks_0/ff_net_0_proj/kernel",
        ),
        (
            "middle_block.1.transformer_blocks.0.norm3.bias",
            (1280,),
            "middle_block_1_transformer_blocks_0/norm3/bias",
        ),
        ("output_blocks.2.1.conv.weight", (1280, 1280, 3, 3), "output_blocks_2_1/conv/kernel"),
        (
            "output_blocks.11.1.proj_out.weight",
            (320, 320, 1, 1),
            "output_blocks_11_1_proj_out/proj_out/kernel",
        ),
    ),
}


@pytest.mark.parametrize("name", NATIVE)
def test_literal_native_names(name):
    shapes = published_shapes(name)
    for key, shape, path in NATIVE[name]:
        found, layout = our_place(native_table(PUBLISHED[name]), key)
        assert found == path
        block, layer, leaf = path.split("/")
        tensor = np.broadcast_to(np.float32(0), shape)
        assert layout(tensor).shape == shapes[block][layer][leaf].shape, key


def test_diffusers_numbers_blocks_within_a_resolution():
    names = block_names(PUBLISHED["sd-v1-4"])
    assert names["down_blocks.1.attentions.1"] == "input_blocks.5.1"
    assert names["down_blocks.2.downsamplers.0"] == "input_blocks.9.0"
    assert names["up_blocks.0.upsamplers.0"] == "output_blocks.2.1"  # no attention there
    assert names["up_blocks.1.upsamplers.0"] == "output_blocks.5.2"
    assert names["mid_block.resnets.1"] == "middle_block.2"
    for key, wanted in (
        ("down_blocks.0.downsamplers.0.conv.bias", "input_blocks.3.0.op.bias"),
        ("down_blocks.0.downsamplers.0.conv1.bias", "input_blocks.3.0.in_layers.2.bias"),
        ("up_blocks.1.upsamplers.0.conv.bias", "output_blocks.5.2.conv.bias"),
        (
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",
            "middle_block.1.transformer_blocks.0.attn1.to_q.weight",
        ),
        ("encoder_hid_proj.weight", "encoder_hid_proj.weight"),
    ):
        assert native_key(key, names, transformer=True) == wanted


def test_old_names_of_attention_are_the_new_ones():
    config, tensors = CONFIGS["ldm4"], state_dict("ldm4")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(key):
        module, _, leaf = key.rpartition(".")
        block, _, inner = module.partition(".attentions.0.")
        return f"{block}.attentions.0.{old[inner]}.{leaf}" if inner in old else key

    before, after = (
        from_diffusers(t, config) for t in (tensors, {renamed(k): v for k, v in tensors.items()})
    )
    assert any("query" in renamed(key) for key in tensors)
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_a_whole_checkpoint_is_taken_apart():
    config = CONFIGS["classes"]
    names = block_names(config)
    unet = {native_key(k, names, transformer=True): v for k, v in state_dict("classes").items()}
    table = unet.pop("cond_stage_model.embedding.weight")
    names = {key: f"model.diffusion_model.{key}" for key in unet}
    file = {names[key]: np.zeros_like(v) for key, v in unet.items()}
    file |= {f"model_ema.diffusion_model{k.replace('.', '')}": v for k, v in unet.items()}
    file |= {"model_ema.decay": np.float32(0.9999), "model_ema.num_updates": np.int32(7)}
    file |= {name: np.zeros(3) for name in BUFFERS}
    file["cond_stage_model.embedding.weight"] = table
    file["first_stage_model.decoder.conv_in.weight"] = np.zeros(1)
    file["scale_factor"] = np.float32(0.22765929)

    tensors, scale = unet_tensors(file, config, ema=True)
    assert scale == pytest.approx(0.22765929)
    ported = from_native(tensors, config)
    expected = from_diffusers(state_dict("classes"), config)
    jax.tree.map(np.testing.assert_array_equal, ported, expected)

    raw, scale = unet_tensors(
        {k: v for k, v in file.items() if k != "scale_factor"}, config, ema=False
    )
    assert scale == 1.0
    assert not raw["out.2.weight"].any()
    with pytest.raises(ValueError, match="1 tensors of no part we know: loss.discriminator.x"):
        unet_tensors({**file, "loss.discriminator.x": np.zeros(1)}, config, ema=False)
    with pytest.raises(ValueError, match="no tensors called model.diffusion_model"):
        unet_tensors({"cond_stage_model.embedding.weight": table}, config, ema=False)


def test_the_scale_factor_of_a_checkpoint_that_is_read_from_its_file(tmp_path):
    file = {"model.diffusion_model.out.2.bias": np.zeros(3, "f"), "scale_factor": np.float32(0.5)}
    arrays = {key: np.asarray(value) for key, value in file.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "m.safetensors")
    tensors = load_state_dict(tmp_path / "m.safetensors")
    unet, scale = unet_tensors(tensors, CONFIGS["ldm4"], ema=False)
    assert (list(unet), scale) == (["out.2.bias"], 0.5)


def test_a_state_dict_of_another_model_is_refused():
    names = block_names(CONFIGS["ldm4"])
    native = {native_key(k, names, transformer=False): v for k, v in state_dict("ldm4").items()}
    with pytest.raises(
        ValueError, match=r"24 tensors without a parameter: input_blocks.3.1.q.weight"
    ):
        from_native(native, CONFIGS["text"])
