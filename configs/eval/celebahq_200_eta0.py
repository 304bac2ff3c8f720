"""LDM-4 on CelebA-HQ 256, DDIM with 200 steps and eta 0: the row of TFMQ-DM.

    python -m experiments.evaluate --config=configs/eval/celebahq_200_eta0.py --workdir=W \
        --config.model=/data/celeba256/model.ckpt \
        --config.network_weights=/data/pt_inception-2015-12-05-6726825d.pth \
        --config.data.source=folder:/data/celebahq

Model: model.ckpt of celeba.zip (Rombach et al. 2022), its moving averages, with the VQ-f4 first stage
inside. Bytes: cut after (x + 1) 127.5. 50,000 samples against CelebA-HQ (not CelebA) at 256,
torch-fidelity; for sFID set `--config.tool=adm`.

Expected in full precision: FID 8.74, sFID 10.16 (TFMQ-DM, CVPR 2024, arXiv 2311.16503). The model's own
paper has FID 5.11, which others did not reproduce (issue 138 of CompVis/latent-diffusion: about 9). Nothing
measured here. `celebahq_200_eta0.py:smoke` runs in seconds on random weights.
"""

from configs.eval._published import row


def get_config(arg=None):
    return row(
        arg,
        protocol="celebahq_200_eta0",
        network="celeba256",
        model="celeba256/model.ckpt",
        average=True,
        tool="torch-fidelity",
        data=dict(source="folder:celebahq", crop="lsun", size=256),
        samples=50_000,
        seed=40,
    )
