"""What a state dict looks like, by names that tell one network from the others.

Of the names, only the telling ones are looked at: that a file is of a family does not say that it is whole.
Sources: the tables beside this file; for SDXL, SD3 and FLUX diffusers 0.42 and the released names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple


class Look(NamedTuple):
    """mark: a pattern that a whole name matches. families: of `models.families`, that have such files.
    layout: as `load_pipeline` calls it. text: what it is, for messages."""

    mark: str
    families: tuple[str, ...]
    layout: str
    text: str


_LDM, _DIT, _PIXART = ("unet_ldm",), ("dit",), ("pixart",)
_AT = r"(?:model\.diffusion_model\.)?"
_CONTEXT = rf"{_AT}(?:.*\.)?transformer_blocks\.0\.attn2\.to_k\.weight"
_FIRST = rf"{_AT}(?:input_blocks\.0\.0|conv_in|x_embedder\.proj|pos_embed\.proj)\.weight"

# The first that matches decides.
LOOKS = (
    Look(
        r"model\.diffusion_model\.time_embed\.0\.weight",
        _LDM,
        "CompVis",
        "a whole checkpoint of latent or Stable Diffusion in CompVis's names",
    ),
    Look(r"add_embedding\.linear_1\.weight", (), "", "the U-Net of SDXL, which is not built here"),
    Look(r"time_embed\.0\.weight", _LDM, "native", "a U-Net of latent or guided diffusion"),
    Look(r"temb\.dense\.0\.weight", ("unet_ddpm",), "native", "a U-Net of DDPM"),
    Look(
        r"(?:down|up)_blocks\..*\.transformer_blocks\..*",
        _LDM,
        "diffusers",
        "a U-Net with cross-attention, as Stable Diffusion's, in diffusers' layout",
    ),
    Look(
        r"time_embedding\.linear_1\.weight",
        ("unet_ddpm", "unet_ldm"),
        "diffusers",
        "a U-Net without cross-attention in diffusers' layout",
    ),
    Look(r"y_embedder\.embedding_table\.weight", _DIT, "native", "a DiT in official names"),
    Look(r"proj_out_1\.weight", _DIT, "diffusers", "a DiT in diffusers' layout"),
    Look(r"y_embedder\.y_proj\.fc1\.weight", _PIXART, "native", "a PixArt in official names"),
    Look(r"adaln_single\.linear\.weight", _PIXART, "diffusers", "a PixArt in diffusers' layout"),
    Look(
        r"(?:transformer_blocks|joint_blocks|double_blocks)\..*(?:add_q_proj|context_block|txt_attn).*",
        (),
        "",
        "a transformer of SD3 or FLUX, which is not built here",
    ),
    Look(
        r"(?:first_stage_model\.)?decoder\.conv_in\.weight", (), "", "a first stage (autoencoder)"
    ),
    Look(
        r"(?:text_model\.|vision_model\.)?(?:embeddings\.(?:token|position|patch|class)_embedding|encoder\.layers\.0\.self_attn)\b.*",
        (),
        "",
        "a CLIP",
    ),
    Look(r"encoder\.block\.0\.layer\.0\.SelfAttention\..*", (), "", "a T5"),
)


def look_of(tensors: Mapping) -> Look | None:
    """The look of a state dict's names; None where none of them tells."""
    return next(
        (look for look in LOOKS if any(re.fullmatch(look.mark, key) for key in tensors)), None
    )


def looks_like(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What tensors of these names and shapes look like, with their widths, in words; "" if it is unknown."""
    look = look_of(shapes)
    if look is None:
        return ""
    sizes = [
        f"{what} {shapes[key][axis]}"
        for what, pattern, axis in (("width", _FIRST, 0), ("context of width", _CONTEXT, 1))
        for key in [next((k for k in shapes if re.fullmatch(pattern, k)), None)]
        if key is not None and len(shapes[key]) > axis
    ]
    blocks = {m[1] for key in shapes if (m := re.match(r"(?:transformer_)?blocks\.(\d+)\.", key))}
    sizes += [f"{len(blocks)} blocks"] if blocks else []
    return f"{look.text} ({', '.join(sizes)})" if sizes and look.families else look.text
