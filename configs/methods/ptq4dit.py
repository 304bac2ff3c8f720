"""PTQ4DiT: saliences balanced over channels (CSB) and steps (SSC), folded; then rounding and activation steps.

    python -m experiments.quantize --config=configs/methods/ptq4dit.py:w4a8 --workdir=/tmp/ptq4dit

Paper: PTQ4DiT (Wu et al. 2024, arXiv:2405.16005); site table of its code (`official:ptq4dit`: everything at the
target bits, embedders, modulation and last layer too; q, k, v and softmax at 8 bits). For transformers alone:
`model=dit` is the only one. Words behind the colon: bits `w4a8` (default), `w8a8`, `w4a4`, `w2a4`, `w4a32`,
`w6a6`, `w8a4` (not `w1a4`: its uniform grids begin at two bits); `variant=fixed` (default: the paper, rho of
whole steps) or `variant=faithful` (the official code, rho of single samples); `no_ssc` (all steps alike),
`no_csb` (no factors at all) and `no_reconstruction` (nearest codes) for the ablations; `rounding=closed_form`
solves the same blocks and learns the activation steps after. The paper's sizes: 64 trajectories of 50 steps
with guidance 1.5, 25 of the steps, 20,000 steps a block at 1e-3 (activation steps at 4e-5): hours on a CPU. Not
the paper's: the sampler, the main job's DDIM on the quadratic grid, where DiT's is ancestral (`ddpm`) on the
grid `spaced` with a learned variance, which recordings do not know (`--config.sampler.name=ddpm
--config.sampler.spacing=spaced` with a fixed one). `laptop` takes the other configs' 16 trajectories of 20
steps without guidance and 150 steps a block (at 1e-2 and 4e-4); `smoke` runs in seconds (`ptq4dit.py:smoke`).

Published: DiT-XL/2 256x256, 250 steps, 10,000 samples: FID 4.53 in full precision, 4.63 at W8A8, 7.09 at W4A8.
Expected of `ptq4dit.py:w4a8,laptop`: reconstruction carries the result, factors change little, as users of the
official code found (`experiments.claims`, `claim=ptq4dit_reconstruction` and `claim=csb`).
"""

from configs.methods._start import BITS, ROUNDING, parse, start
from qdiff_jax.methods.ptq4dit import VARIANTS


def get_config(arg=None):
    arg = parse(
        arg,
        bits=(*BITS, "w2a4"),
        model=("dit",),
        variant=tuple(VARIANTS),
        no_csb=False,
        no_ssc=False,
        no_reconstruction=False,
        **ROUNDING,
    )
    config = start(arg, ptq4dit="ptq4dit")
    config.policy = "official:ptq4dit"
    config.activations.observer = "percentile_search"
    if not (arg.smoke or arg.laptop):
        config.sampler.steps = 50
        config.sampler.guidance_scale = 1.5
        config.calibration.samples = 64
        config.calibration.weight_steps = 25
        config.reconstruct.activation_lr = 4e-5
    config.ptq4dit = dict(
        variant=arg.variant,
        csb=not arg.no_csb,
        ssc=not arg.no_ssc,
        reconstruction=not arg.no_reconstruction,
    )
    return config
