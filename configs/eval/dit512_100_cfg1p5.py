"""DiT-XL/2 on ImageNet 512, DDPM with 100 respaced steps, guidance 1.5: the row of PTQ4DiT, Q-DiT and DiTAS.

    python -m experiments.evaluate --config=configs/eval/dit512_100_cfg1p5.py --workdir=W \
        --config.model=/data/DiT-XL-2-512x512.pt --config.parts.first_stage=hub:stabilityai/sd-vae-ft-ema \
        --config.network_weights=/data/pt_inception-2015-12-05-6726825d.pth \
        --config.data.source=npz:/data/VIRTUAL_imagenet512.npz \
        --config.data.published=/data/VIRTUAL_imagenet512.npz

Model: DiT-XL-2-512x512.pt (Peebles and Xie 2023) with sd-vae-ft-ema as first stage; null class 1000. The
variance is learned and the first three of four latent channels are guided, as in the official code. Bytes:
127.5 x + 128 cut. 10,000 samples, classes in turn (the code draws them), against ADM's statistics.

Expected in full precision: no figure for 100 steps is known to us from a paper's text; with 250 steps FID
3.04, IS 240.82 of 50,000 samples (DiT, arXiv 2212.09748: its README), and by others of 10,000 (issue 94 of
facebookresearch/DiT) FID 6.05, sFID 18.35, IS 243.2, precision 0.8374, recall 0.621. Nothing measured here.
`dit512_100_cfg1p5.py:smoke` runs in seconds on random weights.
"""

from configs.eval._published import dit_row


def get_config(arg=None):
    return dit_row(arg, size=512, steps=100)
