"""The storages of a PyTorch checkpoint: their dtypes, their values, and tensors left in the file.

Format: torch/_utils.py and torch/serialization.py of PyTorch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# bfloat16 has no NumPy type: its 16 bits are the upper half of a float32.
_BFLOAT16 = "bfloat16"
DTYPES = {
    "float64": "f8",
    "float32": "f4",
    "float16": "f2",
    "bfloat16": "u2",
    "int64": "i8",
    "int32": "i4",
    "int16": "i2",
    "int8": "i1",
    "uint8": "u1",
    "uint16": "u2",
    "uint32": "u4",
    "uint64": "u8",
    "bool": "?",
    "complex64": "c8",
    "complex128": "c16",
}
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}


class NotRead(ValueError):
    """What the file holds is whole, and of a kind that this reader does not read."""


class Dtype(NamedTuple):
    """A torch dtype by name; also the class of its storage."""

    name: str


class Later(NamedTuple):
    """Values [count] that are read when asked for, anew each time."""

    count: int
    read: Callable[[], np.ndarray]


class Storage(NamedTuple):
    """The values of one storage; None on the pass that only lists what the file holds."""

    dtype: str
    values: np.ndarray | Later | None


class Deferred(NamedTuple):
    """A tensor that `read` reads from its file, anew each time. dtype: torch's name of it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def storage_values(raw: bytes, dtype: str, order: str) -> np.ndarray:
    """The numbers of a storage, [N], in this machine's byte order."""
    kind = np.dtype(DTYPES[dtype])
    values = np.frombuffer(raw, kind.newbyteorder("<" if order == "little" else ">"))
    values = values.astype(kind, copy=False)
    if dtype == _BFLOAT16:
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values


def storage_entry(pid) -> tuple[str, str, int]:
    """(dtype, key, length) of ("storage", class, key, location, length, ...)."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise ValueError(f"{pid!r} is no reference to a storage")
    _, storage, key, _, count = pid[:5]
    if not isinstance(storage, Dtype):
        raise NotRead(
            f"storages of {getattr(storage, 'path', storage)} are not supported; save it as float32"
        )
    return storage.name, key, count
