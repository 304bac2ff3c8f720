"""Reference embeddings of CLIP at its published sizes, on seeded weights: transformers' CLIPModel in float64.

    python tests/parity/networks/make_clip_sizes.py

writes clip_sizes.npz: for ViT-B/32 and ViT-L/14 the names and shapes of the state dict, from which seeded.py
makes the weights again, and the embeddings of one picture and of two captions. Two minutes and 6 GB.
Needs torch 2.13.0+cpu, transformers 5.23.0.
"""

import json
import pathlib

import numpy as np
import seeded
import torch
from transformers import CLIPConfig, CLIPModel

HERE = pathlib.Path(__file__).parent
# width, layers, heads of both towers; size of a patch, of the joint space
SIZES = {
    "clip-vit-b32": ((768, 12, 12), (512, 12, 8), 32, 512),
    "clip-vit-l14": ((1024, 24, 16), (768, 12, 12), 14, 768),
}


def tower(width, layers, heads):
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(zip(names, (width, layers, heads, 4 * width), strict=True))


def captions():
    """Two rows of 77 ids: the start, words, the end; the second is short."""
    ids = np.random.RandomState(0).randint(0, 49406, (2, 77))
    ids[:, 0], ids[0, 76], ids[1, 9:] = 49406, 49407, 49407
    return ids.astype(np.int32)


def embeddings(vision, text, patch, space):
    ends = {"eos_token_id": 49407, "bos_token_id": 49406, "vocab_size": 49408}
    config = CLIPConfig(
        text_config={**tower(*text), **ends, "max_position_embeddings": 77},
        vision_config={**tower(*vision), "image_size": 224, "patch_size": patch},
        projection_dim=space,
    )
    model = CLIPModel(config).eval()
    manifest = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.copy_(torch.from_numpy(np.asarray(seeded.tensor(key, manifest[key]))))
        model = model.double()
        image = torch.from_numpy(seeded.pictures(224)[:1]).double().permute(0, 3, 1, 2)
        pooled = model.vision_model(pixel_values=image).pooler_output
        words = model.text_model(input_ids=torch.from_numpy(captions()).long()).pooler_output
        return manifest, model.visual_projection(pooled), model.text_projection(words)


if __name__ == "__main__":
    arrays = {"ids": captions()}
    for name, sizes in SIZES.items():
        manifest, image, text = embeddings(*sizes)
        arrays[f"{name}/manifest"] = json.dumps(manifest)
        arrays[f"{name}/image"], arrays[f"{name}/text"] = (
            image.float().numpy(),
            text.float().numpy(),
        )
        print(name, len(manifest), image.shape, image.std(), text.shape, text.std())
    np.savez_compressed(HERE / "clip_sizes.npz", **arrays)
