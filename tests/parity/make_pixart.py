"""Makes cases/pixart.npz: outputs of diffusers' PixArtTransformer2DModel with random weights.

    pip install torch==2.13.0 diffusers==0.42.1 && python tests/parity/make_pixart.py

Two reduced networks: "alpha" with micro conditions on the size it was made for, "sigma" without them on a
larger, rectangular one. Weights follow from their official names, so that only inputs and outputs are
stored.
"""

import json
import pathlib
import zlib

import numpy as np
import torch
from diffusers import PixArtTransformer2DModel

DEPTH, HEADS, HEAD_WIDTH, CAPTION, LENGTH, CHANNELS, SEED = 2, 2, 24, 20, 5, 4, 30
WIDTH = HEADS * HEAD_WIDTH


def seeded(key, shape, seed):
    generator = np.random.RandomState((zlib.crc32(key.encode()) ^ seed) & 0xFFFFFFFF)
    z = generator.standard_normal(int(np.prod(shape))).reshape(shape)
    if len(shape) > 1:
        return (z / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return (1 + 0.2 * z if key.endswith("weight") else 0.1 * z).astype(np.float32)


def official_shapes(micro):
    dense = {
        "t_embedder.mlp.0": (WIDTH, 256),
        "t_embedder.mlp.2": (WIDTH, WIDTH),
        "t_block.1": (6 * WIDTH, WIDTH),
        "y_embedder.y_proj.fc1": (WIDTH, CAPTION),
        "y_embedder.y_proj.fc2": (WIDTH, WIDTH),
        "x_embedder.proj": (WIDTH, CHANNELS, 2, 2),
        "final_layer.linear": (2 * 2 * 2 * CHANNELS, WIDTH),
    }
    for name in ("csize", "ar") if micro else ():
        dense[f"{name}_embedder.mlp.0"] = (WIDTH // 3, 256)
        dense[f"{name}_embedder.mlp.2"] = (WIDTH // 3, WIDTH // 3)
    shapes = {"final_layer.scale_shift_table": (2, WIDTH)}
    for i in range(DEPTH):
        shapes[f"blocks.{i}.scale_shift_table"] = (6, WIDTH)
        for name, rows, columns in (
            ("attn.qkv", 3, 1),
            ("attn.proj", 1, 1),
            ("cross_attn.q_linear", 1, 1),
            ("cross_attn.kv_linear", 2, 1),
            ("cross_attn.proj", 1, 1),
            ("mlp.fc1", 4, 1),
            ("mlp.fc2", 1, 4),
        ):
            dense[f"blocks.{i}.{name}"] = (rows * WIDTH, columns * WIDTH)
    for name, shape in dense.items():
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]
    return shapes


def load(model, state, micro):
    """The official state dict into the module of diffusers."""
    own = {"scale_shift_table": state["final_layer.scale_shift_table"]}

    def put(source, *targets):
        for leaf in ("weight", "bias"):
            parts = np.split(state[f"{source}.{leaf}"], len(targets))
            for target, part in zip(targets, parts, strict=True):
                own[f"{target}.{leaf}"] = part

    put("x_embedder.proj", "pos_embed.proj")
    put("final_layer.linear", "proj_out")
    put("t_block.1", "adaln_single.linear")
    embedders = {"t": "timestep"} | ({"csize": "resolution", "ar": "aspect_ratio"} if micro else {})
    for ours, theirs in embedders.items():
        put(f"{ours}_embedder.mlp.0", f"adaln_single.emb.{theirs}_embedder.linear_1")
        put(f"{ours}_embedder.mlp.2", f"adaln_single.emb.{theirs}_embedder.linear_2")
    for i in (1, 2):
        put(f"y_embedder.y_proj.fc{i}", f"caption_projection.linear_{i}")
    for i in range(DEPTH):
        source, target = f"blocks.{i}", f"transformer_blocks.{i}"
        own[f"{target}.scale_shift_table"] = state[f"{source}.scale_shift_table"]
        put(f"{source}.attn.qkv", *(f"{target}.attn1.to_{letter}" for letter in "qkv"))
        put(f"{source}.attn.proj", f"{target}.attn1.to_out.0")
        put(f"{source}.cross_attn.q_linear", f"{target}.attn2.to_q")
        put(f"{source}.cross_attn.kv_linear", *(f"{target}.attn2.to_{letter}" for letter in "kv"))
        put(f"{source}.cross_attn.proj", f"{target}.attn2.to_out.0")
        put(f"{source}.mlp.fc1", f"{target}.ff.net.0.proj")
        put(f"{source}.mlp.fc2", f"{target}.ff.net.2")
    model.load_state_dict({k: torch.tensor(v) for k, v in own.items()}, strict=True)
    return own


def one(micro, side, interpolation, height, width):
    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=DEPTH,
        cross_attention_dim=WIDTH,
        sample_size=side,
        interpolation_scale=interpolation,
        use_additional_conditions=micro,
        caption_channels=CAPTION,
    ).eval()
    manifest = official_shapes(micro)
    own = load(model, {key: seeded(key, shape, SEED) for key, shape in manifest.items()}, micro)
    random = np.random.RandomState(7)
    arrays = {
        "in/x": random.standard_normal((2, CHANNELS, height, width)).astype(np.float32),
        "in/t": np.array([3, 977]),
        "in/context": random.standard_normal((2, LENGTH, CAPTION)).astype(np.float32),
        "in/mask": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.float32),
        "in/resolution": np.array([[16.0, 24.0], [8.0, 8.0]], np.float32),
        "in/aspect_ratio": np.array([[0.67], [1.0]], np.float32),
    }
    for name, dtype in (("out/sample", torch.float32), ("out/sample_f64", torch.float64)):
        given = {k: torch.tensor(v).to(dtype) for k, v in arrays.items() if v.dtype == np.float32}
        sizes = {k: given[f"in/{k}"] for k in ("resolution", "aspect_ratio")} if micro else None
        with torch.no_grad():
            arrays[name] = (
                model.to(dtype)(
                    given["in/x"],
                    encoder_hidden_states=given["in/context"],
                    timestep=torch.tensor(arrays["in/t"]),
                    added_cond_kwargs=sizes,
                    encoder_attention_mask=given["in/mask"],
                ).sample
            ).numpy()
    return arrays, {"manifest": manifest, "diffusers": {k: v.shape for k, v in own.items()}}


def main():
    stored, meta = {}, {"seed": SEED, "depth": DEPTH, "heads": HEADS, "width": WIDTH}
    for name, arguments in (("alpha", (True, 8, 2, 8, 8)), ("sigma", (False, 8, 1, 8, 12))):
        arrays, meta[name] = one(*arguments)
        stored |= {f"{name}/{key}": value for key, value in arrays.items()}
        gap = np.abs(arrays["out/sample"] - arrays["out/sample_f64"])
        print(name, "float32 against float64:", gap.max(axis=(1, 2, 3)))
    path = pathlib.Path(__file__).parent / "cases" / "pixart.npz"
    np.savez_compressed(path, meta=json.dumps(meta), **stored)
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
