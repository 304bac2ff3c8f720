"""Real images as a stream, prepared as the data of the published model were.

Sets that a model was trained on are cropped and resized by their own loader first (the LSUN loader's
central square and PIL's bicubic); leaving that out moves FID by ten points. So the images of a folder or a
TFDS set may have any size here, and the crop is part of the source. Those two are decoded one by one; the
other kinds are arrays and are read whole.
"""

import hashlib
import pathlib
from collections.abc import Iterator

import numpy as np

from qdiff_jax.data.images import load_images, pad_images
from qdiff_jax.eval.resize import CROPS, crop_resize

# What may be done to an image before a network sees it: the two cropping rules, or zeros around it.
PREPARATIONS = (*CROPS, "pad")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def image_stream(
    source: str,
    split: str = "train",
    *,
    crop: str | None = None,
    size: int | None = None,
    limit: int | None = None,
    batch: int = 64,
) -> Iterator[np.ndarray]:
    """Batches uint8 [b, H, W, C] of a set: `labelled_stream` without the labels, which raises what it does."""
    stream = labelled_stream(source, split, crop=crop, size=size, limit=limit, batch=batch)
    return (images for images, _ in stream)


def labelled_stream(
    source: str,
    split: str = "train",
    *,
    crop: str | None = None,
    size: int | None = None,
    limit: int | None = None,
    batch: int = 64,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of a set in a fixed order: images uint8 [b, H, W, C] and labels int32 [b], -1 where unknown.

    Args:
      source: as in `data.images.load_images`; also `npz:FILE` with ADM's `arr_0`, and a folder or a TFDS
        set of images of any size if `crop` is given.
      split: "train" or "test", in place of `{split}` in a path.
      crop: None, "lsun" or "adm" (see `resize.crop_resize`), to `size`; or "pad": centred in zeros.
      size: side after the crop; given with `crop` and only with it.
      limit: the first so many images.
      batch: images a batch.

    Raises ValueError for an unknown crop, a missing set, or images of different sizes without a crop.
    """
    if (crop is None) != (size is None):
        raise ValueError(f"crop and size go together: got crop={crop!r} and size={size}.")
    if crop is not None and crop not in PREPARATIONS:
        raise ValueError(f"crop rule {crop!r} is not known; use one of {PREPARATIONS}.")
    held, labels = [], []
    for index, (image, label) in enumerate(_images(source, split)):
        if limit is not None and index >= limit:
            break
        held.append(_prepared(image, crop, size))
        labels.append(label)
        if held[-1].shape != held[0].shape:
            raise ValueError(
                f"image {index} of {source!r} is {held[-1].shape}, an earlier one {held[0].shape}; "
                "give a crop and a size."
            )
        if len(held) == batch:
            yield np.stack(held), np.array(labels, np.int32)
            held, labels = [], []
    if held:
        yield np.stack(held), np.array(labels, np.int32)


def _prepared(image: np.ndarray, crop: str | None, size: int | None) -> np.ndarray:
    if crop is None:
        return image
    return pad_images(image[None], size)[0] if crop == "pad" else crop_resize(image, size, crop)


def source_fingerprint(source: str, split: str = "train") -> str:
    """16 hex digits of what the source holds: file contents, or names, sizes and times of a folder.

    A TFDS set is known by its full name with its version, a synthetic one by its own.
    """
    kind, _, where = source.partition(":")
    path = pathlib.Path(where.replace("{split}", split))
    digest = hashlib.sha256(f"{source} {split}".encode())
    if kind == "npz" and path.is_file():
        _add_file(digest, path)
    elif kind == "idx" and path.is_dir():
        for file in sorted(path.glob("*ubyte*")):
            _add_file(digest, file)
    elif kind == "folder" and path.is_dir():
        for file in _files(path, split):
            state = file.stat()
            digest.update(f"{file} {state.st_size} {state.st_mtime_ns}".encode())
    elif kind == "tfds":
        import tensorflow_datasets as tfds

        digest.update(str(tfds.builder(where, file_format="array_record").info.full_name).encode())
    return digest.hexdigest()[:16]


def _add_file(digest, path: pathlib.Path) -> None:
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)


def _images(source: str, split: str) -> Iterator[tuple[np.ndarray, int]]:
    kind, _, where = source.partition(":")
    if kind == "folder":
        yield from _folder(pathlib.Path(where.replace("{split}", split)), split)
    elif kind == "npz" and (array := _arr_0(where.replace("{split}", split))) is not None:
        yield from ((image, -1) for image in array)
    elif kind == "tfds":
        yield from _tfds(where, split)
    else:
        loaded = load_images(source, split)
        yield from zip(loaded.images, loaded.labels.tolist())


def _folder(root: pathlib.Path, split: str) -> Iterator[tuple[np.ndarray, int]]:
    from PIL import Image, UnidentifiedImageError

    files = _files(root, split)
    root = root / split if (root / split).is_dir() else root
    # As the training data count them: the folders by name, empty ones too.
    classes = {p.name: k for k, p in enumerate(sorted(p for p in root.iterdir() if p.is_dir()))}
    for path in files:
        try:
            with Image.open(path) as image:
                array = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{path} cannot be decoded; it is damaged.") from error
        label = classes.get(path.relative_to(root).parts[0], -1)
        yield array[..., None] if array.ndim == 2 else array, label


def _files(root: pathlib.Path, split: str) -> list[pathlib.Path]:
    root = root / split if (root / split).is_dir() else root
    files = [p for p in root.rglob("*") if p.suffix.lower() in _SUFFIXES] if root.is_dir() else []
    if not files:
        raise ValueError(f"{root} holds no image ({', '.join(_SUFFIXES)}); check the path.")
    return sorted(files)


def _arr_0(where: str) -> np.ndarray | None:
    """ADM's layout, or None for the layouts that `load_images` reads (and explains)."""
    try:
        with open(where, "rb") as file, np.load(file, allow_pickle=False) as archive:
            array = archive["arr_0"] if "arr_0" in archive.files else None
    except (OSError, ValueError, EOFError):
        return None
    if array is not None and (array.dtype != np.uint8 or array.ndim != 4):
        raise ValueError(
            f"{where}: arr_0 is {array.dtype} {array.shape}, but must be uint8 [N, H, W, C]."
        )
    return array


def _tfds(where: str, split: str) -> Iterator[tuple[np.ndarray, int]]:
    import tensorflow_datasets as tfds

    try:
        records = tfds.builder(where, file_format="array_record").as_data_source(split=split)
    except Exception as error:  # tfds raises its own types, by version
        raise ValueError(
            f"the TFDS set {where!r} is not prepared as array_record; download_and_prepare it with "
            "file_format='array_record' where TensorFlow is installed, or use a folder: source."
        ) from error
    for record in records:
        image = np.asarray(record["image"])
        yield image[..., None] if image.ndim == 2 else image, int(record.get("label", -1))
