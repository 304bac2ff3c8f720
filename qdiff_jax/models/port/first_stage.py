r"""Published first stages as parameters of `models.autoencoder`: files of CompVis and of diffusers.

CompVis: a first stage's own file (`vq-f4.zip`, with the losses it was trained with, which are dropped) or
that of a whole latent diffusion model, where its names begin with `first_stage_model.`. diffusers: the
folder `vae/` (AutoencoderKL) or `vqvae/` (VQModel); older files call the attention's layers `query`, `key`,
`value` and `proj_attn`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from qdiff_jax.models.autoencoder import AutoencoderConfig, autoencoder_shapes
from qdiff_jax.models.first_stage import FIRST_STAGES
from qdiff_jax.models.port.strict import Row, Table, port_parameters
from qdiff_jax.runtime.state_dicts import check_fields, load_config, load_state_dict, to_device

_PREFIX = "first_stage_model."
_SIDE = r"(encoder|decoder)\."

_SHARED = (
    Row(_SIDE + r"conv_(in|out)", r"\1/conv_\2", "conv"),
    Row(r"quant_conv", "encoder/quant_conv", "conv"),
    Row(r"post_quant_conv", "decoder/post_quant_conv", "conv"),
    Row(r"quantize\.embedding\.weight", "codebook", "tensor"),
)

COMPVIS = Table(
    rows=(
        *_SHARED,
        Row(_SIDE + r"norm_out", r"\1/norm_out", "norm"),
        Row(_SIDE + r"mid\.block_(\d)\.(norm\d)", r"\1/mid_block_\2/\3", "norm"),
        Row(_SIDE + r"mid\.block_(\d)\.(conv\d)", r"\1/mid_block_\2/\3", "conv"),
        Row(_SIDE + r"mid\.attn_1\.norm", r"\1/mid_attn_1/norm", "norm"),
        Row(_SIDE + r"mid\.attn_1\.(q|k|v|proj_out)", r"\1/mid_attn_1/\2", "dense"),
        Row(_SIDE + r"(down|up)\.(\d\.block\.\d)\.(norm\d)", r"\1/\2_\3/\4", "norm"),
        Row(_SIDE + r"(down|up)\.(\d\.block\.\d)\.(conv\d|nin_shortcut)", r"\1/\2_\3/\4", "conv"),
        Row(_SIDE + r"(down|up)\.(\d\.attn\.\d)\.norm", r"\1/\2_\3/norm", "norm"),
        Row(_SIDE + r"(down|up)\.(\d\.attn\.\d)\.(q|k|v|proj_out)", r"\1/\2_\3/\4", "dense"),
        Row(_SIDE + r"(down|up)\.(\d)\.(downsample|upsample)\.conv", r"\1/\2_\3_\4/conv", "conv"),
    ),
    drops=(r"loss\..*",),
)

# diffusers' names of the layers of a block and of an attention -> (ours, kind).
_BLOCK = (
    ("norm1", "norm1", "norm"),
    ("norm2", "norm2", "norm"),
    ("conv1", "conv1", "conv"),
    ("conv2", "conv2", "conv"),
    ("conv_shortcut", "nin_shortcut", "conv"),
)
_ATTENTION = (
    ("group_norm", "norm", "norm"),
    (r"(?:to_q|query)", "q", "dense"),
    (r"(?:to_k|key)", "k", "dense"),
    (r"(?:to_v|value)", "v", "dense"),
    (r"(?:to_out\.0|proj_attn)", "proj_out", "dense"),
)


@functools.cache
def diffusers_table(levels: int) -> Table:
    """The rows of a model of that many resolutions: diffusers counts the decoder's from the lowest."""
    rows = [*_SHARED, Row(_SIDE + r"conv_norm_out", r"\1/norm_out", "norm")]

    def part(native, ours, layers):
        rows.extend(
            Row(rf"{native}\.{layer}", f"{ours}/{name}", kind) for layer, name, kind in layers
        )

    for side in ("encoder", "decoder"):
        for i in range(2):
            part(rf"{side}\.mid_block\.resnets\.{i}", f"{side}/mid_block_{i + 1}", _BLOCK)
        part(rf"{side}\.mid_block\.attentions\.0", f"{side}/mid_attn_1", _ATTENTION)
    for level in range(levels):
        for native, ours, resample in (
            (rf"encoder\.down_blocks\.{level}", f"encoder/down_{level}", "down"),
            (rf"decoder\.up_blocks\.{levels - 1 - level}", f"decoder/up_{level}", "up"),
        ):
            part(rf"{native}\.resnets\.(\d)", rf"{ours}_block_\1", _BLOCK)
            part(rf"{native}\.attentions\.(\d)", rf"{ours}_attn_\1", _ATTENTION)
            sampler = rf"{native}\.{resample}samplers\.0\.conv"
            rows.append(Row(sampler, f"{ours}_{resample}sample/conv", "conv"))
    return Table(tuple(rows))


