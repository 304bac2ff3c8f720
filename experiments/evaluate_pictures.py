"""Samples as PNG files: single ones as a model's own script saves them, and a contact sheet of them all."""

from __future__ import annotations

import io
import itertools
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from qdiff_jax.eval.files import write_atomic
from qdiff_jax.eval.shards import Shard

_COLUMNS = 8


def write_pictures(
    shards: Iterable[Shard], count: int, prompts: Sequence[str], workdir: pathlib.Path
) -> list[pathlib.Path]:
    """The first `count` samples as workdir/pictures/0000000.png, ..., pixel for pixel, and as
    workdir/contact_sheet.png; with prompts, pictures/prompts.txt has that of each, one a line.

    Returns the single files, none for a count of 0.
    """
    pairs = ((image, label) for shard in shards for image, label in zip(shard.images, shard.labels))
    shown = list(itertools.islice(pairs, count))
    if not shown:
        return []
    folder = workdir / "pictures"
    paths = [
        write_atomic(folder / f"{number:07d}.png", png(image))
        for number, (image, _) in enumerate(shown)
    ]
    write_atomic(workdir / "contact_sheet.png", png(contact_sheet([image for image, _ in shown])))
    if prompts:
        write_atomic(folder / "prompts.txt", "".join(f"{prompts[label]}\n" for _, label in shown))
    return paths


def contact_sheet(images: Sequence[np.ndarray], columns: int = _COLUMNS) -> np.ndarray:
    """Images uint8 [H, W, C] row by row on white, two pixels apart: uint8 [rows (H + 2) + 2, ..., C]."""
    height, width, channels = images[0].shape
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, channels), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = (
            2 + n * (side + 2) for n, side in zip(divmod(number, columns), (height, width))
        )
        sheet[top : top + height, left : left + width] = image
    return sheet


def png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 1 or 3] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()
