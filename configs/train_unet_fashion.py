"""A class-conditional DDPM U-Net on Fashion-MNIST, the model that the examples and tests quantize.

    python -m experiments.train --config=configs/train_unet_fashion.py \
        --workdir=runs/unet_fashion --config.data.source=idx:/data/fashion_mnist

The topology of the CIFAR-10 DDPM (Ho et al. 2020), smaller: 32 channels, three resolutions, attention
at 8x8. 12,000 steps of 16 images at 1e-3, the last 3,500 falling to 0: two hours and a half of one CPU
core. Sample grids are in the workdir, one column a class. Expected: a loss near 0.030; the weights shipped
now are of a shorter run, see qdiff_jax/models/assets/UNET_CARD.md.
`--config=configs/train_unet_fashion.py:smoke` runs in seconds, on drawn shapes, without any file.
"""

import ml_collections

from qdiff_jax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, smoke=False, steps=12_000, bf16=False)
    config = ml_collections.ConfigDict()
    config.kind = "diffusion"
    config.seed = 0
    config.data = dict(source="tfds:fashion_mnist", batch=16, pad_to=32)
    config.model = dict(
        family="unet_ddpm",
        channels=32,
        multipliers=(1, 2, 2),
        res_blocks=1,
        attention_resolutions=(8,),
        resolution=32,
        in_channels=1,
        out_channels=1,
        groups=8,
        dropout=0.0,
        num_classes=10,
        dtype="bfloat16" if arg.bf16 else "float32",
    )
    config.optimizer = dict(
        total_steps=arg.steps,
        peak_lr=1e-3,
        warmup=200,
        schedule="constant",
        cooldown=3_500,
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
        visit_every=2000,
        checkpoint_every=2000,
        checkpoint_minutes=5.0,
        keep=2,
        tensorboard=False,
    )
    if arg.smoke:
        config.data = dict(source="synthetic:64", batch=8, pad_to=32)
        config.model.channels = config.model.groups = 8
        config.model.multipliers = (1, 1)
        config.model.attention_resolutions = ()
        config.optimizer.total_steps = 8
        config.optimizer.cooldown = 2
        config.optimizer.warmup = 2
        config.sample = dict(steps=2, count=10)
        config.run.chunk = config.run.log_every = config.run.visit_every = 4
    return config
