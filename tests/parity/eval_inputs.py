"""Inputs of the cases in `cases/eval_tools.npz`, made alike by the script that ran the tools and the tests.

Numpy only. `RandomState` is used because its streams are frozen by numpy's compatibility policy.
"""

import numpy as np

SIZES = (32, 96, 320)  # far up, up, and down (where antialiasing matters) to 299
PICKED = (slice(None), slice(None, None, 23), slice(None, None, 29))  # the pixels that are stored


def images(size: int, count: int = 2) -> np.ndarray:
    """uint8 [count, size, size, 3]: a smooth wave with a rough integer pattern on it."""
    n, y, x, c = np.meshgrid(
        np.arange(count), np.arange(size), np.arange(size), np.arange(3), indexing="ij"
    )
    smooth = 90.0 * np.sin(6.0 * y / size + c) * np.cos(9.0 * x / size - n)
    rough = (37 * x * x + 91 * y + 53 * x * y + 17 * c + 29 * n) % 128
    return np.clip(np.rint(64.0 + smooth + rough), 0, 255).astype(np.uint8)


def features(seed: int, count: int, dim: int = 24) -> np.ndarray:
    """float32 [count, dim], not negative and of unequal spread, as pooled features are."""
    rng = np.random.RandomState(seed)
    mix = np.random.RandomState(7).randn(dim, dim) / np.sqrt(dim)
    return np.abs(0.4 + 0.3 * rng.randn(count, dim) @ mix).astype(np.float32)


def logits(count: int = 103, classes: int = 13) -> np.ndarray:
    return (2.5 * np.random.RandomState(3).randn(count, classes)).astype(np.float32)


# (out, in, kernel) of torchvision's convolutions by their index in `features`.
TRUNKS = {
    "alex": {
        0: (64, 3, 11),
        3: (192, 64, 5),
        6: (384, 192, 3),
        8: (256, 384, 3),
        10: (256, 256, 3),
    },
    "vgg": {
        0: (64, 3, 3),
        2: (64, 64, 3),
        5: (128, 64, 3),
        7: (128, 128, 3),
        10: (256, 128, 3),
        12: (256, 256, 3),
        14: (256, 256, 3),
        17: (512, 256, 3),
        19: (512, 512, 3),
        21: (512, 512, 3),
        24: (512, 512, 3),
        26: (512, 512, 3),
        28: (512, 512, 3),
    },
}
LIN_CHANNELS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}


def lpips_weights(net: str) -> tuple[dict, dict]:
    """(trunk state dict, linear state dict) in torchvision's and lpips' names, OIHW float32."""
    trunk, lin = {}, {}
    for index, (out, into, kernel) in TRUNKS[net].items():
        rng = np.random.RandomState(100 + index)
        spread = np.sqrt(2.0 / (into * kernel * kernel))
        weight = spread * rng.standard_normal((out, into, kernel, kernel))
        trunk[f"features.{index}.weight"] = weight.astype(np.float32)
        trunk[f"features.{index}.bias"] = (0.1 * rng.standard_normal(out)).astype(np.float32)
    for level, channels in enumerate(LIN_CHANNELS[net]):
        weight = np.random.RandomState(200 + level).uniform(0, 1, (1, channels, 1, 1))
        lin[f"lin{level}.model.1.weight"] = weight.astype(np.float32)
    return trunk, lin


def lpips_pair() -> tuple[np.ndarray, np.ndarray]:
    """Two float32 [2, 64, 64, 3] in [-1, 1]."""
    first = images(64).astype(np.float32) / 127.5 - 1.0
    noise = 0.2 * np.random.RandomState(5).standard_normal(first.shape)
    return first, np.clip(first + noise, -1, 1).astype(np.float32)
