"""TFMQ-DM: temporal features reconstructed as one block (TIB, TIAR) and calibrated step by step (FSC).

    python -m experiments.quantize --config=configs/methods/tfmq.py:w4a8 --workdir=/tmp/tfmq

Paper: TFMQ-DM (Huang et al. 2024, arXiv:2311.16503). Words behind the colon: bits `w4a8` (default), `w8a8`,
`w4a4`, `w4a32`, `w6a6`, `w8a4`; `model=unet` (default), `model=dit`; `variant=fixed` (default: the paper, step
tables on the temporal block alone) or `variant=faithful` (the official code, step tables at every site, with
ranges as they are; `margin=1.1` widens them); `no_tiar`, `no_fsc` and `freeze` (the temporal block at nearest
codes of min-max ranges) for the ablations; `split=shortcut` or `split=both` as in Q-Diffusion (default:
`shortcut`, as in the paper, and `none` with `laptop`, where TFMQ-DM's own parts are compared, and on a DiT);
`rounding=closed_form` solves the same blocks instead of AdaRound's steps. `model=ldm` (cin256-v2: 20 DDIM
steps, guidance 3) and `model=sd` (Stable Diffusion v1-4: 50 PLMS steps, guidance 7.5) are published pipelines:
`--config.model=PATH` says where, and `--config.prompts=FILE` what is asked for, a prompt a line. 256
trajectories (128 of `sd`) and 20,000 steps a unit, activations in batches of 16: hours on a CPU. `laptop` takes
16 and 150 (2,000 for the temporal block, which costs next to nothing); `smoke` runs in seconds
(`tfmq.py:smoke`).

Expected of `tfmq.py:w4a8,laptop`: near the row of the README's first table, which is of 32 samples a step, not
16.
"""

from configs.methods._start import MODELS, PIPELINES, ROUNDING, parse, start
from qdiff_jax.methods.tfmq import VARIANTS
from qdiff_jax.stages.skip_split import SPLITS


def get_config(arg=None):
    models = (*MODELS, *PIPELINES)
    own = dict(
        variant=VARIANTS,
        margin=1.0,
        no_tiar=False,
        no_fsc=False,
        freeze=False,
        split=("default", *SPLITS),
        **ROUNDING,
    )
    arg = parse(arg, model=models, **own)
    config = start(arg, tfmq="tfmq")
    config.tfmq_variant = arg.variant
    config.tfmq_tiar = not arg.no_tiar
    config.tfmq_fsc = not arg.no_fsc
    config.tfmq_freeze = arg.freeze
    config.tfmq_margin = arg.margin
    paper = not (arg.laptop or arg.smoke)
    config.tfmq_split = arg.split
    if arg.split == "default":
        config.tfmq_split = "shortcut" if paper and arg.model != "dit" else "none"
    if paper:
        config.calibration.samples = 256
        config.activations.batch_size = 16
    if paper and arg.model == "sd":
        config.calibration.update(samples=128, weight_steps=25)
    return config
