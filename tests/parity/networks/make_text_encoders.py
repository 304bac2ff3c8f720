"""Reference outputs of the text encoders that condition diffusion models, on seeded weights.

    python tests/parity/networks/make_text_encoders.py

writes text_encoders.npz: hidden states of transformers' CLIPTextModel and T5EncoderModel (version 1.1) in
float32 and float64, and the buckets of relative positions at T5's published settings.
Needs torch 2.13.0+cpu, transformers 5.23.0.
"""

import json
import pathlib

import numpy as np
import seeded
import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

# A perceptron that is not four times the width, a head width that is not width / heads.
CLIP = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 50}
CLIP |= {"num_attention_heads": 3, "max_position_embeddings": 12, "hidden_act": "quick_gelu"}
CLIP |= {"bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 49, "projection_dim": 20}
T5 = {"d_model": 24, "d_ff": 40, "d_kv": 6, "num_layers": 2, "num_heads": 3, "vocab_size": 40}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
T5 |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# Stable Diffusion fills up with the end (49 here), OpenAI with 0: the hidden states differ behind it.
CLIP_IDS = [[48, 5, 6, 7, *[49] * 8], [48, 5, 6, 7, 49, *[0] * 7], [48, *range(30, 40), 49]]
T5_IDS = np.arange(3 * 26).reshape(3, 26) * 7 % 37 + 3
T5_LENGTHS = (26, 9, 1)


def arrays_of(name, model, **inputs):
    # Published files are named by `text_model.`; modules of transformers 5 are without it in memory.
    prefix = "text_model." if name == "clip" else ""
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    manifest = {
        key if key.startswith(prefix) else prefix + key: shape for key, shape in shapes.items()
    }
    state = {
        key: torch.from_numpy(np.asarray(seeded.tensor(full, manifest[full])))
        for key, full in zip(shapes, manifest)
    }
    if "encoder.embed_tokens.weight" in state:
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    model.load_state_dict(state, strict=True)
    model.eval()
    with torch.no_grad():
        single = model(**inputs).last_hidden_state
        double = model.double()(**inputs).last_hidden_state
    error = float((single - double).abs().max())
    print(name, "std", float(double.std()), "float32 against float64", error)
    config = {key: value for key, value in model.config.to_dict().items() if value is not None}
    return {
        f"{name}/meta": json.dumps({"config": config, "manifest": manifest}),
        f"{name}/hidden": double.numpy(),
        f"{name}/float32_error": np.float64(error),
    }


def main():
    mask = np.arange(26)[None] < np.array(T5_LENGTHS)[:, None]
    offsets = torch.arange(-400, 401)
    buckets = T5Attention._relative_position_bucket(offsets, True, 32, 128)
    arrays = {
        **arrays_of(
            "clip", CLIPTextModel(CLIPTextConfig(**CLIP)), input_ids=torch.tensor(CLIP_IDS)
        ),
        **arrays_of(
            "t5",
            T5EncoderModel(T5Config(**T5)),
            input_ids=torch.from_numpy(T5_IDS),
            attention_mask=torch.from_numpy(mask).long(),
        ),
        "clip/ids": np.array(CLIP_IDS, np.int32),
        "t5/ids": T5_IDS.astype(np.int32),
        "t5/mask": mask,
        "t5/offsets": offsets.numpy(),
        "t5/buckets": buckets.numpy(),
    }
    path = pathlib.Path(__file__).with_name("text_encoders.npz")
    np.savez_compressed(path, **arrays)
    print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
