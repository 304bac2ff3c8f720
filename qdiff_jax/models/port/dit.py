"""Published DiT checkpoints -> parameters of `DiT`: the official files, and their copies in diffusers' layout.

Source: facebookresearch/DiT (files DiT-XL-2-256x256.pt and DiT-XL-2-512x512.pt, training checkpoints with
their moving average under "ema"), and diffusers' DiTTransformer2DModel. The weights of both are the same;
their classes do not compute the same network (`DiTConfig.semantics`). Loaded here, either file gives the
official network unless the config says otherwise.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import numpy as np

from qdiff_jax.models.dit import DiTConfig, position_table
from qdiff_jax.models.families import parameter_shapes
from qdiff_jax.models.port.strict import Row, Table, port_parameters
from qdiff_jax.models.port.transformer_names import Layout, official_names
from qdiff_jax.runtime.state_dicts import to_device

# The released files by their names, without ".pt".
PUBLISHED = types.MappingProxyType(
    {"DiT-XL-2-256x256": DiTConfig.xl_2(32), "DiT-XL-2-512x512": DiTConfig.xl_2(64)}
)

OFFICIAL = Table(
    (
        Row(r"x_embedder\.proj", "x_embedder/proj", "conv"),
        Row(r"t_embedder\.mlp\.([02])", r"t_embedder/mlp_\1", "dense"),
        Row(r"y_embedder\.embedding_table", "t_embedder/y_embedder", "embed"),
        Row(r"(blocks\.\d+)\.(attn\.(?:qkv|proj)|mlp\.fc[12])", r"\1/\2", "dense"),
        Row(r"(blocks\.\d+)\.adaLN_modulation\.1", r"\1_adaLN/dense", "dense"),
        Row(r"final_layer\.linear", "final_layer/linear", "dense"),
        Row(r"final_layer\.adaLN_modulation\.1", "final_layer_adaLN/dense", "dense"),
    ),
    drops=(r"pos_embed",),  # computed; compared with ours before it goes
)

DIFFUSERS = Layout(
    keys={"pos_embed.pos_embed": "pos_embed"},
    whole={
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    },
    in_block={
        "norm1.linear": "adaLN_modulation.1",
        "attn1.to_out.0": "attn.proj",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
    },
    copied={
        "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
    },
    joined={"attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v")},
)


def from_official(
    checkpoint: Mapping[str, Any], config: DiTConfig, source: object = "the checkpoint"
) -> dict:
    """Parameters of `DiT` from an official file, as `runtime.torch_files.load_torch` reads it.

    checkpoint: a bare state dict as released, or a training checkpoint, of which the moving average "ema"
    is taken, as the published sampling code does.

    Raises ValueError listing all that is missing, left over or of another shape; or for a position table
    that is not the one computed here.
    """
    tensors = checkpoint["ema"] if "ema" in checkpoint else checkpoint
    if "pos_embed" in tensors:
        _check_positions(tensors["pos_embed"], config, source)
    return to_device(port_parameters(tensors, OFFICIAL, parameter_shapes(config), source))


def from_diffusers(
    tensors: Mapping[str, np.ndarray], config: DiTConfig, source: object = "the state dict"
) -> dict:
    """Parameters of `DiT` from the state dict of diffusers' DiTTransformer2DModel.

    Raises ValueError as `from_official`, and as `transformer_names.official_names`.
    """
    return from_official(official_names(DIFFUSERS, tensors, source), config, source)


def _check_positions(table: np.ndarray, config: DiTConfig, source: object) -> None:
    wanted = position_table(config.width, config.resolution // config.patch)
    table = np.asarray(table, np.float32)
    if table.shape != (1, *wanted.shape):
        raise ValueError(
            f"{source} has pos_embed {table.shape}, and this model {(1, *wanted.shape)}: it is of "
            "another resolution, patch or width."
        )
    gap = np.abs(table[0] - wanted).max()
    if not gap < 1e-5:
        raise ValueError(
            f"{source} has a position table up to {gap:.2g} away from the sinusoids of DiT, which this "
            "model computes; a learned table cannot be loaded."
        )
