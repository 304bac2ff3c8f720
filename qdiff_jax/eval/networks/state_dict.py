"""State dicts of PyTorch networks as parameter trees of ours, strict in both directions."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.runtime.weights import fit_weights


def state_dict(checkpoint: Any, source) -> dict[str, np.ndarray]:
    """The named tensors of a loaded checkpoint: itself, or what it holds as "state_dict".

    The prefix "module." of a network saved under data parallelism is dropped.

    Raises:
      ValueError: the checkpoint is no dict of named tensors; `source` names it in the message.
    """
    found = checkpoint
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if (
        not isinstance(found, Mapping)
        or not found
        or not all(isinstance(k, str) and isinstance(v, np.ndarray) for k, v in found.items())
    ):
        raise ValueError(
            f"{source} holds no state dict (named tensors); export one from the model."
        )
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
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), fitted)


def fingerprint(params: Mapping) -> str:
    """sha256 over names, shapes and values, the same whichever file the parameters came from."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}\n".encode())
        digest.update(np.asarray(leaf, order="C").tobytes())
    return digest.hexdigest()
