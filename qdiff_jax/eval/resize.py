"""Resizing images for a feature network, by each published tool's own rule, under jit.

Every rule is linear and separable: a matrix [out, in] for the rows and one for the columns. They differ in
where a target pixel looks and how far, which is worth whole points of FID (Parmar et al. 2022,
arXiv:2104.11222):

    tf1_bilinear      src = dst * in/out, two neighbours, no half-pixel shift    (torch-fidelity, ADM)
    bilinear          src = (dst + 1/2) * in/out - 1/2, two neighbours           (pytorch-fid)
    bilinear_smooth   triangle as wide as the ratio when shrinking               (torchmetrics)
    bicubic_smooth    Keys' cubic, a = -1/2, as wide as the ratio when shrinking (clean-fid, PIL)

The two cropping rules at the end are of data preparation and keep PIL's own uint8 arithmetic.
"""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

RULES = ("tf1_bilinear", "bilinear", "bilinear_smooth", "bicubic_smooth")
CROPS = ("lsun", "adm")


@lru_cache(maxsize=32)
def resize_matrix(size_in: int, size_out: int, rule: str) -> np.ndarray:
    """[size_out, size_in] float32, rows summing to 1: one axis of the resize.

    Raises ValueError for a size that is not positive or an unknown rule.
    """
    if min(size_in, size_out) < 1:
        raise ValueError(f"resize needs positive sizes, got {size_in} to {size_out}.")
    if rule in ("tf1_bilinear", "bilinear"):
        matrix = _two_neighbours(size_in, size_out, rule == "bilinear")
    elif rule in ("bilinear_smooth", "bicubic_smooth"):
        matrix = _smooth(size_in, size_out, rule == "bicubic_smooth")
    else:
        raise ValueError(f"resize rule {rule!r} is not known; use one of {RULES}.")
    matrix.setflags(write=False)
    return matrix


def _two_neighbours(size_in: int, size_out: int, half_pixel: bool) -> np.ndarray:
    # Positions in float32: at whole-number sources the tools' rounding decides the neighbour.
    scale = np.float32(size_in / size_out)
    target = np.arange(size_out, dtype=np.float32)
    source = (target + np.float32(0.5)) * scale - np.float32(0.5) if half_pixel else target * scale
    source = np.maximum(source, np.float32(0))
    low = np.minimum(source.astype(np.int64), size_in - 1)
    high = np.minimum(low + 1, size_in - 1)
    share = source - low.astype(np.float32)
    matrix = np.zeros((size_out, size_in), np.float32)
    rows = np.arange(size_out)
    np.add.at(matrix, (rows, low), np.float32(1) - share)
    np.add.at(matrix, (rows, high), share)
    return matrix


def _smooth(size_in: int, size_out: int, cubic: bool) -> np.ndarray:
    """PIL's ImagingResample: the kernel stretched by the ratio, cut at the border and renormalized."""
    ratio = size_in / size_out
    stretch = max(ratio, 1.0)
    support = (2.0 if cubic else 1.0) * stretch
    matrix = np.zeros((size_out, size_in), np.float64)
    for row in range(size_out):
        centre = (row + 0.5) * ratio
        first = max(int(centre - support + 0.5), 0)
        last = min(int(centre + support + 0.5), size_in)
        place = (np.arange(first, last) - centre + 0.5) / stretch
        weights = _keys(place) if cubic else np.maximum(1.0 - abs(place), 0.0)
        matrix[row, first:last] = weights / weights.sum()
    return matrix.astype(np.float32)


def _keys(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -1/2."""
    a, x = -0.5, abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = a * (((x - 5.0) * x + 8.0) * x - 4.0)
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


@partial(jax.jit, static_argnames=("size", "rule"))
def resize(images: jax.Array, size: int, rule: str) -> jax.Array:
    """float32 [B, size, size, C] from images [B, H, W, C] of any real dtype, in the same range.

    The cubic may leave the range by an overshoot; the caller clips where its tool does.

    Raises ValueError for another rank or an unknown rule.
    """
    if images.ndim != 4:
        raise ValueError(f"resize takes images [B, H, W, C], got {images.shape}.")
    rows, columns = (jnp.asarray(resize_matrix(n, size, rule)) for n in images.shape[1:3])
    exact = jax.lax.Precision.HIGHEST
    x = images.astype(jnp.float32)
    x = jnp.einsum("pw,bhwc->bhpc", columns, x, precision=exact)
    return jnp.einsum("qh,bhpc->bqpc", rows, x, precision=exact)


def crop_resize(image: np.ndarray, size: int, rule: str = "lsun") -> np.ndarray:
    """One data set image as uint8 [size, size, C], as the data of a published model was prepared.

    Args:
      image: uint8 [H, W, C], C 1 or 3.
      size: side of the result.
      rule: "lsun" cuts the central square and resizes it with PIL's bicubic (latent diffusion's loader of
        LSUN); "adm" halves with a box filter while the image is at least twice as large, resizes the shorter
        side with bicubic and cuts the centre (guided diffusion's loader of ImageNet).

    Raises ValueError for another dtype, rank or rule.
    """
    from PIL import Image

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise ValueError(
            f"crop_resize takes a uint8 image [H, W, 1 or 3], got {image.dtype} {image.shape}."
        )
    if rule not in CROPS:
        raise ValueError(f"crop rule {rule!r} is not known; use one of {CROPS}.")
    grey = image.shape[-1] == 1
    if rule == "lsun":
        side = min(image.shape[:2])
        top, left = ((n - side) // 2 for n in image.shape[:2])
        square = image[top : top + side, left : left + side]
        picture = Image.fromarray(square[..., 0] if grey else square)
        result = np.asarray(picture.resize((size, size), resample=Image.Resampling.BICUBIC))
    else:
        picture = Image.fromarray(image[..., 0] if grey else image)
        while min(picture.size) >= 2 * size:
            halved = tuple(n // 2 for n in picture.size)
            picture = picture.resize(halved, resample=Image.Resampling.BOX)
        scale = size / min(picture.size)
        scaled = tuple(round(n * scale) for n in picture.size)
        result = np.asarray(picture.resize(scaled, resample=Image.Resampling.BICUBIC))
        top, left = ((n - size) // 2 for n in result.shape[:2])
        result = result[top : top + size, left : left + size]
    return result[..., None] if grey else result
