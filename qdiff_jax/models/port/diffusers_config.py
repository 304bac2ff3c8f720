"""A `config.json` of diffusers as the sizes of one of our diffusion networks.

Source: the constructors of diffusers 0.42 (UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel, the older
Transformer2DModel, PixArtTransformer2DModel), whose defaults stand for fields that a file leaves out. Nothing
is guessed: an option that our network has not got, or that this file has never heard of, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qdiff_jax.models.dit import DiTConfig
from qdiff_jax.models.pixart import PixArtConfig
from qdiff_jax.models.port.diffusers_fields import (
    DIT,
    NEEDED,
    PIXART,
    UNET_2D,
    UNET_CONDITION,
    Fields,
)
from qdiff_jax.models.unet_ddpm import UNetConfig
from qdiff_jax.models.unet_ldm import UNetLDMConfig


def network_config(fields: Mapping[str, Any], source: object = "config.json") -> Any:
    """The config of one of our families from the `config.json` of a diffusion network.

    A DiT has the official semantics, that of its weights (`DiTConfig.semantics`).

    Raises ValueError, naming `source`, for a class that is none of `NETWORKS`, fields that are missing,
    options that are unknown or not built here.
    """
    kind = fields.get("_class_name")
    if kind not in NETWORKS:
        raise ValueError(
            f"{source} describes a {kind}; the diffusion networks read here are {', '.join(NETWORKS)}."
        )
    known, build = NETWORKS[kind]
    if kind == "Transformer2DModel" and fields.get("norm_type") == "ada_norm_single":
        known, build = NETWORKS["PixArtTransformer2DModel"]  # the older name of both
    unknown = [
        name
        for name in fields
        if not name.startswith("_") and name not in (*known.read, *known.fixed, *known.ignored)
    ]
    if unknown:
        raise ValueError(
            f"{source} has options that are unknown here: {', '.join(unknown)}; they may change what the "
            "network computes."
        )
    other = {name: fields.get(name, value) for name, value in known.fixed.items()}
    _refuse({n: v for n, v in other.items() if v != known.fixed[n]}, kind, source)
    read = {name: fields.get(name, default) for name, default in known.read.items()}
    needed = {"sample_size", *(name for name, default in known.read.items() if default is NEEDED)}
    lacking = [name for name, value in read.items() if name in needed and value in (None, NEEDED)]
    if lacking:
        raise ValueError(
            f"{source} lacks {', '.join(lacking)}: it is cut or of another kind of model; download it again."
        )
    return build(read, kind, source)


def _refuse(options: Mapping[str, Any], kind: str, source: object) -> None:
    if options:
        said = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise ValueError(f"{source} describes a {kind} that is not built here: {said}.")


def _side(read: Mapping[str, Any], kind: str, source: object) -> int:
    side = read["sample_size"]
    if isinstance(side, list | tuple) and len(set(side)) == 1:
        return side[0]
    if not isinstance(side, int):
        _refuse({"sample_size": side}, kind, source)
    return side


def _levels(read, plain, attended, kind, source) -> tuple[bool, ...]:
    """Which resolutions have attention, highest first, by the names of blocks."""
    down, up = tuple(read["down_block_types"]), tuple(read["up_block_types"])
    odd = [name for name in (*down, *up) if name not in (*plain, *attended)]
    if odd:
        _refuse({"block types": odd}, kind, source)
    has = tuple(name in attended for name in down)
    if tuple(name in attended for name in up)[::-1] != has or len(has) != len(
        read["block_out_channels"]
    ):
        _refuse({"up_block_types": up}, kind, source)
    return has


def _multipliers(read) -> tuple[int | float, ...]:
    widths = tuple(read["block_out_channels"])
    return tuple(w // widths[0] if w % widths[0] == 0 else w / widths[0] for w in widths)


def _unet(read: Mapping[str, Any], kind: str, source: object) -> UNetConfig | UNetLDMConfig:
    """Two families share the class: DDPM's own pixel models, and those of latent and guided diffusion."""
    conventions = ("flip_sin_to_cos", "freq_shift", "downsample_padding", "norm_eps")
    found = tuple(read[name] for name in conventions)
    if found == (False, 1, 0, 1e-6):
        return _unet_ddpm(read, kind, source)
    if found != (True, 0, 1, 1e-5):
        _refuse({name: read[name] for name in conventions}, kind, source)
    return _unet_ldm(read, kind, source)


def _unet_ddpm(read, kind, source) -> UNetConfig:
    has = _levels(
        read, ("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D"), kind, source
    )
    built = {
        "attention_head_dim": None,
        "attn_norm_num_groups": None,
        "downsample_type": "conv",
        "upsample_type": "conv",
        "num_class_embeds": None,
        "resnet_time_scale_shift": "default",
    }
    _refuse({n: read[n] for n, value in built.items() if read[n] != value}, kind, source)
    side = _side(read, kind, source)
    return UNetConfig(
        channels=read["block_out_channels"][0],
        multipliers=_multipliers(read),
        res_blocks=read["layers_per_block"],
        attention_resolutions=tuple(side >> i for i, attends in enumerate(has) if attends),
        resolution=side,
        in_channels=read["in_channels"],
        out_channels=read["out_channels"],
        groups=read["norm_num_groups"],
        dropout=0.0,
    )


