"""Names of diffusers' `UNet2DModel` and `UNet2DConditionModel` -> native names of `UNetLDM`'s family.

Source: state dicts of diffusers 0.42 and of older files, whose attention says query, key, value and
proj_attn. diffusers numbers blocks within a resolution, the native files throughout, so that the names of
blocks follow from the config; names inside a block are a table.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qdiff_jax.models.port.unet_ddpm import ATTENTION
from qdiff_jax.models.port.unet_ldm import from_native
from qdiff_jax.models.unet_ldm import UNetLDMConfig

_WHOLE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def block_names(config: UNetLDMConfig) -> dict[str, str]:
    """{diffusers' block: native block}, blocks being residual blocks, attentions and resamplers."""
    levels, repeats = len(config.multipliers), config.res_blocks
    names = {f"mid_block.resnets.{i}": f"middle_block.{2 * i}" for i in range(2)}
    names["mid_block.attentions.0"] = "middle_block.1"
    for level in range(levels):
        down, n = f"down_blocks.{level}", 1 + level * (repeats + 1)
        for j in range(repeats):
            names[f"{down}.resnets.{j}"] = f"input_blocks.{n + j}.0"
            names[f"{down}.attentions.{j}"] = f"input_blocks.{n + j}.1"
        names[f"{down}.downsamplers.0"] = f"input_blocks.{n + repeats}.0"
        up, n = f"up_blocks.{level}", level * (repeats + 1)
        for j in range(repeats + 1):
            names[f"{up}.resnets.{j}"] = f"output_blocks.{n + j}.0"
            names[f"{up}.attentions.{j}"] = f"output_blocks.{n + j}.1"
        attended = 2 ** (levels - 1 - level) in config.attention_downsampling
        names[f"{up}.upsamplers.0"] = f"output_blocks.{n + repeats}.{2 if attended else 1}"
    return names


def native_key(key: str, blocks: Mapping[str, str], transformer: bool) -> str:
    """The native name of a diffusers' key, or the key itself where it has none."""
    module, _, leaf = key.rpartition(".")
    if module in _WHOLE:
        return f"{_WHOLE[module]}.{leaf}"
    block = ".".join(module.split(".")[: 3 if module.startswith("mid_block") else 4])
    inner = module.removeprefix(block).removeprefix(".")
    if block not in blocks:
        return key
    if ".attentions." in f"{block}.":
        inner = inner if transformer else ATTENTION.get(inner)
    elif inner == "conv":
        inner = "op" if ".downsamplers." in block else "conv"
    else:
        inner = _RESNET.get(inner)
    return key if inner is None else f"{blocks[block]}.{inner}.{leaf}"


def from_diffusers(
    tensors: Mapping[str, np.ndarray], config: UNetLDMConfig, source: object = "the state dict"
) -> dict:
    """Parameters of `UNetLDM` from diffusers' names.

    Raises ValueError listing all that is missing, left over or of another shape, under native names where
    there is one.
    """
    blocks, transformer = block_names(config), config.context_dim is not None
    native: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        name = native_key(key, blocks, transformer)
        if name in native:
            raise ValueError(f"{source} has two tensors for {name}, the second is {key}.")
        native[name] = np.asarray(tensor)
    return from_native(_fused(native, config), config, source)


def _fused(tensors: Mapping[str, np.ndarray], config: UNetLDMConfig) -> dict[str, np.ndarray]:
    """q, k and v of each attention as the rows of one `qkv`, in the order that the model reads."""
    fused = dict(tensors)
    for key in tensors:
        block, found, leaf = key.rpartition(".q.")
        parts = [f"{block}.{letter}.{leaf}" for letter in "qkv"]
        if not found or not all(part in tensors for part in parts):
            continue
        stack = np.stack([fused.pop(part) for part in parts])  # [3, C, ...], C = (head, d)
        if not config.new_attention_order:
            heads = config.heads_of(stack.shape[1])
            stack = stack.reshape(3, heads, -1, *stack.shape[2:]).swapaxes(0, 1)
        fused[f"{block}.qkv.{leaf}"] = stack.reshape(-1, *tensors[key].shape[1:])
    return fused
