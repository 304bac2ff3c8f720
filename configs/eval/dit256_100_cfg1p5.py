"""DiT-XL/2 on ImageNet 256, DDPM with 100 respaced steps, guidance 1.5: the row of PTQ4DiT, Q-DiT and DiTAS.

    python -m experiments.evaluate --config=configs/eval/dit256_100_cfg1p5.py --workdir=W \
        --config.model=/data/DiT-XL-2-256x256.pt --config.parts.first_stage=hub:stabilityai/sd-vae-ft-ema \
        --config.network_weights=/data/pt_inception-2015-12-05-6726825d.pth \
        --config.data.source=npz:/data/VIRTUAL_imagenet256_labeled.npz \
        --config.data.published=/data/VIRTUAL_imagenet256_labeled.npz

Model: DiT-XL-2-256x256.pt (Peebles and Xie 2023) with sd-vae-ft-ema as first stage; null class 1000. The
variance is learned and the first three of four latent channels are guided, as in the official code. Bytes:
127.5 x + 128 cut. 10,000 samples, classes in turn (the code draws them), against ADM's statistics.

Expected in full precision: FID 5.00, sFID 19.02, IS 274.8, precision 0.8149 (PTQ4DiT, arXiv 2405.16005;
not checked against the paper). Nothing measured here. `dit256_100_cfg1p5.py:smoke` runs in
seconds on random weights.
"""

from configs.eval._published import dit_row


def get_config(arg=None):
    return dit_row(arg, size=256, steps=100)
