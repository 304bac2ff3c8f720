"""Parameter trees as safetensors files: names `a/b/kernel`, the model's config in the header."""

import json
import os
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open


def save_weights(path, params: Mapping, metadata: Mapping) -> None:
    """Writes a nested dict of arrays; the file appears whole or not at all.

    Args:
      path: the .safetensors file; its folder is made if missing.
      params: nested dict of arrays, names without slashes.
      metadata: JSON values, such as {"kind": "diffusion", "model": {...}, "schedule": {...},
        "step": 20000}.
    """
    flat = {"/".join(names): np.asarray(leaf, order="C") for names, leaf in _leaves(params)}
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".partial")
    # The header holds strings only, hence one JSON text per entry.
    header = {name: json.dumps(value, sort_keys=True) for name, value in metadata.items()}
    safetensors.numpy.save_file(flat, draft, metadata=header)
    # safetensors writes 0600, which would hide the weights from other readers.
    draft.chmod(0o644)
    os.replace(draft, path)


def load_weights(path) -> tuple[dict, dict]:
    """Reads what `save_weights` wrote: (nested dict of numpy arrays, metadata).

    Raises:
      ValueError: there is no such file, or it is damaged.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"there is no weights file {path}; check the path.")
    try:
        with safe_open(path, framework="numpy") as file:
            header = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            flat = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({error}); copy or export it again."
        ) from error
    tree: dict = {}
    for name, array in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return tree, header


def fit_weights(params: Mapping, template: Mapping, path) -> dict:
    """Checks loaded parameters against a model's own: the same names and shapes, or a clear error.

    Returns:
      params as the template nests them.

    Raises:
      ValueError: names the first parameters that are missing, left over or of another shape.
    """
    have = {"/".join(n): np.shape(leaf) for n, leaf in _leaves(params)}
    want = {"/".join(n): np.shape(leaf) for n, leaf in _leaves(template)}
    wrong = [name for name in sorted(have | want) if have.get(name) != want.get(name)]
    if wrong:
        shown = "; ".join(
            f"{n}: {have.get(n, 'absent')}, wanted {want.get(n, 'none')}" for n in wrong[:4]
        )
        raise ValueError(
            f"{path} does not fit this model in {len(wrong)} parameters ({shown}); check the "
            "model's config."
        )
    return jax.tree.map(lambda _, leaf: leaf, template, params)


def _leaves(tree: Mapping):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield tuple(entry.key for entry in path), leaf
