"""A folder in Hugging Face's layout: sizes from config.json, weights beside it, and what is refused."""

import dataclasses
import json
import sys
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from qdiff_jax.models import registry
from qdiff_jax.models.dit import DiTConfig
from qdiff_jax.models.pixart import PixArtConfig
from qdiff_jax.models.port.diffusers_config import network_config
from qdiff_jax.models.port.hub_folder import (
    component_config,
    component_folder,
    load_component,
    schedule_json,
)
from qdiff_jax.models.port.unet_ldm_diffusers import from_diffusers
from qdiff_jax.models.unet_ddpm import UNetConfig
from qdiff_jax.models.unet_ldm import UNetLDMConfig
from qdiff_jax.models.unet_ldm_published import PUBLISHED

from ..ldm_cases import CONFIGS, state_dict

# The fields of published config.json files, as far as they decide anything.
CIFAR = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
CELEBA = {
    "_class_name": "UNet2DModel",
    "attention_head_dim": 32,
    "block_out_channels": [224, 448, 672, 896],
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    "in_channels": 3,
    "out_channels": 3,
    "sample_size": 64,
}
SD = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 64,
}
DIT = {
    "_class_name": "Transformer2DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "cross_attention_dim": None,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 64,
}
PIXART = {
    "_class_name": "PixArtTransformer2DModel",
    "attention_head_dim": 72,
    "caption_channels": 4096,
    "cross_attention_dim": 1152,
    "in_channels": 4,
    "num_attention_heads": 16,
    "num_layers": 28,
    "out_channels": 8,
    "sample_size": 128,
}


def test_the_published_configs():
    assert network_config(CIFAR) == dataclasses.replace(UNetConfig.cifar10(), dropout=0.0)
    names = ("lsun_beds256", "sd-v1-4")
    for fields, name in zip((CELEBA, SD), names):
        found, wanted = network_config(fields), PUBLISHED[name]
        places = tuple(sorted(wanted.attention_downsampling))
        assert found == dataclasses.replace(wanted, attention_downsampling=places)
    assert network_config(DIT) == DiTConfig.xl_2(64)
    alpha = PixArtConfig(caption_length=120, micro_conditions=True)
    assert network_config(PIXART) == alpha  # what a file does not say follows from its size
    older = {**PIXART, "_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"}
    assert network_config(older) == alpha
    sigma = network_config({**PIXART, "use_additional_conditions": False, "sample_size": 64})
    assert sigma == PixArtConfig(resolution=64, interpolation=1.0)


