"""The kinds of image sources, each read whole into host memory: see `data.images` for how they are named.

Every reader takes (where, split) and returns (images, labels); a missing, truncated or foreign file is a
ValueError that says which and what to do.
"""

import gzip
import io
import pathlib
import struct
import zipfile
import zlib

import numpy as np

SPLITS = ("train", "test")
_IDX_NAMES = {"train": "train", "test": "t10k"}
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def _read_idx(where: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    stem = _IDX_NAMES[split]
    images = _idx_array(pathlib.Path(where), f"{stem}-images-idx3-ubyte", 3)
    labels = _idx_array(pathlib.Path(where), f"{stem}-labels-idx1-ubyte", 1)
    return images[..., None], labels


def _idx_array(folder: pathlib.Path, name: str, rank: int) -> np.ndarray:
    """One IDX file: big-endian magic 0x0000 08 rank, one uint32 per dimension, then the bytes."""
    plain, zipped = folder / name, folder / f"{name}.gz"
    if plain.exists():
        path, raw = plain, plain.read_bytes()
    elif zipped.exists():
        path = zipped
        try:
            raw = gzip.decompress(zipped.read_bytes())
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{zipped} is truncated or no gzip file; fetch it again.") from error
    else:
        raise ValueError(f"{folder} holds neither {name} nor {name}.gz; put the IDX files there.")
    head = 4 + 4 * rank
    if len(raw) < head or raw[:4] != bytes((0, 0, 8, rank)):
        raise ValueError(f"{path} is not an IDX file of unsigned bytes with {rank} dimensions.")
    shape = struct.unpack(f">{rank}I", raw[4:head])
    if len(raw) - head != np.prod(shape, dtype=np.int64):
        raise ValueError(
            f"{path} announces {shape} but holds {len(raw) - head} bytes; fetch it again."
        )
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)


def _read_npz(where: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    path = pathlib.Path(where)
    if not path.exists():
        raise ValueError(
            f"there is no image file {path}; write npz:FILE, with {{split}} if it has one."
        )
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (EOFError, OSError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated or no npz archive; fetch it again.") from error
    if {"images", "labels"} <= arrays.keys():
        return arrays["images"], arrays["labels"]
    if {"jpeg", "offsets", "labels"} <= arrays.keys():
        return _decode_all(arrays["jpeg"], arrays["offsets"], path), arrays["labels"]
    raise ValueError(
        f"{path} holds {sorted(arrays)}; it needs images and labels, or jpeg, offsets and labels."
    )


def _decode_all(encoded: np.ndarray, offsets: np.ndarray, path: pathlib.Path) -> np.ndarray:
    whole = (
        offsets.ndim == 1
        and len(offsets) > 1
        and offsets[0] == 0
        and np.all(np.diff(offsets) > 0)
        and offsets[-1] == len(encoded)
    )
    if not whole:
        raise ValueError(f"{path}: offsets must rise from 0 to the {len(encoded)} bytes of jpeg.")
    data = encoded.tobytes()
    return _stack(
        (data[a:b], f"{path} image {i}")
        for i, (a, b) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist()))
    )


def _stack(encoded) -> np.ndarray:
    """Decodes (bytes, name) pairs to uint8 [N, H, W, C]; all must share one size and mode."""
    from PIL import Image, UnidentifiedImageError

    decoded = []
    for data, name in encoded:
        try:
            image = Image.open(io.BytesIO(data))
            array = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{name} cannot be decoded; it is damaged.") from error
        array = array[..., None] if array.ndim == 2 else array
        if decoded and array.shape != decoded[0].shape:
            raise ValueError(
                f"{name} is {array.shape}, the first image is {decoded[0].shape}; "
                "resize them to one size first."
            )
        decoded.append(array)
    return np.stack(decoded)


def _read_folder(where: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    root = pathlib.Path(where)
    if (root / split).is_dir():
        root = root / split
    if not root.is_dir():
        raise ValueError(f"there is no image folder {root}.")
    classes = sorted(p for p in root.iterdir() if p.is_dir())
    found = [(path, label) for label, folder in enumerate(classes) for path in _image_files(folder)]
    found = found or [(path, 0) for path in _image_files(root)]
    if not found:
        raise ValueError(
            f"{root} holds no image ({', '.join(_IMAGE_SUFFIXES)}), not even in folders."
        )
    images = _stack((path.read_bytes(), str(path)) for path, _ in found)
    return images, np.array([label for _, label in found], np.int32)


def _image_files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES)


def _read_tfds(where: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    import tensorflow_datasets as tfds

    remedy = (
        "prepare it once where TensorFlow is installed: "
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{where}', file_format='array_record').download_and_prepare()\" "
        "and copy the folder, or use an idx:, npz: or folder: source."
    )
    try:
        builder = tfds.builder(where, file_format="array_record")
        records = builder.as_data_source(split=split)
    except Exception as error:  # tfds raises its own types, by version
        raise ValueError(
            f"the TFDS set {where!r} is not prepared as array_record; {remedy}"
        ) from error
    examples = [(r["image"], r["label"]) for r in records]
    return np.stack([e[0] for e in examples]), np.array([e[1] for e in examples])


def _read_synthetic(where: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Ten shapes (five filled, five hollow) at random places and brightness, 32x32 grey."""
    if not where.isdigit() or int(where) == 0:
        raise ValueError(
            f"synthetic:{where} must name how many images to draw, as in synthetic:512."
        )
    count = int(where)
    rng = np.random.default_rng(SPLITS.index(split))
    labels = np.arange(count) % 10
    centre = rng.uniform(11, 20, (count, 2, 1, 1))
    radius = rng.uniform(6, 10, (count, 1, 1))
    grid = np.arange(32.0)
    y = np.abs(grid[None, :, None] - centre[:, 0])
    x = np.abs(grid[None, None, :] - centre[:, 1])
    y, x = np.broadcast_arrays(y, x)
    distances = np.stack(
        [np.hypot(x, y), np.maximum(x, y), x + y, np.maximum(x, 3 * y), np.maximum(3 * x, y)]
    )
    distance = distances[labels % 5, np.arange(count)] / radius
    inside = (distance < 1) & ((labels < 5)[:, None, None] | (distance > 0.6))
    brightness = rng.integers(128, 256, (count, 1, 1))
    return (inside * brightness).astype(np.uint8)[..., None], labels


def _read_synthetic_rgb(where: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The same shapes in red, green, blue and what lies between."""
    images, labels = _read_synthetic(where, split)
    tint = np.random.default_rng(2 + SPLITS.index(split)).uniform(0.2, 1.0, (len(images), 1, 1, 3))
    return (images * tint).astype(np.uint8), labels


# kind -> (where, split) -> (images, labels), neither checked yet.
READERS = {
    "tfds": _read_tfds,
    "idx": _read_idx,
    "npz": _read_npz,
    "folder": _read_folder,
    "synthetic": _read_synthetic,
    "synthetic_rgb": _read_synthetic_rgb,
}
