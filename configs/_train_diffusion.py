"""What the training configs of the two diffusion models share: data, optimizer, noise, checkpoints."""

import ml_collections


def start(arg, model, cooldown, visit_every):
    """The config of a run of arg.steps steps that trains `model` on Fashion-MNIST.

    arg: has `steps`, `bf16` and `smoke`, which makes it 8 steps on drawn shapes. cooldown: the last steps,
    over which the rate falls to 0. visit_every: steps between sample grids.
    """
    config = ml_collections.ConfigDict()
    config.kind = "diffusion"
    config.seed = 0
    config.data = dict(source="tfds:fashion_mnist", batch=16, pad_to=32)
    config.model = dict(
        model,
        resolution=32,
        in_channels=1,
        num_classes=10,
        dtype="bfloat16" if arg.bf16 else "float32",
    )
    config.optimizer = dict(
        total_steps=arg.steps,
        peak_lr=1e-3,
        warmup=200,
        schedule="constant",
        cooldown=cooldown,
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
        visit_every=visit_every,
        checkpoint_every=2000,
        checkpoint_minutes=5.0,
        keep=2,
        tensorboard=False,
    )
    if arg.smoke:
        config.data = dict(source="synthetic:64", batch=8, pad_to=32)
        config.optimizer.total_steps = 8
        config.optimizer.cooldown = 2
        config.optimizer.warmup = 2
        config.sample = dict(steps=2, count=10)
        config.run.chunk = config.run.log_every = config.run.visit_every = 4
    return config
