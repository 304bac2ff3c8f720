"""Recorded results on disk, arrays as npz and figures as JSON: whole or not at all."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qdiff_jax.eval.files import write_atomic


def save_arrays(path: pathlib.Path, record: Any) -> None:
    """Write the fields of a dataclass of arrays, or of dicts of arrays (None fields are left out). Raises
    OSError (disk full) without leaving a file behind."""
    values = {}
    for field in dataclasses.fields(record):
        held = getattr(record, field.name)
        if isinstance(held, Mapping):
            values |= {f"{field.name}/{key}": leaf for key, leaf in held.items()}
        elif held is not None:
            values[field.name] = held
    buffer = io.BytesIO()
    np.savez(buffer, **values)
    write_atomic(path, buffer.getvalue())


def load_arrays(path: pathlib.Path, kind: type, optional: Sequence[str] = ()) -> Any:
    """The record of that kind; fields named in `optional` may be absent, and are None then.

    Raises ValueError for a file that is missing, damaged or of another kind.
    """
    names = [f.name for f in dataclasses.fields(kind)]
    try:
        # Opened here, because np.load leaves a damaged file open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            odd = {name.partition("/")[0] for name in stored.files} ^ set(names)
            if odd - set(optional):
                raise ValueError(f"its fields {stored.files} are not those of {kind.__name__}")
            return kind(**{name: _field(stored, name) for name in names})
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(_damaged(path, error)) from error


def _field(stored: Any, name: str) -> Any:
    """An array, a dict of arrays, or None for a field that is not there."""
    if name in stored.files:
        return stored[name]
    parts = [key for key in stored.files if key.startswith(f"{name}/")]
    return {key.removeprefix(f"{name}/"): stored[key] for key in parts} or None


def save_record(path: pathlib.Path, record: dict) -> None:
    """Write a dict of JSON values. Raises OSError (disk full) without leaving a file behind."""
    write_atomic(path, json.dumps(record, indent=1))


def load_record(path: pathlib.Path) -> dict:
    """What `save_record` wrote. Raises ValueError for a file that is damaged."""
    try:
        record = json.loads(path.read_text("utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it holds no record")
        return record
    except (OSError, ValueError) as error:
        raise ValueError(_damaged(path, error)) from error


def _damaged(path: pathlib.Path, error: Exception) -> str:
    return f"{path} is damaged ({error}); delete it and run again: it will be made anew."
