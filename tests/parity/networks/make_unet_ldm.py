"""Makes unet_ldm.npz: small U-Nets of the latent-diffusion family, one of DDPM, and single operations.

    pip install torch==2.13.0 diffusers==0.42.1 && python tests/parity/networks/make_unet_ldm.py

The networks are diffusers' UNet2DModel and UNet2DConditionModel, set up as the released checkpoints need
them; weights follow from their names (`seeded`), so that only inputs and outputs are stored. Operations
without a module in diffusers (the two orders of q, k and v in one layer) are their definitions, in torch.
"""

import json
import pathlib

import numpy as np
import seeded
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_timestep_embedding
from torch.nn import functional as F

TIMES = (3, 977)
CLASSES, CONTEXT, LENGTH = 5, 24, 7
_COMMON = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "norm_eps": 1e-5,
}
_RESAMPLED = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 32,
}


def ldm4():
    """Strided convolutions, 16 channels a head."""
    return UNet2DModel(
        **_COMMON,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
    )


def churches():
    """Resampling and scale-shift norm inside residual blocks; 8 heads whatever the width."""
    model = UNet2DModel(**_COMMON, **_RESAMPLED, in_channels=4, out_channels=4)
    for module in model.modules():
        if isinstance(module, Attention):
            module.heads = 8
            module.scale = (module.to_q.weight.shape[0] // 8) ** -0.5
    return model


def guided():
    """As churches, with heads of 16 channels, labels added to the time embedding and 6 outputs."""
    return UNet2DModel(
        **_COMMON,
        **_RESAMPLED,
        in_channels=3,
        out_channels=6,
        attention_head_dim=16,
        num_class_embeds=CLASSES,
    )


def text():
    """Spatial transformers with 4 heads that read a context."""
    return UNet2DConditionModel(
        **_COMMON,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=CONTEXT,
        attention_head_dim=4,  # which here is the number of heads
    )


def ddpm():
    """As the pixel models of Ho et al. 2020."""
    changed = {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6}
    return UNet2DModel(
        **{**_COMMON, **changed},
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
    )


def network(name, build, y=None):
    """{"in/...", "out/...": array} of one network and the names and shapes of its tensors."""
    model = build().eval()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    state = {k: torch.tensor(v) for k, v in seeded.state_dict(shapes).items()}
    model.load_state_dict(state, strict=True)
    x = seeded.normal(f"{name}/x", (2, model.config.in_channels, 8, 8)).astype(np.float32)
    arrays = {f"{name}/in/x": x}
    for suffix, dtype in (("", torch.float32), ("_f64", torch.float64)):
        given = (torch.tensor(x, dtype=dtype), torch.tensor(TIMES))
        if isinstance(model, UNet2DConditionModel):
            given = (*given, torch.tensor(y, dtype=dtype))
        elif y is not None:
            given = (*given, torch.tensor(y))
        with torch.no_grad():
            arrays[f"{name}/out/sample{suffix}"] = model.to(dtype)(*given).sample.numpy()
    spread = np.abs(arrays[f"{name}/out/sample"] - arrays[f"{name}/out/sample_f64"]).max()
    print(f"{name}: float32 against float64 {spread:.2e}")
    if y is not None:
        arrays[f"{name}/in/y"] = y
    return arrays, {key: list(shape) for key, shape in shapes.items()}


def combined_attention(qkv, heads, order):
    """Attention [B, C, N] of qkv [B, 3 C, N]; channels (head, [q, k, v], d) or ([q, k, v], head, d)."""
    batch, channels, length = qkv.shape
    if order == "legacy":
        parts = qkv.reshape(batch, heads, 3, -1, length).unbind(2)
    else:
        parts = qkv.reshape(batch, 3, heads, -1, length).unbind(1)
    q, k, v = (part.transpose(-1, -2) for part in parts)
    h = F.scaled_dot_product_attention(q, k, v)
    return h.transpose(-1, -2).reshape(batch, channels // 3, length)


def operations():
    def draw(name, *shape, scale=1.0, shift=0.0):
        return (seeded.normal(f"ops/{name}", shape) * scale + shift).astype(np.float32)

    arrays = {
        "norm_w": draw("norm_w", 64),
        "norm_b": draw("norm_b", 64),
        # A wrong eps shows on the small values, a variance as a difference of moments on the large.
        "maps_small": draw("maps", 2, 64, 3, 5, scale=1e-3),
        "maps_offset": draw("maps", 2, 64, 3, 5, scale=3.0, shift=50.0),
        "tokens_small": draw("tokens", 2, 5, 64, scale=1e-3),
        "tokens_offset": draw("tokens", 2, 5, 64, scale=3.0, shift=50.0),
        "geglu_x": draw("geglu_x", 2, 5, 8),
        "geglu_w": draw("geglu_w", 64, 8),
        "geglu_b": draw("geglu_b", 64),
        "conv_x": draw("conv_x", 2, 8, 6, 6),
        "conv_w": draw("conv_w", 8, 8, 3, 3, scale=0.1),
        "conv_b": draw("conv_b", 8),
        "qkv": draw("qkv", 2, 48, 6),
        "t": np.float32([0, 1, 3, 10, 0.25, 7.5]),
    }
    given = {f"in/{k}": v for k, v in arrays.items()}
    a = {k: torch.tensor(v, dtype=torch.float64) for k, v in arrays.items()}
    out = {}
    for kind in ("small", "offset"):
        for eps in (1e-5, 1e-6):
            maps = F.group_norm(a[f"maps_{kind}"], 32, a["norm_w"], a["norm_b"], eps)
            out[f"group_norm_{eps:g}_{kind}"] = maps
        tokens = F.layer_norm(a[f"tokens_{kind}"], (64,), a["norm_w"], a["norm_b"], 1e-5)
        out[f"layer_norm_{kind}"] = tokens
    geglu = FeedForward(8, activation_fn="geglu").net[0].to(torch.float64)
    geglu.load_state_dict({"proj.weight": a["geglu_w"], "proj.bias": a["geglu_b"]})
    out["geglu"] = geglu(a["geglu_x"]).detach()
    out["conv_s2_p1"] = F.conv2d(a["conv_x"], a["conv_w"], a["conv_b"], stride=2, padding=1)
    out["upsampled"] = F.conv2d(
        F.interpolate(a["conv_x"], scale_factor=2.0, mode="nearest"),
        a["conv_w"],
        a["conv_b"],
        padding=1,
    )
    out["averaged"] = F.avg_pool2d(a["conv_x"], 2)
    for order in ("legacy", "new"):
        for heads in (1, 4):
            out[f"attention_{order}_{heads}"] = combined_attention(a["qkv"], heads, order)
    for dim in (128, 320):
        table = get_timestep_embedding(
            torch.tensor(arrays["t"]), dim, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        out[f"times_{dim}"] = table
    return given | {f"out/{k}": v.numpy().astype(np.float32) for k, v in out.items()}


def main():
    context = seeded.normal("context", (2, LENGTH, CONTEXT)).astype(np.float32)
    table = seeded.tensor("cond_stage_model.embedding.weight", (CLASSES + 1, CONTEXT))
    cases = {
        "ldm4": (ldm4, None),
        "churches": (churches, None),
        "guided": (guided, np.array([4, 0])),
        "text": (text, context),
        "ddpm": (ddpm, None),
        "classes": (text, table[[1, CLASSES]][:, None, :]),
    }
    arrays, manifests = {}, {}
    for name, (build, y) in cases.items():
        made, manifests[name] = network(name, build, y)
        arrays |= made
    arrays |= {f"ops/{k}": v for k, v in operations().items()}
    path = pathlib.Path(__file__).with_name("unet_ldm.npz")
    meta = {"times": TIMES, "manifests": manifests, "classes": CLASSES}
    np.savez_compressed(path, meta=json.dumps(meta), **arrays)
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
