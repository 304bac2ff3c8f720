"""Names and layouts of the published PyTorch DiT checkpoints -> parameters of `DiT`.

Source: state dicts of facebookresearch/DiT, module path by module path. `pos_embed` is computed, not
a parameter; a file's own table must equal ours.
"""

import re

import numpy as np

from .ddpm_native_keys import our_layout

# (official module, our module); the first pattern that matches a whole name decides.
MODULES = (
    (r"x_embedder\.proj", r"x_embedder/proj"),
    (r"t_embedder\.mlp\.(\d)", r"t_embedder/mlp_\1"),
    (r"y_embedder\.embedding_table", r"t_embedder/y_embedder"),
    (r"blocks\.(\d+)\.(attn|mlp)\.(\w+)", r"blocks_\1/\2_\3"),
    (r"blocks\.(\d+)\.adaLN_modulation\.1", r"blocks_\1_adaLN/dense"),
    (r"final_layer\.linear", r"final_layer/linear"),
    (r"final_layer\.adaLN_modulation\.1", r"final_layer_adaLN/dense"),
)


def our_path(key: str) -> tuple[str, str, str]:
    """ "blocks.3.attn.qkv.weight" -> ("blocks_3", "attn_qkv", "kernel"). Raises KeyError."""
    official, leaf = key.rsplit(".", 1)
    for pattern, ours in MODULES:
        if re.fullmatch(pattern, official):
            block, module = re.sub(pattern, ours, official).split("/")
            kernel = "embedding" if module == "y_embedder" else "kernel"
            return block, module, {"weight": kernel, "bias": "bias"}[leaf]
    raise KeyError(f"{key} is no parameter of the DiT")


def port(state_dict: dict, shapes: dict) -> dict:
    """The state dict as a parameter tree, of exactly the names and shapes of `shapes`."""
    tree: dict = {}
    for key, tensor in state_dict.items():
        if key == "pos_embed":
            continue
        block, module, leaf = our_path(key)
        wanted = shapes[block][module][leaf].shape
        value = tensor if leaf == "embedding" else our_layout(tensor, len(wanted))
        if value.shape != wanted:
            raise ValueError(f"{key} is {value.shape}, the model has {wanted}")
        tree.setdefault(block, {}).setdefault(module, {})[leaf] = np.asarray(value)
    return tree
