"""Every family against the live module of diffusers, through the folder that its `save_pretrained` writes.

Run with the extra `parity` installed: `python -m pytest tests/live`. Sizes are other than those of the stored
cases: three resolutions, two residual blocks, other heads, patches and depths.
"""

import dataclasses

import jax
import numpy as np
import pytest

from qdiff_jax.models import first_stage
from qdiff_jax.models.families import make_module
from qdiff_jax.models.port.hub_folder import load_component

from ..tiny_unet import QUICK
from .references import both, build, draw, need, nhwc, per_sample, saved

torch, _ = need("torch", "diffusers")

TIMES = (3, 977)
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


def unet(model, x, y):
    def call(model, dtype):
        given = [torch.tensor(x, dtype=dtype), torch.tensor(TIMES)]
        if y is not None:
            given.append(torch.tensor(y, dtype=dtype if y.dtype == np.float32 else None))
        return model(*given).sample

    return call


def ours(component, x, t, y, **changed):
    """[B, ...] in NHWC. changed: fields of the config."""
    config = dataclasses.replace(component.config, **changed)
    run = jax.jit(make_module(config).apply, compiler_options=QUICK)
    with jax.default_matmul_precision("highest"):
        return np.asarray(run({"params": component.params}, nhwc(x), np.float32(t), y))


def check(out, expected, floor):
    """At t = 3 within four times the reference's own error, at 977 within that of the time table."""
    error = per_sample(out, nhwc(expected))
    assert error[0] <= 4 * floor[0], (error, floor)
    assert error[1] <= 3e-4, (error, floor)
    assert expected.std() > 0.1


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
    expected, floor = both(model, unet(model, x, y))
    check(ours(component, x, TIMES, y), expected, floor)


@pytest.mark.parametrize("semantics", ["official", "diffusers"])
def test_a_dit(semantics, tmp_path):
    """The official network is diffusers' class with the frequencies and the eps of its weights."""
    model = build("diffusers", "DiTTransformer2DModel", **_DIT)
    shared = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(shared)  # released files repeat one embedder in every block
        if semantics == "official":
            block.norm1.emb.time_proj.downscale_freq_shift = 0
            block.norm3.eps = 1e-6
    x, y = draw("live dit", 2, 4, 16, 16), np.int32([4, 9])

    def call(model, dtype):
        given = dict(timestep=torch.tensor(TIMES), class_labels=torch.tensor(y))
        return model(torch.tensor(x, dtype=dtype), **given).sample

    component = load_component(saved(model, tmp_path))
    expected, floor = both(model, call)
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
        y |= {"resolution": np.float32([[512, 640]] * 2), "aspect_ratio": np.float32([[0.8]] * 2)}

    def call(model, dtype):
        def tensor(name):
            return torch.tensor(y[name], dtype=dtype)

        added = {n: tensor(n) if micro else None for n in ("resolution", "aspect_ratio")}
        return model(
            torch.tensor(x, dtype=dtype),
            tensor("context"),
            timestep=torch.tensor(TIMES),
            added_cond_kwargs=added,
            encoder_attention_mask=tensor("mask"),
        ).sample

    component = load_component(saved(model, tmp_path))
    assert component.config.micro_conditions == micro
    expected, floor = both(model, call)
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
    config, params = component.config, component.params
    assert component.kind == "first_stage"
    image = draw("live image", 2, 3, 32, 48)
    latents = draw("live latents", 2, config.embed_dim, 4, 6)

    def encoded(model, dtype):
        out = model.encode(torch.tensor(image, dtype=dtype))
        return out.latent_dist.mean if kind == "AutoencoderKL" else out.latents

    def decoded(model, dtype):
        return model.decode(torch.tensor(latents, dtype=dtype)).sample

    with jax.default_matmul_precision("highest"):
        z = first_stage.encode(config, params, nhwc(image)) / config.scale_factor
        pixels = first_stage.decode(config, params, nhwc(latents) * config.scale_factor)
    for out, call in ((z, encoded), (pixels, decoded)):
        expected, floor = both(model, call)
        error = per_sample(np.asarray(out), nhwc(expected))
        # The scale that goes in and out again rounds twice more.
        assert (error <= 4 * floor + 1e-6).all(), (error, floor)


@pytest.mark.slow
def test_the_cifar_10_model_at_full_size(tmp_path):
    full = dict(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    model = build("diffusers", "UNet2DModel", **{**_DDPM, **full})
    x = draw("live cifar", 2, 3, 32, 32)
    component = load_component(saved(model, tmp_path))
    assert sum(leaf.size for leaf in jax.tree.leaves(component.params)) == 35_746_307
    expected, floor = both(model, unet(model, x, None))
    check(ours(component, x, TIMES, None), expected, floor)
