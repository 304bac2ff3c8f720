"""Reference outputs of the first stages of latent diffusion, on seeded weights.

    python tests/parity/networks/make_first_stage.py

writes first_stage.npz: diffusers' VQModel and AutoencoderKL, in float32 and float64, on random weights that
follow from diffusers' names. `names` gives for each name of CompVis's layout the one of diffusers.
Needs torch 2.13.0+cpu, diffusers 0.42.1.
"""

import json
import pathlib

import numpy as np
import seeded
import torch
from diffusers import AutoencoderKL, VQModel

# Few channels; latent and features of different widths; attention at the lowest resolution of one.
SIZES = {
    "vq": {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "latent_channels": 3,
        "vq_embed_dim": 4,
        "num_vq_embeddings": 32,
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "norm_num_groups": 4,
    },
    "kl": {
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 2,
        "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
    },
}
SHAPES = {"vq": ((2, 3, 8, 12), (2, 4, 4, 6)), "kl": ((2, 3, 16, 8), (2, 4, 4, 2))}


def compvis_names(levels, blocks, attention):
    """{CompVis's name: diffusers' name} of every module with parameters, block by block."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    block = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}
    block["nin_shortcut"] = "conv_shortcut"
    attend = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

    def add(theirs, ours, layers):
        names.update({f"{theirs}.{a}": f"{ours}.{b}" for a, b in layers.items()})

    for side, direction in (("encoder", "down"), ("decoder", "up")):
        ends = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
        add(side, side, ends)
        add(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0", block)
        add(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", attend)
        add(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1", block)
        for level in range(levels):
            place = level if direction == "down" else levels - 1 - level
            ours = f"{side}.{direction}_blocks.{place}"
            for i in range(blocks + (direction == "up")):
                add(f"{side}.{direction}.{level}.block.{i}", f"{ours}.resnets.{i}", block)
                if level in attention:
                    add(f"{side}.{direction}.{level}.attn.{i}", f"{ours}.attentions.{i}", attend)
            sampler = {f"{direction}sample.conv": f"{direction}samplers.0.conv"}
            add(f"{side}.{direction}.{level}", ours, sampler)
    return names


def run(kind, model, image, z):
    if kind == "kl":
        posterior = model.encode(image).latent_dist
        return {
            "mean": posterior.mean,
            "logvar": posterior.logvar,
            "decoded": model.decode(z).sample,
        }
    _, _, (_, _, indices) = model.quantize(z)
    return {
        "latents": model.encode(image).latents,
        "indices": indices.reshape(len(z), *z.shape[2:]),
        "decoded": model.decode(z).sample,
    }


def gap(z, codebook):
    """How much farther the second nearest code is: the smallest of all positions."""
    distance = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]), codebook)
    two = distance.topk(2, largest=False).values
    return float((two[:, 1] - two[:, 0]).min())


def nhwc(tensor):
    return tensor.permute(0, 2, 3, 1).numpy() if tensor.ndim == 4 else tensor.numpy()


def main():
    arrays = {}
    for kind, sizes in SIZES.items():
        model = (VQModel if kind == "vq" else AutoencoderKL)(**sizes).eval()
        manifest = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        state = seeded.state_dict(manifest)
        model.load_state_dict({k: torch.from_numpy(np.asarray(v)) for k, v in state.items()})
        levels = len(sizes["block_out_channels"])
        names = compvis_names(levels, sizes["layers_per_block"], (1,) if kind == "vq" else ())
        both = {
            f"{theirs}.{leaf}": f"{ours}.{leaf}"
            for theirs, ours in names.items()
            for leaf in ("weight", "bias")
            if f"{ours}.{leaf}" in manifest
        }
        if kind == "vq":
            both["quantize.embedding.weight"] = "quantize.embedding.weight"
        assert sorted(both.values()) == sorted(manifest), set(manifest) ^ set(both.values())
        inputs = [
            torch.from_numpy(seeded.normal(f"{kind} {name}", shape).astype(np.float32))
            for name, shape in zip(("image", "z"), SHAPES[kind])
        ]
        arrays[f"{kind}/meta"] = json.dumps(
            {"config": json.loads(model.to_json_string()), "manifest": manifest, "names": both}
        )
        for name, value in zip(("image", "z"), inputs):
            arrays[f"{kind}/{name}"] = nhwc(value)
        if kind == "vq":
            print("gap of the codes", gap(inputs[1], model.quantize.embedding.weight.detach()))
        with torch.no_grad():
            single = run(kind, model, *inputs)
            double = run(kind, model.double(), *(x.double() for x in inputs))
        for name, value in double.items():
            arrays[f"{kind}/out/{name}"] = nhwc(value)
            if value.is_floating_point():
                error = float((value - single[name]).abs().max())
                arrays[f"{kind}/float32_error/{name}"] = np.float64(error)
                print(kind, name, "std", float(value.std()), "float32 against float64", error)
    path = pathlib.Path(__file__).with_name("first_stage.npz")
    np.savez_compressed(path, **arrays)
    print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
