"""Small U-Nets of the latent-diffusion family, and what torch says of them (parity/networks)."""

import functools
import json
import pathlib

import numpy as np

from qdiff_jax.models.families import parameter_shapes
from qdiff_jax.models.unet_ldm import UNetLDMConfig
from qdiff_jax.models.unet_ldm_published import PUBLISHED

from ..parity.networks import seeded

NETWORKS = pathlib.Path(__file__).parents[1] / "parity" / "networks"

_SMALL = {
    "channels": 32,
    "multipliers": (1, 2),
    "res_blocks": 1,
    "attention_downsampling": (2,),
    "resolution": 8,
}
_RESAMPLED = {**_SMALL, "scale_shift_norm": True, "resblock_updown": True}
_FOUR = {"in_channels": 4, "out_channels": 4, "head_channels": None}

# The networks of make_unet_ldm.py, by name.
CONFIGS = {
    "ldm4": UNetLDMConfig(**_SMALL, head_channels=16),
    "churches": UNetLDMConfig(**_RESAMPLED, **_FOUR, heads=8),
    "guided": UNetLDMConfig(**_RESAMPLED, out_channels=6, head_channels=16, num_classes=5),
    "text": UNetLDMConfig(**_SMALL, **_FOUR, heads=4, context_dim=24, context_length=7),
    "classes": UNetLDMConfig(**_SMALL, **_FOUR, heads=4, context_dim=24, num_classes=5),
}


@functools.cache
def stored() -> dict:
    with np.load(NETWORKS / "unet_ldm.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def meta() -> dict:
    return json.loads(str(stored()["meta"]))


@functools.cache
def published_shapes(name: str) -> dict:
    return parameter_shapes(PUBLISHED[name])


@functools.cache
def state_dict(name: str) -> dict[str, np.ndarray]:
    """The weights of a network under diffusers' names; with a class embedder, its table beside."""
    tensors = seeded.state_dict(meta()["manifests"][name])
    if name == "classes":
        key, config = "cond_stage_model.embedding.weight", CONFIGS[name]
        tensors[key] = seeded.tensor(key, (config.num_classes + 1, config.context_dim))
    return tensors


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.transpose(x, (0, 2, 3, 1))
