"""Random weights of the reference case of the DDPM U-Net, and the layouts of PyTorch as ours."""

import zlib

import numpy as np


def our_layout(tensor: np.ndarray, ndim: int) -> np.ndarray:
    """OIHW -> HWIO, [out, in] -> [in, out]; 1x1 convolutions of attention -> dense [in, out]."""
    if tensor.ndim == 4 and ndim == 2:
        tensor = tensor[:, :, 0, 0]
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def seeded(key: str, shape, seed: int) -> np.ndarray:
    """The random tensor that the reference was given for this key: one legacy stream per name."""
    generator = np.random.RandomState((zlib.crc32(key.encode()) ^ seed) & 0xFFFFFFFF)
    z = generator.standard_normal(int(np.prod(shape))).reshape(shape)
    if len(shape) > 1:
        return (z / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return (1 + 0.2 * z if key.endswith("weight") else 0.1 * z).astype(np.float32)