def test_other_uses_of_the_same_classes():
    """Guided diffusion's resampling, and Stable Diffusion 2's heads of 64 channels."""
    guided = {
        **CELEBA,
        "down_block_types": ["ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3],
        "up_block_types": [*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
        "num_class_embeds": 5,
    }
    found = network_config(guided)
    assert (found.scale_shift_norm, found.resblock_updown, found.num_classes) == (True, True, 5)
    two = network_config({**SD, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024})
    assert isinstance(two, UNetLDMConfig)
    assert (two.heads, two.head_channels, two.context_dim) == (None, 64, 1024)


@pytest.mark.parametrize(
    ("fields", "changed", "said"),
    [
        (
            CIFAR,
            {"_class_name": "UNet3DModel"},
            "describes a UNet3DModel; the diffusion networks read",
        ),
        (CIFAR, {"super_option": 3}, "options that are unknown here: super_option"),
        (
            CIFAR,
            {"time_embedding_type": "fourier"},
            "not built here: time_embedding_type='fourier'",
        ),
        (CIFAR, {"freq_shift": 0}, "not built here: flip_sin_to_cos=False, freq_shift=0"),
        (CIFAR, {"attention_head_dim": 8}, "not built here: attention_head_dim=8"),
        (CIFAR, {"sample_size": None}, "lacks sample_size"),
        (CELEBA, {"block_out_channels": None}, "lacks block_out_channels"),
        (CELEBA, {"down_block_types": ["SkipDownBlock2D"] * 4}, "block types=.'SkipDownBlock2D'"),
        (CELEBA, {"up_block_types": ["UpBlock2D"] * 4}, "not built here: up_block_types"),
        (CELEBA, {"downsample_type": "resnet"}, "not built here: downsample_type='resnet'"),
        (CELEBA, {"attn_norm_num_groups": 8}, "attn_norm_num_groups=8"),
        (CELEBA, {"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups=None"),
        (SD, {"addition_embed_type": "text_time"}, "addition_embed_type='text_time'"),
        (SD, {"attention_head_dim": [5, 5, 20, 20]}, "attention_head_dim=.5, 5, 20, 20"),
        (SD, {"transformer_layers_per_block": [1, 2, 4, 4]}, "transformer_layers_per_block=.1, 2"),
        (DIT, {"norm_type": "layer_norm"}, "norm_type='layer_norm'"),
        (DIT, {"out_channels": 5}, "out_channels=5"),
        (PIXART, {"cross_attention_dim": 640}, "cross_attention_dim=640"),
        (PIXART, {"caption_channels": None}, "lacks caption_channels"),
    ],
)
def test_what_is_not_built_here_is_refused_by_its_field(fields, changed, said):
    with pytest.raises(ValueError, match=f"^unet/config.json .*{said}"):
        network_config({**fields, **changed}, "unet/config.json")


def test_the_class_decides_what_a_folder_is():
    stage = {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3}
    stage |= {"block_out_channels": [8, 8], "latent_channels": 4, "layers_per_block": 1}
    stage |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "norm_num_groups": 4}
    stage |= {"up_block_types": ["UpDecoderBlock2D"] * 2}
    assert component_config(stage)[0] == "first_stage"
    clip = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 9}
    clip |= {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip |= {"intermediate_size": 8, "max_position_embeddings": 7}
    assert component_config(clip)[0] == "text"
    assert component_config(DIT)[::2] == ("network", "Transformer2DModel")
    with pytest.raises(
        ValueError, match="describes a LlamaModel, which is not read here; there are"
    ):
        component_config({"architectures": ["LlamaModel"]})


def small_folder(folder, sharded=False):
    """The guided U-Net of the stored cases, as diffusers saves it."""
    config = CONFIGS["guided"]
    fields = {
        "_class_name": "UNet2DModel",
        "attention_head_dim": config.head_channels,
        "attn_norm_num_groups": 32,
        "block_out_channels": list(config.widths),
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "in_channels": 3,
        "out_channels": 6,
        "layers_per_block": 1,
        "num_class_embeds": 5,
        "sample_size": 8,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    tensors, name = state_dict("guided"), "diffusion_pytorch_model"
    if not sharded:
        safetensors.numpy.save_file(tensors, folder / f"{name}.safetensors")
        return folder
    places = {key: f"{name}-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(tensors)}
    for shard in set(places.values()):
        part = {key: tensors[key] for key in tensors if places[key] == shard}
        safetensors.numpy.save_file(part, folder / shard)
    index = {"weight_map": places}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    return folder


def same(component):
    assert (component.kind, component.name) == ("network", "UNet2DModel")
    assert component.config == CONFIGS["guided"]
    expected = from_diffusers(state_dict("guided"), CONFIGS["guided"])
    jax.tree.map(np.testing.assert_array_equal, component.params, expected)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_and_a_cache_of_the_hub(tmp_path, sharded):
    cache = tmp_path / "models--owner--repo"
    folder = small_folder(cache / "snapshots" / "abc", sharded)
    same(load_component(folder))
    assert component_folder(cache) == folder
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("other")
    with pytest.raises(ValueError, match="has the revisions abc and names other in refs/main"):
        component_folder(cache)
    small_folder(cache / "snapshots" / "other")
    assert component_folder(cache).name == "other"
    (cache / "refs" / "main").unlink()
    with pytest.raises(ValueError, match="has the revisions abc, other and names none"):
        component_folder(cache)
    with pytest.raises(ValueError, match="there is no folder .*elsewhere; give the folder of one"):
        component_folder(tmp_path / "elsewhere")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_on_the_hub_is_fetched_file_by_file(tmp_path, monkeypatch, sharded):
    remote = small_folder(tmp_path / "repo" / "unet", sharded).parent
    asked = []

    def download(repository, file, revision=None):
        asked.append((repository, file, revision))
        if not (remote / file).is_file():
            raise FileNotFoundError(file)
        return str(remote / file)

    hub = types.SimpleNamespace(
        hf_hub_download=download,
        file_exists=lambda repository, file, revision=None: (remote / file).is_file(),
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    same(load_component("hub:owner/repo@v1/unet"))
    assert {(repository, revision) for repository, _, revision in asked} == {("owner/repo", "v1")}
    files = {file for _, file, _ in asked}
    assert files == {f"unet/{path.name}" for path in (remote / "unet").iterdir()}
    with pytest.raises(ValueError, match="cannot be fetched from the hub .*vae/config.json"):
        load_component("hub:owner/repo/vae")
    (remote / "unet" / "config.json").rename(remote / "config.json")
    with pytest.raises(ValueError, match="names no file and the repository has none of"):
        load_component("hub:owner/repo")


def test_the_registry_loads_a_folder_with_its_scheduler(tmp_path):
    folder = small_folder(tmp_path / "pipeline" / "unet")
    with pytest.raises(
        ValueError, match="there is no scheduler_config.json in .*unet or .*scheduler"
    ):
        registry.load(str(folder))
    (tmp_path / "pipeline" / "scheduler").mkdir()
    place = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    fields = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_end": 0.012}
    place.write_text(json.dumps({**fields, "beta_start": 0.00085}))
    model = registry.load(str(folder))
    assert (model.classes, model.image_shape) == (5, (8, 8, 3))
    ends = {"beta_start": 0.00085, "beta_end": 0.012}
    expected = {"schedule": "scaled_linear", "timesteps": 1000, "options": ends}
    assert model.source["schedule"] == expected
    assert model.schedule.betas[0] == pytest.approx(0.00085)
    assert registry.load(str(folder)).source["sha256"] == model.source["sha256"]
    # One that lies beside the network goes before.
    (folder / "scheduler_config.json").write_text(
        '{"_class_name": "FlowMatchEulerDiscreteScheduler"}'
    )
    assert registry.load(str(folder)).schedule is None


def test_schedules_of_schedulers():
    ddim = {"_class_name": "DDIMScheduler"}
    assert schedule_json(ddim)["options"] == {"beta_start": 1e-4, "beta_end": 0.02}
    cosine = schedule_json(
        {**ddim, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    )
    assert cosine == {"schedule": "cosine", "timesteps": 1000, "prediction": "v"}
    for changed in ({"beta_schedule": "sigmoid"}, {"prediction_type": "sample"}):
        ((name, value),) = changed.items()
        with pytest.raises(ValueError, match=f"not built here: {name}='{value}'"):
            schedule_json({**ddim, **changed})
    with pytest.raises(ValueError, match="rescale_betas_zero_snr=True"):
        schedule_json({**ddim, "rescale_betas_zero_snr": True})
    for other in ("CMStochasticIterativeScheduler", "EDMEulerScheduler", None):
        with pytest.raises(ValueError, match=f"describes a {other}, whose schedule is not built"):
            schedule_json({"_class_name": other, "num_train_timesteps": 40})


def test_weights_of_another_model_are_refused(tmp_path):
    folder = small_folder(tmp_path / "unet")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "num_class_embeds": 6}))
    with pytest.raises(ValueError, match=r"class_embedding|label_emb.* \(5, 128\)"):
        load_component(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json"):
        load_component(folder)
