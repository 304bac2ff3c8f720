"""Stable Diffusion v1-4 on COCO at 512, PLMS with 50 steps, guidance 7.5: the row of the review and of
TFMQ-DM.

    python -m experiments.evaluate --config=configs/eval/sd14_plms50_cfg7p5.py --workdir=W \
        --config.model=/data/sd-v1-4.ckpt \
        --config.parts.vocabulary=/data/bpe_simple_vocab_16e6.txt.gz \
        --config.prompts=/data/coco_val2014_captions.txt \
        --config.network_weights=/data/pt_inception-2015-12-05-6726825d.pth \
        --config.data.source=folder:/data/val2014 --config.clip.weights=hub:openai/clip-vit-base-patch32

Model: sd-v1-4.ckpt, with its first stage and text encoder inside, or the diffusers folder; the vocabulary
is CLIP's. 51 network calls an image. Bytes: clip((x + 1) / 2) 255 cut. 30,000 captions of COCO's validation
set, one a line, and its images as the reference; how the papers crop them they do not say: here the central
square, bicubic. The first 64 samples are also written as PNG files. The authors' script runs in half
precision, this in float32.

Expected in full precision: FID 13.27, sFID 19.46, CLIP score 0.3064 (review, arXiv 2505.05215); FID 13.15,
sFID 19.31, CLIP score 0.3146 with ViT-B/32 (TFMQ-DM, CVPR 2024, arXiv 2311.16503). Nothing measured here.
`sd14_plms50_cfg7p5.py:smoke` runs in seconds on random weights.
"""

from configs.eval._published import row


def get_config(arg=None):
    return row(
        arg,
        protocol="sd14_plms50_cfg7p5",
        network="sd-v1-4",
        model="sd-v1-4.ckpt",
        prompts="coco_val2014_captions.txt",
        tool="adm",
        data=dict(source="folder:val2014", crop="lsun", size=512),
        samples=30_000,
        seed=42,
        shard=100,
        batch=10,
        pictures=64,
    )
