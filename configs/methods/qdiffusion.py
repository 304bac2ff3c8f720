"""Q-Diffusion: even steps, split skips, BRECQ weights, running-mean ranges, learned activation steps.

    python -m experiments.quantize --config=configs/methods/qdiffusion.py:w4a8 --workdir=/tmp/qdiffusion

Paper: Q-Diffusion (Li et al. 2023, arXiv:2302.04304); site table of its code (`official:qdiffusion`: first and
last layer at the target bits too, attention products quantized, softmax at 8 bits). Words behind the colon:
bits `w4a8` (default), `w8a8`, `w4a4`, `w4a32`, `w6a6`, `w8a4`; `model=unet` (default), `model=dit` (no skips:
the split is left out, which the log says); `split=shortcut` (default: the 1x1 shortcut of every up block, as in
the official code), `split=both` (a variant of ours: the first convolution too), `split=none` (the ablation);
`rounding=closed_form` solves the same blocks instead of AdaRound's steps. The paper's sizes: 20 steps x 256
trajectories, 20,000 steps a unit at 1e-3, 5,000 steps of activation scales at 4e-4: hours on a CPU. `laptop`
takes 16 trajectories and 150 steps of 16 a unit; `smoke` runs in seconds (`qdiffusion.py:smoke`).

Expected of `qdiffusion.py:w4a8,laptop` on two CPU cores: less than 10 minutes, an eps error below that of
round-to-nearest under the same policy.
"""

from configs.methods._start import ROUNDING, parse, start


def get_config(arg=None):
    arg = parse(arg, split=("shortcut", "both", "none"), **ROUNDING)
    config = start(arg, qdiffusion="qdiffusion")
    config.policy = "official:qdiffusion"
    config.qdiffusion_split = arg.split
    if arg.smoke:
        config.reconstruct.activation_steps = 20
    elif arg.laptop:
        config.reconstruct.activation_steps = 40
    else:
        config.calibration.samples = 256
    return config
