"""The main job: round-to-nearest, BRECQ, TFMQ-DM and closed form on the shipped U-Net, side by side.

    python -m experiments.quantize --config=configs/quickstart.py --workdir=/tmp/quickstart

Papers: BRECQ (Li et al. 2021, arXiv:2102.05426) as run by Q-Diffusion (Li et al. 2023,
arXiv:2302.04304); TFMQ-DM (Huang et al. 2024, arXiv:2311.16503). 20 DDIM steps on the quadratic grid
of the CIFAR-10 literature (it tops out at t = 800); all variants under one site policy (`common`:
everything quantized, first and last layer and softmax at 8 bits).

`quickstart.py` uses 150 steps a unit at 1e-2 with cosine decay, because at the papers' 1e-3 so few steps change
almost nothing; the time embedding, a few dense layers, gets 2,000 at hardly any cost. `quickstart.py:full` adds
Q-Diffusion, TDQ, TCAQ-DM and PTQD (over BRECQ) and takes every method to W4A4 too, all with activation ranges
by MSE search and a short activation phase (40 steps) for the methods that have one. Its Q-Diffusion has the
paper's split, rounding and activation phase, but not the site table of its code: the policy is one for all, and
`configs/methods/qdiffusion.py` has the other. `quickstart.py:paper` is the papers' setting, 20,000 steps at
1e-3 and a 5,000-step activation phase for BRECQ: hours on a CPU. `quickstart.py:smoke` runs in seconds.
`--config.policy=official:tfmq` (or `official:brecq`, ...) chooses who stays in full precision.

Expected on two CPU cores: ten minutes with a cold compile cache, and 3 GiB; figures in the README.
"""

import ml_collections

from configs._sampler import sampler
from qdiff_jax.config import parse_arg

FULL = ("rtn", "brecq", "tfmq", "closed_form", "qdiffusion", "tdq", "tcaq", "ptqd")


def get_config(arg=None):
    arg = parse_arg(arg, full=False, paper=False, smoke=False)
    config = ml_collections.ConfigDict()
    config.model = "unet_fashion"
    config.classifier = "classifier_fashion"
    config.seed = 0
    # Of a published pipeline: which, and where its other parts are; a text file with prompts.
    config.parts = dict(
        network="", average=False, first_stage="", text="", vocabulary="", folder=""
    )
    config.prompts = ""
    config.policy = "common"
    config.sampler = sampler(spacing="quad")
    config.calibration = dict(
        samples=16,
        weight_steps=20,
        selector="uniform",
        count=0,
        position=0,
        mean=0.4,
        std=0.4,
        mirror_bug=False,
    )
    config.evaluation = dict(held_out=16, samples=64, batch=32)
    config.variants = dict(
        rtn_w8a8=dict(method="rtn", w_bits=8, a_bits=8),
        rtn_w4a8=dict(method="rtn", w_bits=4, a_bits=8),
        brecq_w4a8=dict(method="brecq", w_bits=4, a_bits=8),
        tfmq_w4a8=dict(method="tfmq", w_bits=4, a_bits=8),
        closed_form_w4a8=dict(method="closed_form", w_bits=4, a_bits=8),
    )
    config.reconstruct = dict(
        steps=150,
        temporal_steps=2000,
        batch_size=32,
        lr=1e-2,
        schedule="cosine",
        rounding_weight=0.01,
        walk_batch=64,
        memory_mib=1024,
        save_seconds=20.0,
        activation_steps=0,
        activation_lr=4e-4,
        activation_batch=0,
    )
    config.rounding = "adaround"
    config.closed_form = dict(
        target="block_fp_output",
        act_order=True,
        damping=0.01,
        block=128,
        ridge=0.05,
        refit_bias=True,
        sweeps=0,
        kronecker_sweeps=0,
        kronecker_batch=0,
        rows=24_576,
        hessian_mib=2048,
        hessian_seconds=0.0,
        check_samples=64,
        activations=True,
        tune_steps=0,
        step_weights="uniform",
    )
    config.activations = dict(observer="ema", margin=1.1, batch_size=64)
    config.tfmq_variant = "fixed"
    if arg.full:
        config.activations.observer = "mse"
        config.variants = dict(rtn_w8a8=dict(method="rtn", w_bits=8, a_bits=8))
        for method in FULL:
            for a_bits in (8, 4):
                variant = dict(method=method, w_bits=4, a_bits=a_bits)
                config.variants[f"{method}_w4a{a_bits}"] = variant
        config.reconstruct.activation_steps = 40
        config.tdq = dict(mode="ptq", scales=dict(steps=100, lr=2e-3, dropout=0.0))
        config.ptqd = dict(base="brecq")
    if arg.paper:
        config.reconstruct.steps = 20_000
        config.reconstruct.temporal_steps = 0
        config.reconstruct.lr = 1e-3
        config.reconstruct.schedule = "constant"
        config.reconstruct.activation_steps = 5_000
    if arg.smoke:
        config.model = "random:miniature"
        config.classifier = ""
        config.sampler.steps = 4
        config.calibration.samples = 4
        config.calibration.weight_steps = 4
        config.evaluation = dict(held_out=4, samples=4, batch=4)
        config.reconstruct.steps = 60
        config.reconstruct.temporal_steps = 0
        config.reconstruct.batch_size = 8
        config.reconstruct.walk_batch = 8
        config.activations.batch_size = 8
    return config
