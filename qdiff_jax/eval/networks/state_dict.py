"""State dicts of PyTorch networks as parameter trees of ours, strict in both directions."""

import hashlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from qdiff_jax.runtime.torch_files import load_torch
from qdiff_jax.runtime.weights import fit_weights

# What Hugging Face calls the weights in a model's folder, the first one there is taken.
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")


def read_tensors(path) -> dict[str, np.ndarray]:
    """The named tensors of a weights file: .safetensors, or what `torch.save` wrote.

    path: the file, or a folder with `model.safetensors` or `pytorch_model.bin`. In a checkpoint of torch
    the state dict may lie under "state_dict", and names may begin with "module.", as data parallelism
    leaves them.

    Raises:
      ValueError: no such file, a damaged one, or one without named tensors.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        files = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        if not files:
            raise ValueError(f"the folder {path} has none of {', '.join(FOLDER_FILES)}.")
        path = files[0]
    if path.suffix != ".safetensors":
        return _state_dict(load_torch(path), path)
    if not path.is_file():
        raise ValueError(f"there is no weights file {path}; check the path.")
    try:
        return safetensors.numpy.load_file(path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({error}); download or copy it again."
        ) from error


def _state_dict(checkpoint: Any, path: pathlib.Path) -> dict[str, np.ndarray]:
    found = checkpoint
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if (
        not isinstance(found, Mapping)
        or not found
        or not all(isinstance(k, str) and isinstance(v, np.ndarray) for k, v in found.items())
    ):
        raise ValueError(f"{path} holds no state dict (named tensors); export one from the model.")
    prefix = "module." if all(key.startswith("module.") for key in found) else ""
    return {key.removeprefix(prefix): tensor for key, tensor in found.items()}


def to_parameters(
    tensors: Mapping[str, np.ndarray],
    our_path: Callable[[str], str | None],
    template: Mapping,
    source,
) -> dict:
    """A parameter tree of exactly the names and shapes of `template`, float32 jax arrays.

    Args:
      tensors: by their torch names.
      our_path: torch name -> "block/layer/kernel", or None for a tensor that is not needed. A name it
        does not know it should hand back as it is, which is then reported as left over. Leaves called
        "kernel" are transposed: OIHW to HWIO, [out, in] to [in, out].
      template: nested dict of arrays or shapes, such as `jax.eval_shape` gives.
      source: where the tensors come from, for messages.

    Raises:
      ValueError: names tensors that are missing, left over or of another shape.
    """
    tree: dict = {}
    for key, tensor in tensors.items():
        path = our_path(key)
        if path is None:
            continue
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        if leaf in node:
            raise ValueError(f"{source} has two tensors for {path}, the second is {key}.")
        if leaf == "kernel":
            tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
        node[leaf] = tensor
    fitted = fit_weights(tree, template, source)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf.astype(np.float32)), fitted)


def fingerprint(params: Mapping) -> str:
    """sha256 over names, shapes and values, the same whichever file the parameters came from."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}\n".encode())
        digest.update(np.asarray(leaf, order="C").tobytes())
    return digest.hexdigest()
