"""Makes cases/dit_official.npz: outputs of the DiT with random weights, in the official semantics.

    pip install torch==2.13.0 diffusers && python tests/parity/make_dit.py

The reference is diffusers' DiTTransformer2DModel with its two departures from the official code undone
(time projection without the frequency shift; LayerNorm eps 1e-6 before the MLP). Weights follow from
their official names (`seeded`), so that only inputs and outputs are stored: of one call, of one call of
the class as it ships ("as_shipped"), and of four guided steps of the published sampler.
"""

import json
import pathlib
import zlib

import numpy as np
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel

DEPTH, HEADS, HEAD_WIDTH, CLASSES, SIDE, CHANNELS = 3, 4, 24, 10, 8, 4
WIDTH = HEADS * HEAD_WIDTH


def seeded(key, shape, seed):
    generator = np.random.RandomState((zlib.crc32(key.encode()) ^ seed) & 0xFFFFFFFF)
    z = generator.standard_normal(int(np.prod(shape))).reshape(shape)
    if len(shape) > 1:
        return (z / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return (1 + 0.2 * z if key.endswith("weight") else 0.1 * z).astype(np.float32)


def official_shapes():
    shapes = {
        "x_embedder.proj": (WIDTH, CHANNELS, 2, 2),
        "t_embedder.mlp.0": (WIDTH, 256),
        "t_embedder.mlp.2": (WIDTH, WIDTH),
        "final_layer.linear": (2 * 2 * 2 * CHANNELS, WIDTH),
        "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    }
    for i in range(DEPTH):
        for name, rows, columns in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", 4 * WIDTH, WIDTH),
            ("mlp.fc2", WIDTH, 4 * WIDTH),
            ("adaLN_modulation.1", 6 * WIDTH, WIDTH),
        ):
            shapes[f"blocks.{i}.{name}"] = (rows, columns)
    both = {}
    for name, shape in shapes.items():
        both[f"{name}.weight"] = shape
        both[f"{name}.bias"] = shape[:1]
    both["y_embedder.embedding_table.weight"] = (CLASSES + 1, WIDTH)
    return both


def load(model, state):
    """The official state dict into the diffusers module."""
    own = {}

    def put(target, source):
        own[f"{target}.weight"] = state[f"{source}.weight"]
        own[f"{target}.bias"] = state[f"{source}.bias"]

    put("pos_embed.proj", "x_embedder.proj")
    for i in range(DEPTH):
        ours, theirs = f"transformer_blocks.{i}", f"blocks.{i}"
        embedder = f"{ours}.norm1.emb"
        put(f"{embedder}.timestep_embedder.linear_1", "t_embedder.mlp.0")
        put(f"{embedder}.timestep_embedder.linear_2", "t_embedder.mlp.2")
        table = state["y_embedder.embedding_table.weight"]
        own[f"{embedder}.class_embedder.embedding_table.weight"] = table
        put(f"{ours}.norm1.linear", f"{theirs}.adaLN_modulation.1")
        for leaf in ("weight", "bias"):
            parts = np.split(state[f"{theirs}.attn.qkv.{leaf}"], 3)
            for letter, part in zip("qkv", parts, strict=True):
                own[f"{ours}.attn1.to_{letter}.{leaf}"] = part
        put(f"{ours}.attn1.to_out.0", f"{theirs}.attn.proj")
        put(f"{ours}.ff.net.0.proj", f"{theirs}.mlp.fc1")
        put(f"{ours}.ff.net.2", f"{theirs}.mlp.fc2")
    put("proj_out_1", "final_layer.adaLN_modulation.1")
    put("proj_out_2", "final_layer.linear")
    model.load_state_dict({k: torch.tensor(v) for k, v in own.items()}, strict=True)


def new_model(eps):
    return DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=DEPTH,
        sample_size=SIDE,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        norm_eps=eps,
    ).eval()


def guided_sampling(model, scale=1.5, steps=(600, 400, 200, 0)):
    """The sampler of the official code: [conditional, unconditional] rows, three guided channels, the
    rest and the variance conditional, betas respaced, no clipping."""
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(timesteps=list(steps))
    x = np.random.RandomState(8).standard_normal((2, CHANNELS, SIDE, SIDE)).astype(np.float32)
    y = np.array([1, 3])
    arrays = {"in/x_T": x, "in/labels": y, "in/noise": [], "out/visited": []}
    x, labels = torch.tensor(x), torch.tensor([*y, CLASSES, CLASSES])
    for i, t in enumerate(steps):
        arrays["out/visited"].append(x.numpy())
        rows = torch.cat([x, x])
        output = model(rows, torch.full((4,), t), class_labels=labels).sample
        with_label, without = output.chunk(2)
        guided = without[:, :3] + scale * (with_label[:, :3] - without[:, :3])
        output = torch.cat([guided, with_label[:, 3:]], dim=1)
        again, generator = (torch.Generator().manual_seed(100 + i) for _ in range(2))
        arrays["in/noise"].append(torch.randn(x.shape, generator=again).numpy())
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    arrays["out/final"] = x.numpy()
    return {name: np.stack(value) for name, value in arrays.items()}


def main():
    seed = 20
    model = new_model(1e-6)
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    manifest = official_shapes()
    load(model, {key: seeded(key, shape, seed) for key, shape in manifest.items()})
    x = np.random.RandomState(7).standard_normal((2, CHANNELS, SIDE, SIDE)).astype(np.float32)
    t, y = np.array([3, 977]), np.array([1, CLASSES])
    outputs = {}
    for name, dtype in (("sample", torch.float32), ("sample_f64", torch.float64)):
        with torch.no_grad():
            inputs = torch.tensor(x, dtype=dtype), torch.tensor(t), torch.tensor(y)
            outputs[name] = model.to(dtype)(inputs[0], inputs[1], class_labels=inputs[2]).sample
    with torch.no_grad():
        arrays = guided_sampling(model.to(torch.float32))
        shipped = new_model(1e-5)
        shipped.load_state_dict(model.state_dict())
        inputs = torch.tensor(x), torch.tensor(t), torch.tensor(y)
        outputs["as_shipped"] = shipped(inputs[0], inputs[1], class_labels=inputs[2]).sample
    meta = {"seed": seed, "manifest": manifest, "depth": DEPTH, "heads": HEADS, "width": WIDTH}
    path = pathlib.Path(__file__).parent / "cases" / "dit_official.npz"
    np.savez_compressed(
        path,
        meta=json.dumps(meta),
        **{"in/x": x, "in/t": t, "in/y": y},
        **{f"sampling/{name}": value for name, value in arrays.items()},
        **{f"out/{k}": v.numpy() for k, v in outputs.items()},
    )
    spread = np.abs(outputs["sample"].numpy() - outputs["sample_f64"].numpy()).max()
    print(path, "float32 against float64:", spread)


if __name__ == "__main__":
    main()
