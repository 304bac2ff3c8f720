"""Recorded arrays on disk: one npz per record, whole or not at all."""

from __future__ import annotations

import dataclasses
import io
import pathlib
import zipfile
from typing import Any

import numpy as np

from qdiff_jax.eval.files import write_atomic


def save_arrays(path: pathlib.Path, record: Any) -> None:
    """Write the fields of a dataclass of arrays (None fields are left out). Raises OSError (disk full)
    without leaving a file behind."""
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    buffer = io.BytesIO()
    np.savez(buffer, **{name: v for name, v in values.items() if v is not None})
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error}); free some space and run the same command again."
        ) from error


def load_arrays(path: pathlib.Path, kind: type) -> Any:
    """The record of that kind. Raises ValueError for a file that is damaged or of another kind."""
    names = [f.name for f in dataclasses.fields(kind)]
    try:
        with np.load(path, allow_pickle=False) as stored:
            if not set(stored.files) <= set(names):
                raise ValueError(f"fields {stored.files} are not those of {kind.__name__}")
            return kind(**{name: stored[name] if name in stored.files else None for name in names})
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete it and run again: it will be recorded anew."
        ) from error
