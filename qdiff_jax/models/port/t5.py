"""Published encoders of T5 v1.1 as parameters of `models.t5`, in Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qdiff_jax.models.port.strict import Row, Table, port_parameters
from qdiff_jax.models.t5 import T5Config, t5_shapes
from qdiff_jax.runtime.state_dicts import check_fields, to_device

_ATTENTION = r"encoder\.block\.(\d+)\.layer\.0\."
_PERCEPTRON = r"encoder\.block\.(\d+)\.layer\.1\."

_COPY = "encoder.embed_tokens.weight"

# `shared` is the embedding; files of the encoder alone may repeat it as `encoder.embed_tokens`.
TABLE = Table(
    rows=(
        Row(r"shared\.weight", "token_embedding", "tensor"),
        Row(
            r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
            "position_bias",
            "tensor",
        ),
        Row(_ATTENTION + r"SelfAttention\.q", r"block_\1/query", "dense"),
        Row(_ATTENTION + r"SelfAttention\.k", r"block_\1/key", "dense"),
        Row(_ATTENTION + r"SelfAttention\.v", r"block_\1/value", "dense"),
        Row(_ATTENTION + r"SelfAttention\.o", r"block_\1/out", "dense"),
        Row(_ATTENTION + r"layer_norm", r"block_\1/norm1", "norm"),
        Row(_PERCEPTRON + r"DenseReluDense\.wi_0", r"block_\1/gate", "dense"),
        Row(_PERCEPTRON + r"DenseReluDense\.wi_1", r"block_\1/up", "dense"),
        Row(_PERCEPTRON + r"DenseReluDense\.wo", r"block_\1/down", "dense"),
        Row(_PERCEPTRON + r"layer_norm", r"block_\1/norm2", "norm"),
        Row(r"encoder\.final_layer_norm", "final_norm", "norm"),
    ),
    drops=(r"encoder\.embed_tokens\.weight", r"decoder\..*", r"lm_head\.weight"),
)


def t5_params(
    tensors: Mapping[str, Any], config: T5Config, source: object = "the state dict"
) -> dict:
    """A state dict of the encoder, or of the whole T5 (whose decoder is dropped), as parameters of
    `T5Encoder(config)`.

    Raises ValueError, naming `source`, for tensors that are missing, left over or of another shape, or for
    two embeddings that differ.
    """
    if "shared.weight" not in tensors and _COPY in tensors:
        tensors = {"shared.weight" if k == _COPY else k: tensor for k, tensor in tensors.items()}
    elif _COPY in tensors and not np.array_equal(tensors[_COPY], tensors["shared.weight"]):
        raise ValueError(
            f"{source}: {_COPY} is not shared.weight, and this encoder has one embedding; the file was "
            "changed after it was saved."
        )
    return to_device(port_parameters(tensors, TABLE, t5_shapes(config), source))


# Fields of a config.json that have no default.
_SIZES = (
    "d_model",
    "num_layers",
    "num_heads",
    "d_ff",
    "d_kv",
    "vocab_size",
    "relative_attention_num_buckets",
)


def t5_config(fields: Mapping[str, Any], source: object = "config.json") -> T5Config:
    """The sizes of a T5 v1.1 from its `config.json`.

    Raises ValueError, naming `source`, for another model, among them the first T5, whose perceptron has no
    gate, or fields that are missing.
    """
    if fields.get("model_type") != "t5":
        raise ValueError(f"{source} describes a {fields.get('model_type')}; this encoder is a t5.")
    perceptron = fields.get("feed_forward_proj", "relu")
    epsilon = fields.get("layer_norm_epsilon", 1e-6)
    if perceptron != "gated-gelu" or epsilon != 1e-6:
        raise ValueError(
            f"{source} describes a T5 with feed_forward_proj={perceptron!r} and layer_norm_epsilon="
            f"{epsilon}; built here is version 1.1, with 'gated-gelu' and 1e-06."
        )
    check_fields(fields, _SIZES, source)
    return T5Config(
        width=fields["d_model"],
        layers=fields["num_layers"],
        heads=fields["num_heads"],
        hidden=fields["d_ff"],
        head_width=fields["d_kv"],
        vocabulary=fields["vocab_size"],
        buckets=fields["relative_attention_num_buckets"],
        max_distance=fields.get("relative_attention_max_distance", 128),
    )
