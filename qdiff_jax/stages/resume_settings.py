"""What a run of training steps was begun with, beside its middle on disk: no other settings go on from it."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from qdiff_jax.config import as_json
from qdiff_jax.runtime import checkpoint

_SMALL = 4096  # elements; larger arrays count by shape alone, which another machine repeats exactly


def described(tree: Any) -> list:
    """A pytree as JSON: path, shape and dtype of every leaf, and a digest of the values of small ones."""
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        row = [jax.tree_util.keystr(path), list(np.shape(leaf)), str(dtype)]
        if np.size(leaf) <= _SMALL:
            row.append(hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()[:16])
        rows.append(row)
    return rows


def check_settings(name: str, folder: pathlib.Path | None, settings: Any) -> None:
    """Write what a run is begun with beside `folder`, or compare it if a middle is saved there.

    settings: a dict of JSON values and dataclasses by name. A folder of an earlier version, without
    settings, is taken as it is. Raises ValueError naming the settings that differ.
    """
    if folder is None:
        return
    path = folder.with_name(f"{folder.name}.settings.json")
    given = {key: as_json({"value": value})["value"] for key, value in settings.items()}
    if checkpoint.latest_step(folder) is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(given))
        os.replace(draft, path)
    elif path.exists():
        stored = json.loads(path.read_text())
        differ = sorted(k for k in stored | given if stored.get(k) != given.get(k))
        if differ:
            raise ValueError(
                f"{name}: {folder} holds the middle of a run with another {', '.join(differ)}; set it back to "
                "go on, or take a new folder."
            )
