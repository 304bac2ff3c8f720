"""Images as CLIP wants them: the shortest edge resized bicubically, the centre, normalized channels."""

import numpy as np
from PIL import Image

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def preprocess(images: np.ndarray, size: int = 224) -> np.ndarray:
    """uint8 images [B, H, W, 1 or 3] -> float32 [B, size, size, 3] for the vision tower.

    As transformers' CLIP image processor on PIL does, resized by PIL in 8 bits.

    Raises ValueError for another dtype or shape.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"clip_images.preprocess takes uint8 images [B, H, W, 1 or 3], got {images.dtype} "
            f"{images.shape}."
        )
    images = np.broadcast_to(images, (*images.shape[:3], 3))
    out = [_resize_and_crop(np.ascontiguousarray(image), size) for image in images]
    pixels = np.stack(out).astype(np.float32) / np.float32(255)
    return (pixels - MEAN) / STD


def _resize_and_crop(image: np.ndarray, size: int) -> np.ndarray:
    height, width = image.shape[:2]
    short = min(height, width)
    height, width = int(size * height / short), int(size * width / short)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    return np.asarray(resized)[top : top + size, left : left + size]
