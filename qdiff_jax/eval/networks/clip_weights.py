"""State dicts of CLIP, in OpenAI's names (open_clip has the same) or Hugging Face's, as our parameters."""

import re
from collections.abc import Iterator, Mapping

import numpy as np

from qdiff_jax.eval.networks.clip import ClipConfig, clip_shapes
from qdiff_jax.eval.networks.state_dict import to_parameters

# Buffers and settings that some files carry.
_NOT_NEEDED = re.compile(
    r"(.*\.)?position_ids|logit_scale|logit_bias|input_resolution|context_length|vocab_size"
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

# Hugging Face's names -> our paths.
_LAYER = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.out_proj": "out",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
}
_OURS = {
    "vision_model.embeddings.patch_embedding.weight": "vision/patch/kernel",
    "vision_model.embeddings.class_embedding": "vision/class_embedding",
    "vision_model.embeddings.position_embedding.weight": "vision/position_embedding",
    "visual_projection.weight": "vision/projection/kernel",
    "text_model.embeddings.token_embedding.weight": "text/token_embedding",
    "text_model.embeddings.position_embedding.weight": "text/position_embedding",
    "text_projection.weight": "text/projection/kernel",
}
_NORMS = {
    "vision_model.pre_layrnorm": "vision/pre_norm",  # the misspelling is the file's
    "vision_model.post_layernorm": "vision/post_norm",
    "text_model.final_layer_norm": "text/final_norm",
}


def clip_params(tensors: Mapping[str, np.ndarray], config: ClipConfig, source) -> dict:
    """A state dict of both towers as {"vision": ..., "text": ...}, the parameters of each.

    The temperature (`logit_scale`) is dropped: a cosine does not need it. Half-precision tensors
    become float32.

    Raises ValueError, naming `source`, for tensors that are missing, left over or of another shape.
    """
    if any(key.startswith("visual.") for key in tensors):
        tensors = dict(_from_openai(tensors))
    return to_parameters(tensors, _our_path, clip_shapes(config), source)


def _from_openai(tensors: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for key, tensor in tensors.items():
        name = next(
            (re.sub(p, to, key) for p, to in _OPENAI if re.fullmatch(p, key)),
            key,
        )
        layer = re.fullmatch(r"(\w+\.encoder\.layers\.\d+)\.(.+)", name)
        if key in ("visual.proj", "text_projection"):
            yield name, tensor.T  # these two are used as x @ w
        elif layer and layer[2].startswith("attn.in_proj_"):
            leaf = layer[2].removeprefix("attn.in_proj_")
            for part, rows in zip("qkv", np.split(tensor, 3)):
                yield f"{layer[1]}.self_attn.{part}_proj.{leaf}", rows
        elif layer:
            module, leaf = layer[2].rsplit(".", 1)
            yield f"{layer[1]}.{_OPENAI_LAYER.get(module, module)}.{leaf}", tensor
        else:
            yield name, tensor


def _our_path(key: str) -> str | None:
    if _NOT_NEEDED.fullmatch(key):
        return None
    if key in _OURS:
        return _OURS[key]
    module, _, leaf = key.rpartition(".")
    if module in _NORMS and leaf in ("weight", "bias"):
        return f"{_NORMS[module]}/{'scale' if leaf == 'weight' else 'bias'}"
    layer = re.fullmatch(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)", module)
    if layer and layer[3] in _LAYER and leaf in ("weight", "bias"):
        ours = _LAYER[layer[3]]
        weight = "scale" if ours.startswith("norm") else "kernel"
        return f"{layer[1]}/block_{layer[2]}/{ours}/{weight if leaf == 'weight' else 'bias'}"
    return key
