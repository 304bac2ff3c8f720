"""SVDQuant: outliers smoothed into the weights, a 16-bit low-rank branch takes them up, the rest in 4 bits.

    python -m experiments.quantize --config=configs/methods/svdquant.py:w4a4 --workdir=/tmp/svdquant

Paper: SVDQuant (Li et al. 2024, arXiv:2411.05007), its INT4 form; who is quantized as in its code
(`official:svdquant`: layers of the blocks; weights alone of the modulation; embedders, first and last layer
and attention products in full precision). Words behind the colon: bits `w4a4` (default), `w8a8`, `w4a8`,
`w2a4` (not `w1a4`: a symmetric grid of one bit has no positive code); `model=dit` (default), `model=unet`
(time projections in place of the modulation, and convolutions, which the paper does not have); `rank=32` (0
for no branch); `group=64` (0 for one scale per output channel and per token); `smoothing=full` (39 candidates,
the default), `fast` (10) or `none`, or `alpha=0.5,beta=0.5` for one pair in place of the search;
`iterations=1` for the paper's single decomposition; `signed` for signed codes behind the GELU of a DiT; `gptq`
for GPTQ on what the branch leaves, or in place of it `rounding=closed_form` for the closed form in the
quantized network; `variant=fixed` (default) or `variant=faithful`. Groups of 64 divide every layer of the DiT;
those of the U-Net they do not divide get the largest divisor, which the log names. Round-to-nearest under the
same policy stands beside it. `laptop` takes rank 4 (as large a share of these models' weights as 32 of
DiT-XL's) and 64 samples; `smoke` runs in seconds (`svdquant.py:smoke`).

Expected of `svdquant.py:w4a4,laptop`: teacher-forced and rollout errors below those of round-to-nearest, whose
activations have one calibrated range (an eps error of 0.0278 against 0.333; README, "Recipes across papers" and
"The models it ships"). `rounding=closed_form` lowers both (`smoothing=fast`, seed 0, 16 rollouts, commit
0097a2b: eps error 0.0281 to 0.0238, rollout error 0.0038 to 0.0012, where `gptq` gains 1 and 4 %).
"""

from configs.methods._start import ROUNDING, parse, start
from qdiff_jax.methods.svdquant import UNSIGNED, VARIANTS


def get_config(arg=None):
    arg = parse(
        arg,
        bits=("w4a4", "w8a8", "w4a8", "w2a4"),
        model=("dit", "unet"),
        rank=-1,
        group=-1,
        smoothing=("", "full", "fast", "none"),
        alpha=-1.0,
        beta=-1.0,
        iterations=100,
        signed=False,
        gptq=False,
        variant=VARIANTS,
        **ROUNDING,
    )
    if arg.smoothing and (arg.alpha != -1.0 or arg.beta != -1.0):
        raise ValueError(
            f"smoothing={arg.smoothing} searches the pair that alpha and beta give: write one of the two."
        )
    if arg.signed and arg.model == "unet":
        raise ValueError("signed has no meaning for model=unet, which has no GELU: leave it out.")
    config = start(arg, rtn="rtn", svdquant="svdquant")
    config.policy = "official:svdquant"
    rank, group = (2, 4) if arg.smoke else (4, 64) if arg.laptop else (32, 64)
    branch = dict(
        rank=rank if arg.rank < 0 else arg.rank,
        smoothing=arg.smoothing or "full",
        alpha=arg.alpha,
        beta=arg.beta,
        iterations=arg.iterations,
        samples=64 if arg.laptop else 128,
        rows=2048 if arg.laptop else 4096,
        gptq=arg.gptq,
    )
    config.svdquant = dict(
        group=group if arg.group < 0 else arg.group,
        misfit="adapt" if arg.model == "unet" else "error",
        variant=arg.variant,
        unsigned=() if arg.signed or arg.model == "unet" else UNSIGNED,
        branch=branch,
    )
    return config
