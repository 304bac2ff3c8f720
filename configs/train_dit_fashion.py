"""A class-conditional DiT on Fashion-MNIST, a transformer to quantize.

    python -m experiments.train --config=configs/train_dit_fashion.py \
        --workdir=runs/dit_fashion --config.data.source=idx:/data/fashion_mnist

Ten adaLN-zero blocks of width 128 on patches of 4 (64 tokens), four heads: 3.06 M parameters. Batches of 16
at 1e-3, the last quarter of the steps falling to 0. Sample grids are in the workdir, one column a
class. Expected: a loss near 0.04 after 7,500 steps; no run of it is shipped yet.
`--config=configs/train_dit_fashion.py:smoke` runs in seconds, on
drawn shapes, without any file.
"""

import ml_collections

from qdiff_jax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, smoke=False, steps=24_000, bf16=False)
    config = ml_collections.ConfigDict()
    config.kind = "diffusion"
    config.seed = 0
    config.data = dict(source="tfds:fashion_mnist", batch=16, pad_to=32)
    config.model = dict(
        family="dit",
        width=128,
        depth=10,
        heads=4,
        patch=4,
        mlp_ratio=4.0,
        resolution=32,
        in_channels=1,
        num_classes=10,
        learn_sigma=False,
        dtype="bfloat16" if arg.bf16 else "float32",
    )
    config.optimizer = dict(
        total_steps=arg.steps,
        peak_lr=1e-3,
        warmup=200,
        schedule="constant",
        cooldown=6_000,
        b1=0.9,
        b2=0.999,
        weight_decay=0.0,
        clip=1.0,
        ema=0.9995,
    )
    config.diffusion = dict(schedule="linear", timesteps=1000, label_dropout=0.1)
    config.sample = dict(steps=20, count=40)
    config.start = dict(workdir="", weights="")
    config.run = dict(
        chunk=10,
        log_every=50,
        visit_every=4000,
        checkpoint_every=2000,
        checkpoint_minutes=5.0,
        keep=2,
        tensorboard=False,
    )
    if arg.smoke:
        config.data = dict(source="synthetic:64", batch=8, pad_to=32)
        config.model.width = 16
        config.model.depth = config.model.heads = 2
        config.model.patch = 8
        config.optimizer.total_steps = 8
        config.optimizer.cooldown = 2
        config.optimizer.warmup = 2
        config.sample = dict(steps=2, count=10)
        config.run.chunk = config.run.log_every = config.run.visit_every = 4
    return config
