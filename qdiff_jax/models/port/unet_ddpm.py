"""Names of the released DDPM U-Nets -> `UNetDDPM`: the native files, and their copies in diffusers' layout.

Sources: state dicts of pytorch_diffusion and ermongroup/ddim (the file itself is the moving average, or
not, by its name), and of diffusers' UNet2DModel, old files of which say query, key, value and proj_attn.
In native names the index of `up` is the resolution, 0 the highest; diffusers counts in order of execution.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from qdiff_jax.models.families import parameter_shapes
from qdiff_jax.models.port.strict import Row, Table, port_parameters
from qdiff_jax.models.unet_ddpm import UNetConfig
from qdiff_jax.runtime.state_dicts import to_device

NATIVE = Table(
    (
        Row(r"temb\.dense\.([01])", r"temb/dense_\1", "dense"),
        Row(r"conv_in", "conv_in/conv", "conv"),
        Row(
            r"((?:down|up)\.\d\.block\.\d|mid\.block_[12])\.temb_proj",
            r"\1_temb_proj/dense",
            "dense",
        ),
        Row(r"((?:down|up)\.\d\.block\.\d|mid\.block_[12])\.(norm[12])", r"\1/\2", "norm"),
        Row(
            r"((?:down|up)\.\d\.block\.\d|mid\.block_[12])\.(conv[12]|nin_shortcut)",
            r"\1/\2",
            "conv",
        ),
        Row(r"((?:down|up)\.\d\.attn\.\d|mid\.attn_1)\.norm", r"\1/norm", "norm"),
        Row(r"((?:down|up)\.\d\.attn\.\d|mid\.attn_1)\.(q|k|v|proj_out)", r"\1/\2", "dense"),
        Row(r"(down\.\d\.downsample|up\.\d\.upsample)\.conv", r"\1/conv", "conv"),
        Row(r"norm_out", "out/norm_out", "norm"),
        Row(r"conv_out", "out/conv_out", "conv"),
    )
)

# diffusers' module -> native module; UP becomes the resolution.
_DIFFUSERS = (
    (r"time_embedding\.linear_1", "temb.dense.0"),
    (r"time_embedding\.linear_2", "temb.dense.1"),
    (r"conv_norm_out", "norm_out"),
    (r"(conv_in|conv_out)", r"\1"),
    (r"down_blocks\.(\d)\.resnets\.(\d)\.(\w+)", r"down.\1.block.\2.\3"),
    (r"down_blocks\.(\d)\.attentions\.(\d)\.([\w.]+)", r"down.\1.attn.\2.\3"),
    (r"down_blocks\.(\d)\.downsamplers\.0\.conv", r"down.\1.downsample.conv"),
    (r"up_blocks\.(\d)\.resnets\.(\d)\.(\w+)", r"up.UP\1.block.\2.\3"),
    (r"up_blocks\.(\d)\.attentions\.(\d)\.([\w.]+)", r"up.UP\1.attn.\2.\3"),
    (r"up_blocks\.(\d)\.upsamplers\.0\.conv", r"up.UP\1.upsample.conv"),
    (r"mid_block\.resnets\.0\.(\w+)", r"mid.block_1.\1"),
    (r"mid_block\.resnets\.1\.(\w+)", r"mid.block_2.\1"),
    (r"mid_block\.attentions\.0\.([\w.]+)", r"mid.attn_1.\1"),
)
# Layers of an attention block of convolutions in diffusers, by new and by old names.
ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}
_INSIDE = {"time_emb_proj": "temb_proj", "conv_shortcut": "nin_shortcut", **ATTENTION}


def from_native(
    tensors: Mapping[str, np.ndarray], config: UNetConfig, source: object = "the state dict"
) -> dict:
    """Parameters of `UNetDDPM` from native names.

    Raises ValueError listing all that is missing, left over or of another shape.
    """
    return to_device(port_parameters(tensors, NATIVE, parameter_shapes(config), source))


def from_diffusers(
    tensors: Mapping[str, np.ndarray], config: UNetConfig, source: object = "the state dict"
) -> dict:
    """Parameters of `UNetDDPM` from diffusers' names.

    Raises ValueError listing all that is missing, left over or of another shape, under native names where
    there is one.
    """
    native = {native_key(key, len(config.multipliers)): tensor for key, tensor in tensors.items()}
    if len(native) != len(tensors):
        raise ValueError(f"{source} has two tensors under one name; old and new names are mixed.")
    return from_native(native, config, source)


def native_key(key: str, levels: int) -> str:
    """The native name of a diffusers' key, or the key itself where it has none."""
    module, _, leaf = key.rpartition(".")
    for pattern, native in _DIFFUSERS:
        match = re.fullmatch(pattern, module)
        if match is not None:
            name = match.expand(native)
            name = re.sub(r"UP(\d)", lambda up: str(levels - 1 - int(up[1])), name)
            for theirs, ours in _INSIDE.items():
                if name.endswith(f".{theirs}"):
                    name = f"{name.removesuffix(theirs)}{ours}"
            return f"{name}.{leaf}"
    return key
