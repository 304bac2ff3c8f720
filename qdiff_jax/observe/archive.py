"""Recorded results on disk, arrays as npz and figures as JSON: whole or not at all."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from qdiff_jax.eval.files import write_atomic


def save_arrays(path: pathlib.Path, record: Any) -> None:
    """Write the fields of a dataclass of arrays (None fields are left out). Raises OSError (disk full)
    without leaving a file behind."""
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    buffer = io.BytesIO()
    np.savez(buffer, **{name: v for name, v in values.items() if v is not None})
    write_atomic(path, buffer.getvalue())


def load_arrays(path: pathlib.Path, kind: type, optional: Sequence[str] = ()) -> Any:
    """The record of that kind; fields named in `optional` may be absent, and are None then.

    Raises ValueError for a file that is missing, damaged or of another kind.
    """
    names = [f.name for f in dataclasses.fields(kind)]
    try:
        # Opened here, because np.load leaves a damaged file open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            odd = set(stored.files) ^ set(names)
            if odd - set(optional):
                raise ValueError(f"its fields {stored.files} are not those of {kind.__name__}")
            return kind(**{name: stored[name] if name in stored.files else None for name in names})
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(_damaged(path, error)) from error


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
