"""A Fashion-MNIST classifier: the judge of generated images, by its labels and its features.

    python -m experiments.train --config=configs/train_classifier_fashion.py \
        --workdir=runs/classifier_fashion --config.data.source=idx:/data/fashion_mnist

About five minutes on one CPU core (80 ms a step). Measured: 92.23 % test accuracy (averaged weights,
3,600 steps); more in qdiff_jax/models/assets/CLASSIFIER_CARD.md.
`--config=configs/train_classifier_fashion.py:smoke` runs in seconds, on drawn shapes, without any
file.
"""

import ml_collections

from qdiff_jax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, smoke=False, steps=3600)
    config = ml_collections.ConfigDict()
    config.kind = "classifier"
    config.seed = 0
    config.data = dict(source="tfds:fashion_mnist", batch=128, pad_to=32)
    config.model = dict(
        widths=(32, 64, 128),
        blocks=(0, 1, 1),
        feature_dim=128,
        resolution=32,
        in_channels=1,
        num_classes=10,
        dropout=0.2,
        dtype="float32",
    )
    config.optimizer = dict(
        total_steps=arg.steps,
        peak_lr=4e-3,
        warmup=200,
        schedule="cosine",
        cooldown=0,
        b1=0.9,
        b2=0.999,
        weight_decay=0.05,
        clip=1.0,
        ema=0.995,
    )
    config.augment = dict(shift=1, flip=True, label_smoothing=0.05)
    config.start = dict(workdir="", weights="")
    config.run = dict(
        chunk=10,
        log_every=50,
        visit_every=500,
        checkpoint_every=2000,
        checkpoint_minutes=5.0,
        keep=2,
        tensorboard=False,
    )
    if arg.smoke:
        config.data = dict(source="synthetic:64", batch=16, pad_to=32)
        config.model.widths = (8, 8, 16)
        config.model.feature_dim = 16
        config.optimizer.total_steps = 8
        config.optimizer.warmup = 2
        config.run.chunk = config.run.log_every = config.run.visit_every = 4
    return config
