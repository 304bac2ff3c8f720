"""Random weights made from their names, so that a stored case needs only names and shapes.

One frozen legacy stream per name; sizes that keep activations near 1 in every network used here.
"""

import zlib

import numpy as np


def normal(key: str, shape, seed: int = 0) -> np.ndarray:
    """Standard normal numbers, float64, that depend on the name alone."""
    generator = np.random.RandomState((zlib.crc32(key.encode()) ^ seed) & 0xFFFFFFFF)
    return generator.standard_normal(int(np.prod(shape))).reshape(shape)


def tensor(key: str, shape, seed: int = 0) -> np.ndarray:
    """The weights of a torch network for one name of its state dict, float32."""
    if len(shape) == 0:
        return np.float32(2.0)
    z = normal(key, shape, seed)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "running_var":
        z = 0.5 + np.abs(z)
    elif leaf == "running_mean" or (len(shape) == 1 and leaf != "weight"):
        z = 0.1 * z
    elif len(shape) == 1:
        z = 1 + 0.2 * z
    elif "embedding" in key and len(shape) == 2:
        z = 0.5 * z
    else:
        gain = 1.3 if key.startswith(("Conv2d_", "Mixed_")) else 1.0
        gain = 2.0 if "q_proj." in key or "k_proj." in key else gain
        z = gain * z / np.sqrt(np.prod(shape[1:]))
    return z.astype(np.float32)


def state_dict(manifest: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """All tensors of a manifest {name: shape}."""
    return {key: tensor(key, tuple(shape), seed) for key, shape in manifest.items()}


def pictures(side):
    """Two smooth coloured pictures in about [-1, 1], [2, side, side, 3] float32."""
    x = np.linspace(0, 1, side)
    frequency = normal("frequency", (2, 3, 4, 2)) * 12
    phase = normal("phase", (2, 3, 4)) * 3
    waves = np.sin(
        frequency[..., 0, None, None] * x[:, None]
        + frequency[..., 1, None, None] * x[None, :]
        + phase[..., None, None]
    )
    return (waves.sum(2) / 4).transpose(0, 2, 3, 1).astype(np.float32)
