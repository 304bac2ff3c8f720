"""SQNR of a third party's trained U-Net after quantization, by method and bits.

    pip download --no-deps adaptive-terrain-diffusion==0.4.2
    python -m experiments.terrain --config=configs/terrain.py --weights=WHEEL --workdir=W

The model: `qdiff_jax.models.port.terrain` (10.5 M parameters, 128x128x1, one step from noise of sigma 80). Its
own code draws noise and a difficulty of 1 to 100 for each map; so does this, for calibration (16 maps) and
for judging (8 others). Methods: round-to-nearest; BRECQ (Li et al. 2021); Q-Diffusion (Li et al. 2023);
SVDQuant (Li et al. 2024); closed form. Every layer is quantized, first and last at the target bits too
(`official:qdiffusion`), weights by MSE search, activations by their extremes; under SVDQuant those of its
code (`official:svdquant`).

`steps=40,batch=2` are the steps of reconstruction for each unit, far from the papers' 20,000 of 32: a
unit at 128x128 has 16,384 positions in one map. `only=rtn_w4a8` runs one variant. `terrain.py:smoke` runs
round-to-nearest on a miniature with random weights, without --weights.

Measured: the table in the README; weights alone at 4 bits 7.9 dB (nearest), 14.6 (BRECQ, SVDQuant), 16.0
(Q-Diffusion) and 32.0 (closed form). The network's 311 sites compile slowly, minutes of every variant.
"""

import ml_collections

from configs import quickstart
from qdiff_jax.config import parse_arg

# Methods whose weights do not depend on how activations are quantized: their run at a_bits=8 gives both.
SHARED = ("rtn", "brecq", "qdiffusion")
APART = ("closed_form", "svdquant")


def get_config(arg=None):
    arg = parse_arg(arg, steps=40, batch=2, samples=16, only="all", smoke=False)
    config = ml_collections.ConfigDict(quickstart.get_config())
    config.model = "random:terrain" if arg.smoke else "adaptive-terrain-diffusion"
    config.classifier = ""
    config.policy = "official:qdiffusion"
    config.variants = {}
    for method in SHARED + APART:
        for w_bits in (4, 8):
            for a_bits in (8,) if method in SHARED else (8, 32):
                variant = dict(method=method, w_bits=w_bits, a_bits=a_bits)
                config.variants[f"{method}_w{w_bits}a{a_bits}"] = variant
    config.calibration.samples = arg.samples
    config.calibration.weight_steps = 1
    config.evaluation = dict(held_out=0, samples=8, batch=4)
    config.sampler.steps = 1
    config.reconstruct.steps = arg.steps
    config.reconstruct.temporal_steps = 10 * arg.steps
    config.reconstruct.batch_size = arg.batch
    config.reconstruct.lr = 3e-2
    config.reconstruct.walk_batch = 4
    config.reconstruct.memory_mib = 1024
    config.activations = dict(observer="minmax", margin=1.1, batch_size=4)
    config.closed_form.rows = 16_384
    config.svdquant = dict(
        group=64,
        misfit="adapt",
        variant="fixed",
        unsigned=(),
        branch=dict(rank=8, smoothing="fast", iterations=4, samples=4, rows=1024),
    )
    only = "rtn_w4a8" if arg.smoke and arg.only == "all" else arg.only
    if only != "all":
        if only not in config.variants:
            raise ValueError(f"only={only!r} is unknown; there are {sorted(config.variants)}.")
        config.variants = {only: config.variants[only].to_dict()}
    if arg.smoke:
        config.calibration.samples = 4
        config.evaluation.samples = 4
    return config
