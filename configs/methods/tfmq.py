"""TFMQ-DM: temporal features reconstructed as one block (TIB, TIAR) and calibrated step by step (FSC).

    python -m experiments.quantize --config=configs/methods/tfmq.py:w4a8 --workdir=/tmp/tfmq

Paper: TFMQ-DM (Huang et al. 2024, arXiv:2311.16503). Words behind the colon: bits `w4a8` (default), `w8a8`,
`w4a4`, `w4a32`; `model=unet` (default), `model=dit`; `variant=fixed` (default: the paper, step tables on the
temporal block alone) or `variant=faithful` (the official code, step tables at every site); `margin=1.0` for
ranges as the code takes them (default 1.1); `no_tiar` and `no_fsc` for the ablations; `rounding=closed_form`
solves the same blocks instead of AdaRound's steps. `model=ldm` (cin256-v2: 20 DDIM steps, guidance 3) and
`model=sd` (Stable Diffusion v1-4: 50 PLMS steps, guidance 7.5) are published pipelines: `--config.model=PATH`
says where, and `--config.prompts=FILE` what is asked for, a prompt a line.
20,000 steps a unit: hours on a CPU. `laptop` takes 150 (2,000 for the temporal block, which costs next to
nothing); `smoke` runs in seconds (`tfmq.py:smoke`).

Expected of `tfmq.py:w4a8,laptop`: the row of the README's first table.
"""

from configs.methods._start import MODELS, PIPELINES, ROUNDING, parse, start
from qdiff_jax.methods.tfmq import VARIANTS


def get_config(arg=None):
    models = (*MODELS, *PIPELINES)
    own = dict(variant=VARIANTS, margin=1.1, no_tiar=False, no_fsc=False, **ROUNDING)
    arg = parse(arg, model=models, **own)
    config = start(arg, tfmq="tfmq")
    config.tfmq_variant = arg.variant
    config.tfmq_tiar = not arg.no_tiar
    config.tfmq_fsc = not arg.no_fsc
    config.activations.margin = arg.margin
    return config
