"""LDM-4 on ImageNet 256, DDIM with 20 steps, eta 0, guidance 3: the row of the review and of TFMQ-DM.

    python -m experiments.evaluate --config=configs/eval/imagenet_20_cfg3.py --workdir=W \
        --config.model=/data/cin256-v2/model.ckpt \
        --config.network_weights=/data/pt_inception-2015-12-05-6726825d.pth \
        --config.data.source=npz:/data/VIRTUAL_imagenet256_labeled.npz \
        --config.data.published=/data/VIRTUAL_imagenet256_labeled.npz

Model: cin256-v2 (Rombach et al. 2022; model.ckpt, no moving averages), with the VQ-f4 first stage inside;
null class 1000. Bytes: clip((x + 1) / 2) 255 cut. 50,000 samples, classes in turn, against ADM's
statistics.

Expected in full precision: IS 366.03, FID 11.13, sFID 7.834, precision 0.9393, recall 0.2798 (review, arXiv
2505.05215, ADM's evaluator); IS 235.64, FID 10.91, sFID 7.67 (TFMQ-DM, CVPR 2024, arXiv 2311.16503). The
two scores of nominally one setting differ by 130: measure full precision first. Nothing measured here.
`imagenet_20_cfg3.py:smoke` runs in seconds on random weights.
"""

from configs.eval._published import IMAGENET, row


def get_config(arg=None):
    return row(
        arg,
        protocol="imagenet_20_cfg3",
        network="cin256-v2",
        model="cin256-v2/model.ckpt",
        tool="adm",
        data=dict(
            source="npz:VIRTUAL_imagenet256_labeled.npz",
            published="VIRTUAL_imagenet256_labeled.npz",
            published_count=IMAGENET,
        ),
        samples=50_000,
        seed=0,
    )
