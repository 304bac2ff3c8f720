"""Published PixArt checkpoints -> parameters of `PixArt`: the .pth files, and diffusers' layout.

Source: PixArt-alpha/PixArt-alpha and PixArt-alpha/PixArt-sigma (state dict under "state_dict"), and
diffusers' PixArtTransformer2DModel, which computes the same network.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import numpy as np

from qdiff_jax.models.families import parameter_shapes
from qdiff_jax.models.pixart import PixArtConfig, positions
from qdiff_jax.models.port.strict import Row, Table, port_parameters
from qdiff_jax.models.port.transformer_names import Layout, official_names
from qdiff_jax.runtime.state_dicts import to_device

# The released files by their names, without ".pth".
PUBLISHED = types.MappingProxyType(
    {
        "PixArt-XL-2-256x256": PixArtConfig(resolution=32, interpolation=1.0, caption_length=120),
        "PixArt-XL-2-512x512": PixArtConfig(resolution=64, interpolation=1.0, caption_length=120),
        "PixArt-XL-2-1024-MS": PixArtConfig(caption_length=120, micro_conditions=True),
        "PixArt-Sigma-XL-2-256x256": PixArtConfig(resolution=32, interpolation=0.5),
        "PixArt-Sigma-XL-2-512-MS": PixArtConfig(resolution=64, interpolation=1.0),
        "PixArt-Sigma-XL-2-1024-MS": PixArtConfig(),
        "PixArt-Sigma-XL-2-2K-MS": PixArtConfig(resolution=256, interpolation=4.0),
    }
)

OFFICIAL = Table(
    (
        Row(r"x_embedder\.proj", "x_embedder/proj", "conv"),
        Row(r"t_embedder\.mlp\.([02])", r"t_embedder/mlp_\1", "dense"),
        Row(r"(csize|ar)_embedder\.mlp\.([02])", r"t_embedder/\1_mlp_\2", "dense"),
        Row(r"t_block\.1", "t_block/dense", "dense"),
        Row(r"y_embedder\.y_proj\.(fc[12])", r"y_embedder/\1", "dense"),
        Row(r"(blocks\.\d+)\.(attn\.(?:qkv|proj)|mlp\.fc[12])", r"\1/\2", "dense"),
        Row(r"(blocks\.\d+)\.(cross_attn\.(?:q_linear|kv_linear|proj))", r"\1/\2", "dense"),
        Row(r"(blocks\.\d+|final_layer)\.scale_shift_table", r"\1/scale_shift_table", "tensor"),
        Row(r"final_layer\.linear", "final_layer/linear", "dense"),
    ),
    # Positions are computed; the caption of the unconditional branch is no parameter (`null_caption`).
    drops=(r"pos_embed", r"y_embedder\.y_embedding"),
)

# A table kept in bfloat16 is 2^-9 off; interpolation or rows and columns confused make it 0.1 and more.
_TABLE_GAP = 1e-2

DIFFUSERS = Layout(
    keys={
        "scale_shift_table": "final_layer.scale_shift_table",
        "pos_embed.pos_embed": "pos_embed",
    },
    whole={
        "pos_embed.proj": "x_embedder.proj",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2",
        "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "adaln_single.emb.resolution_embedder.linear_1": "csize_embedder.mlp.0",
        "adaln_single.emb.resolution_embedder.linear_2": "csize_embedder.mlp.2",
        "adaln_single.emb.aspect_ratio_embedder.linear_1": "ar_embedder.mlp.0",
        "adaln_single.emb.aspect_ratio_embedder.linear_2": "ar_embedder.mlp.2",
        "adaln_single.linear": "t_block.1",
        "proj_out": "final_layer.linear",
    },
    in_block={
        "": "",  # its scale_shift_table
        "attn1.to_out.0": "attn.proj",
        "attn2.to_q": "cross_attn.q_linear",
        "attn2.to_out.0": "cross_attn.proj",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
    },
    copied={},
    joined={
        "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    },
)


def from_official(
    checkpoint: Mapping[str, Any], config: PixArtConfig, source: object = "the checkpoint"
) -> dict:
    """Parameters of `PixArt` from a .pth file as `runtime.torch_files.load_torch` reads it.

    checkpoint: {"state_dict": ...} as released, or the state dict. Raises ValueError listing all that is
    missing, left over or of another shape; or for a position table of another number of tokens or with
    other values than those computed here, unless it is all zero.
    """
    tensors = _state_dict(checkpoint)
    if "pos_embed" in tensors:
        _check_positions(tensors["pos_embed"], config, source)
    return to_device(port_parameters(tensors, OFFICIAL, parameter_shapes(config), source))


def null_caption(checkpoint: Mapping[str, Any], source: object = "the checkpoint") -> np.ndarray:
    """The learned caption [L, E] float32 that the released code puts in the unconditional branch.

    diffusers instead encodes the empty prompt. Raises ValueError if the file has none.
    """
    tensors = _state_dict(checkpoint)
    if "y_embedder.y_embedding" not in tensors:
        raise ValueError(
            f"{source} has no y_embedder.y_embedding; encode the empty prompt for the unconditional "
            "branch, as diffusers does."
        )
    return np.asarray(tensors["y_embedder.y_embedding"], np.float32)


def from_diffusers(
    tensors: Mapping[str, np.ndarray], config: PixArtConfig, source: object = "the state dict"
) -> dict:
    """Parameters of `PixArt` from the state dict of PixArtTransformer2DModel; raises as `from_official`
    and `transformer_names.official_names`."""
    return from_official(official_names(DIFFUSERS, tensors, source), config, source)


def _state_dict(checkpoint: Mapping[str, Any]) -> Mapping[str, np.ndarray]:
    return checkpoint.get("state_dict", checkpoint)


def _check_positions(table: np.ndarray, config: PixArtConfig, source: object) -> None:
    """The released code keeps the table of the training size as a buffer, which it deletes when it loads a
    file; its model for 256 pixels (sigma) has none. Not verified on a released file. Weights of two
    resolutions have the same shapes but for this one."""
    table = np.asarray(table, np.float32)
    if not table.any():
        return
    side = config.resolution // config.patch
    wanted = positions(config.width, side, side, side, config.interpolation)
    if table.shape != (1, *wanted.shape):
        raise ValueError(
            f"{source} has pos_embed {table.shape}, and this model {(1, *wanted.shape)}: it was trained at "
            "another resolution; take that config, or delete pos_embed to load it for this one."
        )
    gap = np.abs(table[0] - wanted).max()
    if not gap < _TABLE_GAP:
        raise ValueError(
            f"{source} has a position table up to {gap:.2g} away from the sinusoids of this config: it has "
            "another interpolation; take that config, or delete pos_embed to load it for this one."
        )
