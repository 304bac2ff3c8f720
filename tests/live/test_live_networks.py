"""Every family against the live module of diffusers, through the folder that its `save_pretrained` writes.

Run with the extra `parity` installed: `python -m pytest tests/live`. Sizes are other than those of the stored
cases: three resolutions, two residual blocks, other heads, patches and depths.
"""

import numpy as np
import pytest

from qdiff_jax.models.port.hub_folder import load_component

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
from .references import both, build, draw, need, nhwc, per_sample, saved

need("torch", "diffusers")

_DDPM = dict(
    sample_size=16,
    block_out_channels=(32, 64, 64),
    layers_per_block=2,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    flip_sin_to_cos=False,
    freq_shift=1,
    downsample_padding=0,
    norm_eps=1e-6,
    attention_head_dim=None,
)
_LDM = dict(
    sample_size=16,
    block_out_channels=(32, 64, 96),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=8,
)
_ADM = dict(
    sample_size=16,
    in_channels=3,
    out_channels=6,
    block_out_channels=(32, 32, 64),
    layers_per_block=2,
    down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
    downsample_type="resnet",
    upsample_type="resnet",
    resnet_time_scale_shift="scale_shift",
    attn_norm_num_groups=32,
    attention_head_dim=16,
    num_class_embeds=7,
)
_SD = dict(
    sample_size=16,
    block_out_channels=(32, 64, 64),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=20,
    attention_head_dim=8,
)
# As Stable Diffusion 2: 16 channels a head everywhere, linear projections; two blocks a transformer.
_SD2 = {
    **_SD,
    "attention_head_dim": (2, 4, 4),
    "use_linear_projection": True,
    "transformer_layers_per_block": 2,
}
_DIT = dict(
    num_attention_heads=3,
    attention_head_dim=16,
    in_channels=4,
    out_channels=8,
    num_layers=3,
    sample_size=16,
    patch_size=4,
    num_embeds_ada_norm=9,
)
_PIXART = dict(
    num_attention_heads=3,
    attention_head_dim=16,
    cross_attention_dim=48,
    num_layers=3,
    sample_size=16,
    caption_channels=28,
)


CASES = {
    "ddpm": ("UNet2DModel", _DDPM, None),
    "ddpm of 1.5": ("UNet2DModel", {**_DDPM, "block_out_channels": (64, 64, 96)}, None),
    "ldm": ("UNet2DModel", _LDM, None),
    "adm": ("UNet2DModel", _ADM, np.int32([6, 2])),
    "sd": ("UNet2DConditionModel", _SD, draw("context", 2, 5, 20)),
    "sd2": ("UNet2DConditionModel", _SD2, draw("context", 2, 9, 20)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_unet(name, tmp_path):
    kind, options, y = CASES[name]
    model = build("diffusers", kind, **options)
    x = draw(f"live {name}", 2, model.config.in_channels, 16, 16)
    component = load_component(saved(model, tmp_path))
    assert (component.kind, component.name) == ("network", kind)
    expected, floor = both(model, unet_call(x, y))
    check(ours(component, x, TIMES, y), expected, floor)


@pytest.mark.parametrize("semantics", ["official", "diffusers"])
def test_a_dit(semantics, tmp_path):
    """The official network is diffusers' class with the frequencies and the eps of its weights."""
    model = build("diffusers", "DiTTransformer2DModel", **_DIT)
    as_released(model, semantics)
    x, y = draw("live dit", 2, 4, 16, 16), np.int32([4, 9])
    component = load_component(saved(model, tmp_path))
    expected, floor = both(model, dit_call(x, y))
    check(ours(component, x, TIMES, y, semantics=semantics), expected, floor)
    other = "diffusers" if semantics == "official" else "official"
    wrong = per_sample(ours(component, x, TIMES, y, semantics=other), nhwc(expected))
    assert wrong.max() > 0.01


@pytest.mark.parametrize("micro", [False, True])
def test_a_pixart(micro, tmp_path):
    model = build(
        "diffusers", "PixArtTransformer2DModel", **_PIXART, use_additional_conditions=micro
    )
    x, context = draw("live pixart", 2, 4, 16, 16), draw("captions", 2, 6, 28)
    mask = np.float32([[1, 1, 1, 1, 0, 0], [1] * 6])
    y = {"context": context, "mask": mask}
    if micro:
        # Sinusoids of sizes differ between frameworks as those of late timesteps do: at t = 3 a small size.
        y |= {
            "resolution": np.float32([[5, 6], [512, 640]]),
            "aspect_ratio": np.float32([[0.8]] * 2),
        }
    component = load_component(saved(model, tmp_path))
    assert component.config.micro_conditions == micro
    expected, floor = both(model, pixart_call(x, y))
    check(ours(component, x, TIMES, y), expected, floor)


_STAGE = dict(block_out_channels=(16, 16, 32, 32), layers_per_block=1, norm_num_groups=8)
_STAGE |= dict(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4
)
STAGES = {
    "AutoencoderKL": dict(**_STAGE, latent_channels=4, scaling_factor=0.3),
    "VQModel": dict(**_STAGE, latent_channels=3, num_vq_embeddings=64),
}


@pytest.mark.parametrize("kind", STAGES)
def test_a_first_stage(kind, tmp_path):
    model = build("diffusers", kind, **STAGES[kind])
    component = load_component(saved(model, tmp_path))
    assert component.kind == "first_stage"
    check_first_stage(model, component, (32, 48))
