"""PixArt-alpha at 1024 on COCO captions, DPM-Solver++ with 20 steps, guidance 4.5: the row of ViDiT-Q.

    python -m experiments.evaluate --config=configs/eval/pixart1024_dpm20.py --workdir=W \
        --config.model=/data/PixArt-XL-2-1024-MS.pth --config.parts.first_stage=hub:stabilityai/sd-vae-ft-ema \
        --config.parts.text=/data/t5-v1_1-xxl \
        --config.prompts=/data/coco_1024.txt --config.data.source=folder:/data/val2014 \
        --config.network_weights=/data/pt_inception-2015-12-05-6726825d.pth \
        --config.clip.weights=hub:openai/clip-vit-large-patch14 --config.clip.network=clip-vit-l14

Model: PixArt-XL-2-1024-MS.pth (Chen et al. 2023), sd-vae-ft-ema as first stage, T5 v1.1 XXL as text encoder
(19 GB in float32; `pip install -e '.[t5]'` for its vocabulary). The solver's order and grid, and the
learned caption of the unconditional branch, are those of the released code; from a folder in diffusers'
layout the empty prompt stands there, as in diffusers. Departure: float32 in place of float16. Bytes: rounded.
The 1,024 captions of ViDiT-Q's coco_1024.txt, one a line. The paper does not say which tool measured: here
pytorch-fid, against COCO's validation images, central square.

Expected with float16: FID 73.34, CLIP score 0.258, ImageReward 0.901 (ViDiT-Q, arXiv 2406.02540; not
checked against the paper; ImageReward is not measured by this project). Nothing measured here.
`pixart1024_dpm20.py:smoke` runs in seconds on random weights.
"""

from configs.eval._published import row


def get_config(arg=None):
    return row(
        arg,
        protocol="pixart_dpm20_cfg4p5",
        network="PixArt-XL-2-1024-MS",
        model="PixArt-XL-2-1024-MS.pth",
        first_stage="sd-vae-ft-ema",
        text="t5-v1_1-xxl",
        prompts="coco_1024.txt",
        tool="pytorch-fid",
        data=dict(source="folder:val2014", crop="lsun", size=1024),
        samples=1024,
        seed=42,
        shard=64,
        batch=4,
        pictures=64,
    )
