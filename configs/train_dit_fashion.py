"""A class-conditional DiT on Fashion-MNIST, a transformer to quantize.

    python -m experiments.train --config=configs/train_dit_fashion.py \
        --workdir=runs/dit_fashion --config.data.source=idx:/data/fashion_mnist

Ten adaLN-zero blocks of width 128 on patches of 4 (64 tokens), four heads: 3.06 M parameters. 20,000 steps of
16 images at 1e-3, the last 5,000 falling to 0: 1.6 hours of one free CPU core at 3.4 steps a second. Sample
grids are in the workdir, one column a class. Expected: a loss near 0.032, and the figures of the card,
qdiff_jax/models/assets/dit_fashion.md. `--config=configs/train_dit_fashion.py:smoke` runs in seconds, on drawn
shapes, without any file.
"""

from configs._train_diffusion import start
from qdiff_jax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, smoke=False, steps=20_000, bf16=False)
    model = dict(
        family="dit",
        width=128,
        depth=10,
        heads=4,
        patch=4,
        mlp_ratio=4.0,
        learn_sigma=False,
    )
    if arg.smoke:
        model.update(width=16, depth=2, heads=2, patch=8)
    return start(arg, model, cooldown=5_000, visit_every=4000)
