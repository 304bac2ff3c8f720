"""Labelled image sets as uint8 arrays in host memory; batches that depend on (seed, step) only.

Every source named here fits a host's memory, so a set is two numpy arrays and a batch is an index.
That makes a batch a pure function of the seed and the step: a run that was stopped and resumed
sees the same batches as one that was not, on any number of devices.

    tfds:NAME      a TensorFlow Datasets set prepared as array_record; read without TensorFlow
    idx:DIR        the four MNIST-style IDX files, gzipped or not
    npz:FILE       arrays images, labels; or encoded: jpeg (all bytes), offsets (N+1), labels
    folder:DIR     image files in one folder per class, or flat (then every label is 0)
    synthetic:N    N drawn shapes of ten classes, for smoke runs and tests; no file needed
    synthetic_rgb:N    the same in colour

A path may hold `{split}`, replaced by the split's name: `npz:/data/cifar10_{split}.npz`.
"""

import functools
import types
from typing import NamedTuple

import numpy as np

from qdiff_jax.data.readers import READERS, SPLITS


class Images(NamedTuple):
    """A labelled image set. images: uint8 [N, H, W, C]; labels: int32 [N] in [0, num_classes)."""

    images: np.ndarray
    labels: np.ndarray
    num_classes: int


def load_images(
    source: str,
    split: str = "train",
    *,
    pad_to: int | None = None,
    limit: int | None = None,
    num_classes: int | None = None,
) -> Images:
    """Reads one split of an image set into memory.

    Args:
      source: `kind:where`, see the module's docstring.
      split: "train" or "test". A folder or npz source that does not name its split holds one only
        and gives it for both names.
      pad_to: side length to centre smaller images in, with zeros around (28 -> 32 for IDX sets).
      limit: keep the first so many images.
      num_classes: how many classes there are; by default one more than the largest label.

    Returns:
      Images.

    Raises:
      ValueError: an unknown source or split; files that are missing, truncated or of the wrong
        shape.
    """
    kind, colon, where = source.partition(":")
    if not colon or kind not in READERS:
        raise ValueError(
            f"image source {source!r} is not known; write one of "
            + ", ".join(f"{k}:..." for k in READERS)
            + "."
        )
    if split not in SPLITS:
        raise ValueError(f"split {split!r} of {source!r} is not known; use one of {SPLITS}.")
    images, labels = READERS[kind](where.replace("{split}", split), split)
    if limit is not None:
        images, labels = images[:limit], labels[:limit]
    images = _check_images(images, labels, source)
    if pad_to is not None:
        images = pad_images(images, pad_to)
    found = int(labels.max()) + 1
    if labels.min() < 0 or (num_classes is not None and found > num_classes):
        raise ValueError(
            f"labels of {source!r} run from {labels.min()} to {labels.max()}, outside "
            f"[0, {num_classes or 'N'}); check num_classes or the label file."
        )
    return Images(images, labels.astype(np.int32), num_classes or found)


def pad_images(images: np.ndarray, size: int) -> np.ndarray:
    """Centres uint8 [N, H, W, C] in zeros of [N, size, size, C]; ValueError if it is larger."""
    height, width = images.shape[1:3]
    if height > size or width > size:
        raise ValueError(f"images of {height}x{width} cannot be padded to {size}x{size}.")
    top, left = (size - height) // 2, (size - width) // 2
    rows, columns = (top, size - height - top), (left, size - width - left)
    return np.pad(images, ((0, 0), rows, columns, (0, 0)))


def to_unit_range(images):
    """uint8 [...] in 0..255 to float32 in [-1, 1]; numpy or jax arrays."""
    return images.astype(np.float32) * (2.0 / 255.0) - 1.0


# float32 [...] nominally in [-1, 1] to the numbers that are cut to bytes: below 0 and above 255 clipped,
# the fraction dropped.
UINT8_RULES = types.MappingProxyType(
    {
        "round": lambda x: np.rint((x + 1.0) * np.float32(127.5)),
        "trunc_127.5": lambda x: (x + 1.0) * np.float32(127.5),
        "trunc_255": lambda x: np.clip((x + 1.0) * np.float32(0.5), 0.0, 1.0) * np.float32(255.0),
        "dit": lambda x: np.float32(127.5) * x + np.float32(128.0),
    }
)


def to_uint8(images, rule: str = "round") -> np.ndarray:
    """float [...] in [-1, 1] (clipped) to uint8, by the rule of a published code.

    - "round": to the nearest; the inverse of `to_unit_range`. diffusers, and the code of DDIM: its
      floor(255 (x + 1) / 2 + 1/2) differs where float32 rounds to a half, and nowhere else.
    - "trunc_127.5": (x + 1) 127.5 cut; the unconditional script of the latent diffusion code.
    - "trunc_255": clip((x + 1) / 2) 255 cut; its ImageNet script and Stable Diffusion's.
    - "dit": 127.5 x + 128 cut; DiT. Half a grey level brighter than the cuts above.

    Metrics see the difference: a published figure is measured on images of its own code's rule.
    Raises ValueError for an unknown rule.
    """
    if rule not in UINT8_RULES:
        raise ValueError(f"unknown rule to uint8 '{rule}'; the names are {list(UINT8_RULES)}.")
    scaled = UINT8_RULES[rule](np.asarray(images, np.float32))
    return np.clip(scaled, 0, 255).astype(np.uint8)


def batch_indices(seed: int, step: int, batch: int, size: int) -> np.ndarray:
    """Which images make up the batch of one step: int64 [batch], distinct within an epoch.

    Every epoch is a permutation drawn from (seed, epoch); the images that do not fill a last batch
    are left out of that epoch. Needs no history, hence resuming needs none.
    """
    per_epoch = size // batch
    if per_epoch == 0:
        raise ValueError(
            f"a batch of {batch} is larger than the set of {size} images; lower batch."
        )
    epoch, place = divmod(step, per_epoch)
    return _permutation(seed, epoch, size)[place * batch : (place + 1) * batch]


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def batches(data: Images, seed: int, start: int, count: int, batch: int) -> dict[str, np.ndarray]:
    """The batches of steps start .. start+count-1: {"image": uint8 [count, batch, H, W, C],
    "label": int32 [count, batch]}."""
    index = np.stack(
        [batch_indices(seed, start + i, batch, len(data.images)) for i in range(count)]
    )
    return {"image": data.images[index], "label": data.labels[index]}


def _check_images(images: np.ndarray, labels: np.ndarray, source: str) -> np.ndarray:
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"{source!r}: images are {images.dtype} {images.shape}, "
            "but must be uint8 [N, H, W, 1 or 3]."
        )
    if labels.shape != (len(images),) or len(images) == 0:
        raise ValueError(f"{source!r}: {len(images)} images but labels of shape {labels.shape}.")
    return images
