"""Published networks at full size against the live modules of diffusers, through `save_pretrained`.

Every parameter of the published size, random weights; inputs are small where the size of the network does
not depend on them. The config read from the folder is that of `models.published`.
"""

import dataclasses
import gc
import shutil

import jax
import numpy as np
import pytest

from qdiff_jax.models.first_stage import FIRST_STAGES
from qdiff_jax.models.port.hub_folder import load_component
from qdiff_jax.models.port.unet_ldm_diffusers import from_diffusers
from qdiff_jax.models.published import PUBLISHED
from qdiff_jax.runtime.state_dicts import load_state_dict

from .comparisons import (
    TIMES,
    as_released,
    check,
    check_first_stage,
    dit_call,
    ours,
    pixart_call,
    unet_call,
)
from .references import both, build, draw, need, saved

need("torch", "diffusers")
pytestmark = pytest.mark.slow


def blocks(attends, down, attended_down, up, attended_up):
    """Names of blocks; attends: whether each resolution has attention, highest first."""
    return dict(
        down_block_types=tuple(attended_down if has else down for has in attends),
        up_block_types=tuple(attended_up if has else up for has in reversed(attends)),
    )


def unet_blocks(*attends):
    return blocks(attends, "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D")


def resnet_blocks(*attends):
    """Residual blocks resample, and the time scales and shifts."""
    names = "ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"
    return dict(
        **blocks(attends, *names),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=32,
    )


def text_blocks(*attends):
    names = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
    return blocks(attends, *names)


_DDPM = dict(
    flip_sin_to_cos=False,
    freq_shift=1,
    downsample_padding=0,
    norm_eps=1e-6,
    attention_head_dim=None,
    layers_per_block=2,
)
# name of `models.published`: (class, its options, condition, side of the input, parameters)
UNETS = {
    "ddpm_cifar10": (
        "UNet2DModel",
        dict(
            **_DDPM,
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            **unet_blocks(False, True, False, False),
        ),
        None,
        32,
        35_746_307,
    ),
    "ddpm_256": (
        "UNet2DModel",
        dict(
            **_DDPM,
            sample_size=256,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            **unet_blocks(False, False, False, False, True, False),
        ),
        None,
        64,
        113_673_219,
    ),
    "lsun_beds256": (
        "UNet2DModel",
        dict(
            sample_size=64,
            block_out_channels=(224, 448, 672, 896),
            attention_head_dim=32,
            **unet_blocks(False, True, True, True),
        ),
        None,
        32,
        274_056_163,
    ),
    "adm_lsun256": (
        "UNet2DModel",
        dict(
            sample_size=256,
            in_channels=3,
            out_channels=6,
            block_out_channels=(256, 256, 512, 512, 1024, 1024),
            attention_head_dim=64,
            **resnet_blocks(False, False, False, True, True, True),
        ),
        None,
        64,
        552_814_086,
    ),
    # A class is a context of one token, whose table diffusers keeps outside the U-Net.
    "cin256-v2": (
        "UNet2DConditionModel",
        dict(
            sample_size=64,
            in_channels=3,
            out_channels=3,
            block_out_channels=(192, 384, 576, 960),
            cross_attention_dim=512,
            attention_head_dim=1,  # heads, in this class
            **text_blocks(False, True, True, True),
        ),
        draw("class", 2, 1, 512),
        32,
        400_920_579,
    ),
    "sd-v1-4": (
        "UNet2DConditionModel",
        dict(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=768,
            attention_head_dim=8,
            **text_blocks(True, True, True, False),
        ),
        draw("context", 2, 77, 768),
        32,
        859_520_964,
    ),
}


@pytest.fixture
def folder(tmp_path):
    """Deleted again, passed or failed: up to 3.4 GB."""
    yield tmp_path / "saved"
    shutil.rmtree(tmp_path / "saved", ignore_errors=True)
    gc.collect()


def parameters(component):
    return sum(leaf.size for leaf in jax.tree.leaves(component.params))


def published(name):
    """As a folder tells it: no dropout, no classes beside a context, attention in the order of the levels."""
    config = dataclasses.replace(PUBLISHED[name].network, dropout=0.0)
    if getattr(config, "context_dim", None) is not None:
        config = dataclasses.replace(config, num_classes=None, context_length=77)
    if hasattr(config, "attention_downsampling"):
        levels = tuple(sorted(config.attention_downsampling))
        config = dataclasses.replace(config, attention_downsampling=levels)
    return config


