"""LDM-4 on LSUN-Bedrooms 256, DDIM with 200 steps and eta 1: the row of the review and of TFMQ-DM.

    python -m experiments.evaluate --config=configs/eval/beds_200_eta1.py --workdir=W \
        --config.model=/data/lsun_beds256/model.ckpt \
        --config.network_weights=/data/pt_inception-2015-12-05-6726825d.pth \
        --config.data.source=npz:/data/VIRTUAL_lsun_bedroom256.npz \
        --config.data.published=/data/VIRTUAL_lsun_bedroom256.npz

Model: model.ckpt of lsun_bedrooms.zip (Rombach et al. 2022), its moving averages, with the VQ-f4 first
stage inside. Bytes: cut after (x + 1) 127.5. 50,000 samples against ADM's statistics of the training set.
The review's text says 20 steps with guidance, which an unconditional model cannot have; its figures are
those of 200 steps.

Expected in full precision: FID 3.03, sFID 7.03, precision 0.6465, recall 0.4760 (review, arXiv 2505.05215,
ADM's evaluator); FID 2.98, sFID 7.09 (TFMQ-DM, CVPR 2024, arXiv 2311.16503, FID by torch-fidelity). Nothing
measured here. `beds_200_eta1.py:smoke` runs in seconds on random weights.
"""

from configs.eval._published import LSUN_BEDROOMS, row


def get_config(arg=None):
    return row(
        arg,
        protocol="lsun_bedrooms_200_eta1",
        network="lsun_beds256",
        model="lsun_beds256/model.ckpt",
        average=True,
        tool="adm",
        data=dict(
            source="npz:VIRTUAL_lsun_bedroom256.npz",
            published="VIRTUAL_lsun_bedroom256.npz",
            published_count=LSUN_BEDROOMS,
        ),
        samples=50_000,
        seed=40,
    )
