"""A recipe of three papers on the U-Net: TCAQ-DM's TCR and PAR, TFMQ-DM's TIAR and FSC, PTQD, and each alone.

    python -m experiments.quantize --config=configs/recipes/unet_tcr_tfmq_par_ptqd.py:w4a4 --workdir=/tmp/recipe

Papers: TCAQ-DM (Huang et al. 2024, arXiv:2412.16700), TFMQ-DM (Huang et al. 2024, arXiv:2311.16503), PTQD (He
et al. 2023, arXiv:2305.10657). TCR evens out the input channels of every layer, TFMQ-DM reconstructs the
temporal block and then the others and calibrates the temporal features by step, PAR repeats the reconstruction
on the states of the quantized sampler, and PTQD corrects the estimate by what is still missing. The policy is
`common`; each part alone has the same, and the same calibration and seed: TCR and PTQD with round-to-nearest,
TFMQ-DM, and PAR on TFMQ-DM, which it needs to repeat. Words behind the colon: bits `w4a4` (default), `w4a8`,
`w8a8`, `w6a6`; `no_tcr`, `no_tfmq` (round-to-nearest in its place, and no PAR), `no_par`, `no_ptqd` leave a
part out of the recipe; `only` runs the recipe without its parts beside it; `rounds=2` of PAR;
`rounding=closed_form` solves the units in place of AdaRound's steps, in every round; `parts=tcr+brecq+ptqd`
runs another recipe alone (`qdiff_jax/methods/recipes.py`; each part has the settings of its own config under
the same words of size, PTQD and CSB the calibration set of the others). 20,000 steps a unit and 5,000 in each
round: hours on a CPU. `laptop` takes 100 of 16 and 25 in each round; `smoke` runs in seconds
(`unet_tcr_tfmq_par_ptqd.py:smoke`).

Expected: nothing has been measured yet but that the smoke runs.
"""

from configs.methods import tcaq
from configs.methods._start import ROUNDING, parse, start
from configs.recipes._parts import take_settings
from qdiff_jax.methods.recipes import JOIN

ALONE = {"tcr": "tcr+rtn", "tfmq": "tfmq", "par": "tfmq+par", "ptqd": "rtn+ptqd"}


def get_config(arg=None):
    arg = parse(
        arg,
        bits=("w4a4", "w4a8", "w8a8", "w6a6"),
        model=("unet",),
        no_tcr=False,
        no_tfmq=False,
        no_par=False,
        no_ptqd=False,
        only=False,
        rounds=2,
        parts="",
        **ROUNDING,
    )
    left_out = [p for p in ALONE if getattr(arg, f"no_{p}")]
    if arg.parts and left_out:
        raise ValueError("parts= names another recipe: leave the words that begin with no_ out.")
    used = [p for p in ALONE if p not in left_out]
    if arg.no_tfmq:
        used = [
            "rtn" if p == "tfmq" else p for p in ALONE if p == "tfmq" or p in used and p != "par"
        ]
    recipe = arg.parts or JOIN.join(used)
    alone = {p: ALONE[p] for p in used if p in ALONE and not arg.only and not arg.parts}
    config = start(arg, **alone, **({"recipe": recipe} if recipe not in alone.values() else {}))
    size = ",".join(word for word in ("laptop", "smoke") if getattr(arg, word))
    take_settings(config, recipe, size, "unet")
    config.tcaq = tcaq.get_config(f"rounds={arg.rounds},{size}").tcaq
    if arg.laptop and not arg.smoke:
        config.reconstruct.steps = 100
        config.reconstruct.temporal_steps = 1000
    if arg.smoke:
        config.reconstruct.steps = 8
        config.tcaq.rounds = 1
    return config