def _unet_ldm(read, kind, source) -> UNetLDMConfig:
    resampled = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    plain = ("DownBlock2D", "UpBlock2D")
    has = _levels(read, (*plain, *resampled), ("AttnDownBlock2D", "AttnUpBlock2D"), kind, source)
    types = {*read["down_block_types"], *read["up_block_types"]}
    updown = read["downsample_type"] == "resnet"
    wrong = plain if updown else resampled
    if read["upsample_type"] != read["downsample_type"] or types & set(wrong):
        named = ("downsample_type", "upsample_type", "down_block_types", "up_block_types")
        _refuse({name: read[name] for name in named}, kind, source)
    scale_shift = read["resnet_time_scale_shift"] == "scale_shift"
    # Without a number of groups of its own, an attention beside a scale-shift norm has no norm.
    groups = read["attn_norm_num_groups"]
    if groups not in (read["norm_num_groups"], None) or (scale_shift and groups is None):
        _refuse({"attn_norm_num_groups": groups}, kind, source)
    head = read["attention_head_dim"]
    return _ldm_config(
        read,
        kind,
        source,
        has,
        heads=1 if head is None else None,
        head_channels=head,
        resblock_updown=updown,
        num_classes=read["num_class_embeds"],
    )


def _unet_condition(read, kind, source) -> UNetLDMConfig:
    built = {
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "norm_eps": 1e-5,
        "num_class_embeds": None,
    }
    _refuse({n: read[n] for n, value in built.items() if read[n] != value}, kind, source)
    has = _levels(
        read,
        ("DownBlock2D", "UpBlock2D"),
        ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"),
        kind,
        source,
    )
    widths = read["block_out_channels"]
    # In this class the field named after the channels of a head is the number of heads.
    heads = read["num_attention_heads"] or read["attention_head_dim"]
    heads = tuple(heads) if isinstance(heads, list | tuple) else (heads,) * len(widths)
    each = {width // count for width, count in zip(widths, heads)}
    depth, context = read["transformer_layers_per_block"], read["cross_attention_dim"]
    if len(set(heads)) > 1 and len(each) > 1:
        _refuse({"attention_head_dim": heads}, kind, source)
    numbers = {"transformer_layers_per_block": depth, "cross_attention_dim": context}
    _refuse({n: v for n, v in numbers.items() if not isinstance(v, int)}, kind, source)
    one = len(set(heads)) == 1
    return _ldm_config(
        read,
        kind,
        source,
        has,
        heads=heads[0] if one else None,
        head_channels=None if one else each.pop(),
        context_dim=context,
        transformer_depth=depth,
    )


def _ldm_config(read, kind, source, has, **sizes) -> UNetLDMConfig:
    shift = read["resnet_time_scale_shift"]
    if shift not in ("default", "scale_shift"):
        _refuse({"resnet_time_scale_shift": shift}, kind, source)
    return UNetLDMConfig(
        channels=read["block_out_channels"][0],
        multipliers=_multipliers(read),
        res_blocks=read["layers_per_block"],
        attention_downsampling=tuple(2**i for i, attends in enumerate(has) if attends),
        resolution=_side(read, kind, source),
        in_channels=read["in_channels"],
        out_channels=read["out_channels"],
        scale_shift_norm=shift == "scale_shift",
        groups=read["norm_num_groups"],
        **sizes,
    )


def _transformer(read, kind, source) -> dict:
    width = read["num_attention_heads"] * read["attention_head_dim"]
    outputs = read["out_channels"] or read["in_channels"]
    if outputs not in (read["in_channels"], 2 * read["in_channels"]):
        _refuse({"out_channels": outputs}, kind, source)
    return dict(
        width=width,
        depth=read["num_layers"],
        heads=read["num_attention_heads"],
        patch=read["patch_size"],
        resolution=_side(read, kind, source),
        in_channels=read["in_channels"],
        learn_sigma=outputs == 2 * read["in_channels"],
    )


def _dit(read, kind, source) -> DiTConfig:
    return DiTConfig(**_transformer(read, kind, source), num_classes=read["num_embeds_ada_norm"])


def _pixart(read, kind, source) -> PixArtConfig:
    sizes = _transformer(read, kind, source)
    if read["cross_attention_dim"] != sizes["width"]:
        _refuse({"cross_attention_dim": read["cross_attention_dim"]}, kind, source)
    micro, scale = read["use_additional_conditions"], read["interpolation_scale"]
    micro = sizes["resolution"] == 128 if micro is None else micro
    return PixArtConfig(
        **sizes,
        interpolation=float(max(sizes["resolution"] // 64, 1) if scale is None else scale),
        caption_dim=read["caption_channels"],
        caption_length=120 if micro else 300,  # of the released models; any length will do
        micro_conditions=micro,
    )


NETWORKS: Mapping[str, tuple[Fields, Callable]] = {
    "UNet2DModel": (UNET_2D, _unet),
    "UNet2DConditionModel": (UNET_CONDITION, _unet_condition),
    "DiTTransformer2DModel": (DIT, _dit),
    "Transformer2DModel": (DIT, _dit),
    "PixArtTransformer2DModel": (PIXART, _pixart),
}