@pytest.mark.parametrize("name", UNETS)
def test_a_unet(name, folder):
    kind, options, y, side, count = UNETS[name]
    model = build("diffusers", kind, **options)
    x = draw(f"live {name}", 2, model.config.in_channels, side, side)
    saved(model, folder)
    expected, floor = both(model, unet_call(x, y))
    del model  # up to 7 GB in float64
    component = load_component(folder)
    assert component.config == published(name)
    assert parameters(component) == count
    check(ours(component, x, TIMES, y), expected, floor)


def test_ldm_8_of_the_churches(folder):
    """Eight heads everywhere, which the class cannot say: its attentions are told after it is built."""
    options = dict(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=(192, 384, 384, 768, 768),
        attention_head_dim=24,
        **resnet_blocks(True, True, True, True, False),
    )
    model = build("diffusers", "UNet2DModel", **options)
    for module in model.modules():
        if type(module).__name__ == "Attention":
            module.heads = 8
    x = draw("live churches", 2, 4, 32, 32)
    saved(model, folder)
    expected, floor = both(model, unet_call(x, None))
    del model
    component = load_component(folder)
    config = published("lsun_churches256")
    told = dataclasses.replace(component.config, heads=8, head_channels=None)
    assert told == config
    # The order of queries, keys and values in our parameters depends on the heads.
    params = from_diffusers(load_state_dict(folder), config, folder)
    component = component._replace(config=config, params=params)
    assert parameters(component) == 294_966_916
    check(ours(component, x, TIMES, None), expected, floor)


@pytest.mark.parametrize("semantics", ["official", "diffusers"])
def test_dit_xl_2(semantics, folder):
    model = build(
        "diffusers",
        "DiTTransformer2DModel",
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    as_released(model, semantics)
    x, y = draw("live dit", 2, 4, 32, 32), np.int32([207, 1000])
    saved(model, folder)
    expected, floor = both(model, dit_call(x, y))
    del model
    component = load_component(folder)
    assert component.config == PUBLISHED["DiT-XL-2-256x256"].network
    assert parameters(component) == 675_129_632 - 256 * 1152  # the position table is computed
    check(ours(component, x, TIMES, y, semantics=semantics), expected, floor)


def test_pixart_alpha_of_1024_pixels(folder):
    """120 tokens, of which the first caption has 20."""
    model = build(
        "diffusers",
        "PixArtTransformer2DModel",
        sample_size=128,
        num_layers=28,
        num_attention_heads=16,
        attention_head_dim=72,
        cross_attention_dim=1152,
        caption_channels=4096,
        use_additional_conditions=True,
    )
    x = draw("live pixart", 2, 4, 32, 32)
    y = {
        "context": draw("captions", 2, 120, 4096),
        "mask": np.float32(np.arange(120)[None] < np.array([[20], [120]])),
        "resolution": np.float32([[1024, 1024], [832, 1216]]),
        "aspect_ratio": np.float32([[1.0], [0.68]]),
    }
    saved(model, folder)
    expected, floor = both(model, pixart_call(x, y))
    del model
    component = load_component(folder)
    assert component.config == PUBLISHED["PixArt-XL-2-1024-MS"].network
    assert parameters(component) == 611_349_152
    check(ours(component, x, TIMES, y), expected, floor)


# name of `models.first_stage`: (class, its options, parameters)
STAGES = {
    "sd": (
        "AutoencoderKL",
        dict(block_out_channels=(128, 256, 512, 512), latent_channels=4, scaling_factor=0.18215),
        83_653_863,
    ),
    "vq-f4": (
        "VQModel",
        # LDM's latents of a VQ stage are not scaled; the class's own factor is Stable Diffusion's.
        dict(
            block_out_channels=(128, 256, 512),
            latent_channels=3,
            num_vq_embeddings=8192,
            scaling_factor=1.0,
        ),
        55_322_782,
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_first_stage(name, folder):
    kind, options, count = STAGES[name]
    levels = len(options["block_out_channels"])
    model = build(
        "diffusers",
        kind,
        **options,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )
    component = load_component(saved(model, folder))
    # The resolution places attention behind blocks, of which these have none.
    assert dataclasses.replace(component.config, resolution=256) == FIRST_STAGES[name]
    assert parameters(component) == count
    check_first_stage(model, component, (64, 64))
