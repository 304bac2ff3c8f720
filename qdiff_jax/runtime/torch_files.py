"""Checkpoints of PyTorch as NumPy arrays: no torch, and nothing in the file is run.

A checkpoint is a pickle with the tensors' bytes beside it, in one of two containers: a zip archive
(since 1.6) or a sequence of pickles followed by the raw storages.

Format: torch/serialization.py of PyTorch 2.13 (`_save`, `_legacy_save`).
"""

from __future__ import annotations

import io
import pathlib
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from qdiff_jax.runtime.not_weights import refuse_other_files
from qdiff_jax.runtime.torch_pickle import unpickle
from qdiff_jax.runtime.torch_storages import (
    DTYPES,
    Later,
    NotRead,
    Storage,
    storage_entry,
    storage_values,
)

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def load_torch(path, later: bool = False) -> Any:
    """Reads a file written by `torch.save`.

    Tensors and parameters become read-only NumPy arrays on the same values: bfloat16 as float32, any
    other dtype as it is. Dicts are `dict` or `OrderedDict`, lists, tuples, sets and scalars are Python's;
    objects of other classes (an optimizer's, a training framework's) are `Unknown`.

    Args:
      later: leave every tensor in the file, as a `torch_pickle.Deferred` to be read one at a time.

    Raises:
      ValueError: there is no such file; it is truncated, no checkpoint at all, or of a kind that this
        reader does not read (TorchScript, the tar format before 0.1.10, sparse or quantized storages).
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint file {path}; check the path.")
    with open(path, "rb") as file:
        head = file.read(512)
    refuse_other_files(head, path)
    if is_safetensors(head):
        raise ValueError(
            f"{path} is a safetensors file, not a checkpoint of torch; read it with "
            "runtime.state_dicts.load_state_dict."
        )
    try:
        read = _read_zip if head.startswith(b"PK\x03\x04") else _read_legacy
        return read(path, later)
    except NotRead as error:
        raise ValueError(f"{path} is not read here: {error}.") from error
    except _UNPICKLING_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a torch checkpoint ({reason}); if it is damaged or truncated, "
            "download or copy it again."
        ) from error


# What the pickle machine and the array constructors raise on a broken or hostile file.
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,  # a place before the file's beginning
    RuntimeError,  # zipfile's, for features that it does not have
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins so is safetensors: 8 bytes of length, then a header that is a JSON object.

    Nothing that torch writes has a brace there.
    """
    return head[8:9] == b"{"


def is_torch(head: bytes) -> bool:
    """Whether a file that begins so is one of `torch.save`'s, in either container."""
    magic = _LEGACY_MAGIC.to_bytes(10, "little")
    return head.startswith(b"PK\x03\x04") or magic in head[:32]


def _read_zip(path: pathlib.Path, later: bool) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        root = names[0].split("/", 1)[0] if names else ""
        if f"{root}/constants.pkl" in names:
            raise NotRead(
                "it is a TorchScript archive, not a state dict; save the state dict of the loaded module"
            )
        if f"{root}/data.pkl" not in names:
            shown = ", ".join(names[:3]) or "nothing"
            raise NotRead(
                f"it is an archive of files ({shown}), not a checkpoint: unpack it and give the file "
                "inside or, if it was a checkpoint, download it again"
            )
        order = "little"
        if f"{root}/byteorder" in names:
            order = _stored(archive, f"{root}/byteorder").decode("ascii")
        cache: dict[str, Storage] = {}

        def storage(pid) -> Storage:
            dtype, key, count = storage_entry(pid)
            if key not in cache:
                item = np.dtype(DTYPES[dtype]).itemsize
                info = archive.getinfo(f"{root}/data/{key}")
                # Before reading: a small compressed entry may claim any size.
                if info.file_size != count * item:
                    raise ValueError(
                        f"storage {key} has {info.file_size} bytes where {count} x {dtype} belong"
                    )
                if later:
                    read = _entry_reader(path, archive, info, dtype, order)
                    cache[key] = Storage(dtype, Later(count, read))
                else:
                    cache[key] = Storage(
                        dtype, storage_values(_stored(archive, info), dtype, order)
                    )
            if cache[key].dtype != dtype:
                raise ValueError(f"storage {key} is both {cache[key].dtype} and {dtype}")
            return cache[key]

        return unpickle(io.BytesIO(_stored(archive, f"{root}/data.pkl")), storage)


