"""State dicts of PyTorch networks as parameter trees of ours, strict in both directions."""

import hashlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.runtime.state_dicts import load_state_dict
from qdiff_jax.runtime.weights import fit_weights


def read_tensors(path) -> dict[str, np.ndarray]:
    """The named tensors of a weights file or folder, as `load_state_dict` finds them, read at once."""
    return {key: np.asarray(tensor) for key, tensor in load_state_dict(path).items()}


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
      ValueError: names tensors that are missing, left over or of another shape, that are not of
        floating-point numbers (an 8-bit copy) or hold values that are not finite.
    """
    tree: dict = {}
    wrong = []
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
        if not (jnp.issubdtype(tensor.dtype, np.floating) and np.isfinite(tensor).all()):
            wrong.append(f"{key} ({tensor.dtype})")
        if leaf == "kernel":
            tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
        node[leaf] = tensor
    fitted = fit_weights(tree, template, source)
    if wrong:
        raise ValueError(
            f"{source} has tensors that are not finite floating-point numbers: {', '.join(wrong)}; take "
            "the weights as they were published, not a quantized copy."
        )
    return jax.tree.map(lambda leaf: jnp.asarray(leaf.astype(np.float32)), fitted)


def fingerprint(params: Mapping) -> str:
    """sha256 over names, shapes and values, the same whichever file the parameters came from."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}\n".encode())
        digest.update(np.asarray(leaf, order="C").tobytes())
    return digest.hexdigest()
