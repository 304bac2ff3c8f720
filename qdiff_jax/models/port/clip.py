r"""Published CLIP models as parameters of `models.clip`: OpenAI's names (open_clip has the same), Hugging
Face's, and those of a Stable Diffusion checkpoint."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qdiff_jax.models.clip import ClipConfig, TextConfig, TowerConfig, clip_shapes, text_shapes
from qdiff_jax.models.port.strict import Row, Table, port_parameters
from qdiff_jax.runtime.state_dicts import check_fields, to_device

_LAYER = r"(vision|text)_model\.encoder\.layers\.(\d+)\."
_EMBEDDINGS = r"(vision|text)_model\.embeddings\."

# Hugging Face's names -> our paths. Buffers and settings that some files carry are dropped, and so is
# the temperature (`logit_scale`): a cosine does not need it.
TABLE = Table(
    rows=(
        Row(_LAYER + r"self_attn\.q_proj", r"\1/block_\2/query", "dense"),
        Row(_LAYER + r"self_attn\.k_proj", r"\1/block_\2/key", "dense"),
        Row(_LAYER + r"self_attn\.v_proj", r"\1/block_\2/value", "dense"),
        Row(_LAYER + r"self_attn\.out_proj", r"\1/block_\2/out", "dense"),
        Row(_LAYER + r"mlp\.(fc\d)", r"\1/block_\2/\3", "dense"),
        Row(_LAYER + r"layer_(norm)(\d)", r"\1/block_\2/\3\4", "norm"),
        Row(_EMBEDDINGS + r"patch_embedding", r"\1/patch", "conv"),
        Row(_EMBEDDINGS + r"class_embedding", r"\1/class_embedding", "tensor"),
        Row(_EMBEDDINGS + r"(token|position)_embedding\.weight", r"\1/\2_embedding", "tensor"),
        Row(
            r"vision_model\.pre_layrnorm", "vision/pre_norm", "norm"
        ),  # the misspelling is the file's
        Row(r"vision_model\.post_layernorm", "vision/post_norm", "norm"),
        Row(r"text_model\.final_layer_norm", "text/final_norm", "norm"),
        Row("visual_projection", "vision/projection", "dense"),
        Row("text_projection", "text/projection", "dense"),
    ),
    drops=(
        r"(.*\.)?position_ids",
        r"logit_scale|logit_bias|input_resolution|context_length|vocab_size",
    ),
)

# OpenAI's names -> Hugging Face's; the first pattern that matches the whole name decides.
_OPENAI = (
    (r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.ln_pre\.(\w+)", r"vision_model.pre_layrnorm.\1"),
    (r"visual\.ln_post\.(\w+)", r"vision_model.post_layernorm.\1"),
    (r"visual\.proj", "visual_projection.weight"),
    (r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"ln_final\.(\w+)", r"text_model.final_layer_norm.\1"),
    (r"text_projection", "text_projection.weight"),
    (r"visual\.transformer\.resblocks\.(.+)", r"vision_model.encoder.layers.\1"),
    (r"transformer\.resblocks\.(.+)", r"text_model.encoder.layers.\1"),
)
_OPENAI_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}

# Where a Stable Diffusion checkpoint keeps its text tower.
_SD_PREFIX = "cond_stage_model.transformer."


def clip_params(tensors: Mapping[str, Any], config: ClipConfig, source) -> dict:
    """A state dict of both towers as {"vision": ..., "text": ...}, the parameters of each.

    Raises ValueError, naming `source`, for tensors that are missing, left over or of another shape.
    """
    if any(key.startswith("visual.") for key in tensors):
        tensors = dict(_from_openai(tensors))
    return to_device(port_parameters(tensors, TABLE, clip_shapes(config), source))


def text_params(
    tensors: Mapping[str, Any], config: TextConfig, source: object = "the state dict"
) -> dict:
    """A state dict of the text tower alone as the parameters of `TextTower(config)`.

    tensors: in Hugging Face's names, with or without `text_model.` in front (files have it, modules of
    transformers 5 do not), or a whole Stable Diffusion checkpoint, of which the others are left alone.

    Raises ValueError, naming `source`, for tensors that are missing, left over or of another shape.
    """
    if any(key.startswith(_SD_PREFIX) for key in tensors):
        tensors = {
            k.removeprefix(_SD_PREFIX): v for k, v in tensors.items() if k.startswith(_SD_PREFIX)
        }
    if not any(key.startswith("text_model.") for key in tensors):
        tensors = {
            key if key.startswith("text_projection.") else f"text_model.{key}": tensor
            for key, tensor in tensors.items()
        }
    params = port_parameters(tensors, TABLE, {"text": text_shapes(config)}, source)
    return to_device(params["text"])


# Fields of a config.json that have no default.
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


def text_config(fields: Mapping[str, Any], source: object = "config.json") -> TextConfig:
    """The sizes of a CLIPTextModel (or of one with a projection) from its `config.json`.

    Raises ValueError, naming `source`, for another model, activation or epsilon than those built here, or
    fields that are missing.
    """
    kind = fields.get("model_type")
    if kind != "clip_text_model":
        raise ValueError(f"{source} describes a {kind}; CLIP's text tower is a clip_text_model.")
    fixed = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    other = [key for key, value in fixed.items() if fields.get(key, value) != value]
    if other:
        said = ", ".join(f"{key}={fields[key]!r}" for key in other)
        raise ValueError(f"{source} describes a text tower that is not built here: {said}.")
    projected = "CLIPTextModelWithProjection" in (fields.get("architectures") or ())
    check_fields(fields, (*_SIZES, *(("projection_dim",) if projected else ())), source)
    tower = TowerConfig(
        fields["hidden_size"],
        fields["num_hidden_layers"],
        fields["num_attention_heads"],
        fields["intermediate_size"],
    )
    return TextConfig(
        tower,
        fields["projection_dim"] if projected else 0,
        fields["vocab_size"],
        fields["max_position_embeddings"],
    )


def _from_openai(tensors: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    for key, tensor in tensors.items():
        name = next(
            (re.sub(p, to, key) for p, to in _OPENAI if re.fullmatch(p, key)),
            key,
        )
        layer = re.fullmatch(r"(\w+\.encoder\.layers\.\d+)\.(.+)", name)
        if key in ("visual.proj", "text_projection"):
            yield name, np.asarray(tensor).T  # these two are used as x @ w
        elif layer and layer[2].startswith("attn.in_proj_"):
            leaf = layer[2].removeprefix("attn.in_proj_")
            for part, rows in zip("qkv", np.split(np.asarray(tensor), 3)):
                yield f"{layer[1]}.self_attn.{part}_proj.{leaf}", rows
        elif layer:
            module, leaf = layer[2].rsplit(".", 1)
            yield f"{layer[1]}.{_OPENAI_LAYER.get(module, module)}.{leaf}", tensor
        else:
            yield name, tensor