def first_stage_params(
    tensors: Mapping[str, Any], config: AutoencoderConfig, source: object = "the state dict"
) -> tuple[dict, AutoencoderConfig]:
    """A state dict of either layout as parameters for `models.first_stage`, and the config to use them with.

    tensors: a first stage's own, or those of a whole latent diffusion model, of which the others are left
    alone. Where such a model keeps its `scale_factor`, the returned config has that one.

    Raises ValueError, naming `source`, for tensors that are missing, left over or of another shape.
    """
    scale = tensors.get("scale_factor")
    if scale is not None:
        config = dataclasses.replace(config, scale_factor=float(np.asarray(scale)))
    if any(key.startswith(_PREFIX) for key in tensors):
        tensors = {k.removeprefix(_PREFIX): v for k, v in tensors.items() if k.startswith(_PREFIX)}
    theirs = any(key.startswith(("encoder.mid_block.", "decoder.mid_block.")) for key in tensors)
    table = diffusers_table(len(config.multipliers)) if theirs else COMPVIS
    params = port_parameters(tensors, table, autoencoder_shapes(config), source)
    return to_device(params), config


def load_first_stage(
    path, config: AutoencoderConfig | str | None = None
) -> tuple[dict, AutoencoderConfig]:
    """`first_stage_params` of a file or folder.

    config: one of `FIRST_STAGES` by name, or sizes of your own. None: what the folder's `config.json` says.

    Raises ValueError: an unknown name, no config, or as `load_state_dict` and `first_stage_params` do.
    """
    if isinstance(config, str):
        if config not in FIRST_STAGES:
            raise ValueError(
                f"no first stage is called {config!r}; there are {', '.join(FIRST_STAGES)}."
            )
        config = FIRST_STAGES[config]
    elif config is None:
        if not pathlib.Path(path).is_dir():
            raise ValueError(
                f"{path} is a file without a config: say which first stage it is, one of "
                f"{', '.join(FIRST_STAGES)}, or give a folder with config.json."
            )
        config = diffusers_config(load_config(path), path)
    return first_stage_params(load_state_dict(path), config, path)


# What the modules here have built in; a config that says otherwise is of another architecture.
_FIXED = {
    "act_fn": "silu",
    "norm_type": "group",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "shift_factor": None,
    "latents_mean": None,
}


# Fields of a config.json that have no default.
_SIZES = (
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "in_channels",
    "out_channels",
    "latent_channels",
    "layers_per_block",
)


def diffusers_config(
    fields: Mapping[str, Any], source: object = "config.json"
) -> AutoencoderConfig:
    """The sizes of an AutoencoderKL or a VQModel from its `config.json`.

    A VQModel's scale is 1, as LDM has it, unless the file itself names one.

    Raises ValueError, naming `source`, for another class, for settings that are not built here, or for
    fields that are missing.
    """
    kind = fields.get("_class_name")
    if kind not in ("AutoencoderKL", "VQModel"):
        raise ValueError(
            f"{source} describes a {kind}; first stages are AutoencoderKL and VQModel."
        )
    is_vq = kind == "VQModel"
    check_fields(fields, (*_SIZES, *(("num_vq_embeddings",) if is_vq else ())), source)
    other = [key for key, value in _FIXED.items() if fields.get(key, value) != value]
    widths = fields["block_out_channels"]
    attention = [name.startswith("Attn") for name in fields["down_block_types"]]
    mirrored = [name.startswith("Attn") for name in fields["up_block_types"]][::-1]
    if attention != mirrored:
        other.append("up_block_types")
    if any(width % widths[0] for width in widths):
        other.append("block_out_channels")
    if fields["in_channels"] != fields["out_channels"]:
        other.append("out_channels")
    if other:
        said = ", ".join(f"{key}={fields[key]!r}" for key in other)
        raise ValueError(f"{source} describes a first stage that is not built here: {said}.")
    resolution = 2 ** (len(widths) + 2)  # attention is placed by level: any side of enough halvings
    return AutoencoderConfig(
        multipliers=tuple(width // widths[0] for width in widths),
        z_channels=fields["latent_channels"],
        embed_dim=(fields.get("vq_embed_dim") if is_vq else None) or fields["latent_channels"],
        codes=fields["num_vq_embeddings"] if is_vq else None,
        scale_factor=fields.get("scaling_factor", 1.0 if is_vq else 0.18215),
        channels=widths[0],
        res_blocks=fields["layers_per_block"],
        attention_resolutions=tuple(resolution >> i for i, has in enumerate(attention) if has),
        mid_attention=fields.get("mid_block_add_attention", True),
        resolution=resolution,
        in_channels=fields["in_channels"],
        groups=fields.get("norm_num_groups", 32),
    )
