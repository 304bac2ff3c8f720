"""LDM-8 on LSUN-Churches 256, DDIM with 500 steps and eta 0: the row of the review and of TFMQ-DM.

    python -m experiments.evaluate --config=configs/eval/churches_500_eta0.py --workdir=W \
        --config.model=/data/lsun_churches256/model.ckpt \
        --config.network_weights=/data/pt_inception-2015-12-05-6726825d.pth \
        --config.data.source='folder:/data/church_outdoor_{split}'

Model: model.ckpt of lsun_churches.zip (Rombach et al. 2022), its moving averages, with the KL-f8 first
stage and its scale factor inside. The papers' commands ask for 400 steps, which run 500 (the grid's stride
is 1000 // 400). Bytes: cut after (x + 1) 127.5. 50,000 samples against the training set as LSUN's loader
prepares it (central square, bicubic): without that FID is 14 to 16. There is no published reference file.

Expected in full precision: FID 4.17, sFID 12.91, precision 0.6600, recall 0.5146 (review, arXiv 2505.05215,
ADM's evaluator); FID 4.12, sFID 10.89 (TFMQ-DM, CVPR 2024, arXiv 2311.16503). Nothing measured here.
`churches_500_eta0.py:smoke` runs in seconds on random weights.
"""

from configs.eval._published import row


def get_config(arg=None):
    return row(
        arg,
        protocol="lsun_churches_500_eta0",
        network="lsun_churches256",
        model="lsun_churches256/model.ckpt",
        average=True,
        tool="adm",
        data=dict(source="folder:church_outdoor_{split}", crop="lsun", size=256),
        samples=50_000,
        seed=40,
    )
