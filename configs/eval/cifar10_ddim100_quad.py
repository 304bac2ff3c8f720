"""DDPM on CIFAR-10, DDIM with 100 steps on the quadratic grid: the row of Q-Diffusion, TFMQ-DM and EDA-DM.

    python -m experiments.evaluate --config=configs/eval/cifar10_ddim100_quad.py --workdir=W \
        --config.model=/data/model-790000.ckpt \
        --config.network_weights=/data/pt_inception-2015-12-05-6726825d.pth \
        --config.data.source='npz:/data/cifar10_{split}.npz'

Model: ema_diffusion_cifar10_model/model-790000.ckpt of pytorch_diffusion (Ho et al. 2020, its moving
average). Sampler: eta 0, `quad`, which visits timestep 0 four times and starts at 800. Bytes: rounded.
50,000 samples against the training set, torch-fidelity.

Expected in full precision: FID 4.22, IS 9.12 (Q-Diffusion, arXiv 2302.04304); FID 4.23, IS 9.04 (TFMQ-DM,
arXiv 2311.16503, appendix; not checked against the paper). Nothing measured here.
`cifar10_ddim100_quad.py:smoke` runs in seconds on random weights.
"""

from configs.eval._published import row


def get_config(arg=None):
    return row(
        arg,
        protocol="cifar10_ddim100_quad",
        network="ddpm_cifar10",
        model="ema_diffusion_cifar10_model/model-790000.ckpt",
        tool="torch-fidelity",
        data=dict(source="npz:cifar10_{split}.npz"),
        samples=50_000,
        seed=1234,
    )
