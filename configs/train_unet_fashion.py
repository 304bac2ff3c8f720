"""A class-conditional DDPM U-Net on Fashion-MNIST, the model that the examples and tests quantize.

    python -m experiments.train --config=configs/train_unet_fashion.py \
        --workdir=runs/unet_fashion --config.data.source=idx:/data/fashion_mnist

The topology of the CIFAR-10 DDPM (Ho et al. 2020), smaller: 32 channels, three resolutions, attention
at 8x8. 12,000 steps of 16 images at 1e-3, the last 3,500 falling to 0: two hours and a half of one CPU
core. Sample grids are in the workdir, one column a class. Expected: a loss near 0.029, and the figures of
the card, qdiff_jax/models/assets/unet_fashion.md.
`--config=configs/train_unet_fashion.py:smoke` runs in seconds, on drawn shapes, without any file.
"""

from configs._train_diffusion import start
from qdiff_jax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, smoke=False, steps=12_000, bf16=False)
    model = dict(
        family="unet_ddpm",
        channels=32,
        multipliers=(1, 2, 2),
        res_blocks=1,
        attention_resolutions=(8,),
        out_channels=1,
        groups=8,
        dropout=0.0,
    )
    if arg.smoke:
        model.update(channels=8, groups=8, multipliers=(1, 1), attention_resolutions=())
    return start(arg, model, cooldown=3_500, visit_every=2000)