def _stored(archive: zipfile.ZipFile, entry: str | zipfile.ZipInfo) -> bytes:
    info = archive.getinfo(entry) if isinstance(entry, str) else entry
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed, which torch.save does not do")
    return archive.read(info)


def _entry_reader(
    path: pathlib.Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, dtype: str, order: str
) -> Callable[[], np.ndarray]:
    """Reads one storage without the archive's directory, whose parsing for each tensor would take longer
    than the tensors."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed, which torch.save does not do")
    header = 30  # bytes, of which the last four are the lengths of the name and of the extra field
    archive.fp.seek(info.header_offset)
    local = archive.fp.read(header)
    if len(local) < header or not local.startswith(b"PK\x03\x04"):
        raise ValueError(f"{info.filename} is not where the archive says")
    lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    start = info.header_offset + header + lengths

    def read() -> np.ndarray:
        raw = _bytes_at(path, start, info.file_size)
        if zlib.crc32(raw) != info.CRC:
            raise ValueError(
                f"{path} is damaged in {info.filename} (wrong checksum); download or copy it again."
            )
        return storage_values(raw, dtype, order)

    return read


def _bytes_at(path: pathlib.Path, start: int, length: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        raw = file.read(length)
    if len(raw) < length:
        raise ValueError(
            f"{path} ends {length - len(raw)} bytes too early; it is damaged or was changed meanwhile: "
            "download or copy it again."
        )
    return raw


def _read_legacy(path: pathlib.Path, later: bool) -> Any:
    """The storages come after the object: one pass finds which, the second builds with them."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if unpickle(file, _no_storage) != _LEGACY_MAGIC:
            raise ValueError("it does not begin as one")
        if unpickle(file, _no_storage) != _LEGACY_PROTOCOL:
            raise ValueError("unknown protocol")
        system = unpickle(file, _no_storage)
        order = "little" if system["little_endian"] else "big"
        start = file.tell()

        entries: dict[str, str] = {}

        def listed(pid) -> Storage:
            dtype, key, _ = storage_entry(pid)
            entries[key] = dtype
            return Storage(dtype, None)

        unpickle(file, listed)
        stored: dict[str, np.ndarray | Later] = {}
        for key in unpickle(file, _no_storage):
            header = file.read(8)
            count = int.from_bytes(header, order, signed=True)
            wanted = count * np.dtype(DTYPES[entries[key]]).itemsize
            if len(header) < 8 or not 0 <= wanted <= size - file.tell():
                raise ValueError(f"the file ends within storage {key}")
            if later:
                stored[key] = Later(
                    count, _range_reader(path, file.tell(), wanted, entries[key], order)
                )
                file.seek(wanted, io.SEEK_CUR)
            else:
                stored[key] = storage_values(file.read(wanted), entries[key], order)

        def storage(pid) -> Storage:
            dtype, key, _ = storage_entry(pid)
            if dtype != entries[key]:
                raise ValueError(f"storage {key} is both {entries[key]} and {dtype}")
            values = stored[key]
            # A storage may be a window of another: (its key, offset, length).
            if len(pid) > 5 and pid[5] is not None:
                _, offset, length = pid[5]
                count = values.count if later else len(values)
                if not 0 <= offset <= offset + length <= count:
                    raise ValueError(f"a window reaches beyond storage {key}")
                values = _window(values, offset, length)
            return Storage(dtype, values)

        file.seek(start)
        return unpickle(file, storage)


def _range_reader(
    path: pathlib.Path, start: int, length: int, dtype: str, order: str
) -> Callable[[], np.ndarray]:
    return lambda: storage_values(_bytes_at(path, start, length), dtype, order)


def _window(values: np.ndarray | Later, offset: int, length: int) -> np.ndarray | Later:
    if isinstance(values, Later):
        return Later(length, lambda: values.read()[offset : offset + length])
    return values[offset : offset + length]


def _no_storage(pid):
    raise ValueError("a storage where none belongs")
