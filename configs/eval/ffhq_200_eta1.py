"""LDM-4 on FFHQ 256, DDIM with 200 steps and eta 1: the row of TFMQ-DM.

    python -m experiments.evaluate --config=configs/eval/ffhq_200_eta1.py --workdir=W \
        --config.model=/data/ffhq256/model.ckpt \
        --config.network_weights=/data/pt_inception-2015-12-05-6726825d.pth \
        --config.data.source=folder:/data/ffhq

Model: model.ckpt of ffhq.zip (Rombach et al. 2022), its moving averages, with the VQ-f4 first stage inside.
Bytes: cut after (x + 1) 127.5. 50,000 samples against FFHQ at 256, torch-fidelity; for sFID set
`--config.tool=adm`.

Expected in full precision: FID 9.36, sFID 8.67 (TFMQ-DM, CVPR 2024, arXiv 2311.16503). The model's own
paper has FID 4.98, which others did not reproduce (issue 138 of CompVis/latent-diffusion: about 9). Nothing
measured here. `ffhq_200_eta1.py:smoke` runs in seconds on random weights.
"""

from configs.eval._published import row


def get_config(arg=None):
    return row(
        arg,
        protocol="ffhq_200_eta1",
        network="ffhq256",
        model="ffhq256/model.ckpt",
        average=True,
        tool="torch-fidelity",
        data=dict(source="folder:ffhq", crop="lsun", size=256),
        samples=50_000,
        seed=40,
    )
