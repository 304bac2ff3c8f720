"""A recipe of three papers on the DiT, and each part alone: PTQ4DiT's CSB, SVDQuant's branch, EfficientDM.

    python -m experiments.quantize --config=configs/recipes/dit_csb_svdquant_efficientdm.py:w4a4 --workdir=W

Papers: PTQ4DiT (Wu et al. 2024, arXiv:2405.16005), SVDQuant (Li et al. 2024, arXiv:2411.05007), EfficientDM
(He et al. 2024, arXiv:2310.03270). CSB balances the channels and folds the factors into the modulation; the
branch takes up what is left of the outliers, with groups of 64; fine-tuning then moves the codes of what the
branch leaves, together with their scales, beside the branch as it is. Who is quantized is SVDQuant's table
(`official:svdquant`), or all with `policy=common`. Each part alone has the same table, calibration and seed:
CSB with round-to-nearest, SVDQuant, EfficientDM (whose activations have a table by step in place of ranges
measured at run time). Words behind the colon: bits `w4a4` (default), `w4a8`, `w8a8`; `no_csb`, `no_svdquant`,
`no_efficientdm` leave a part out of the recipe; `only` runs the recipe without its parts beside it; `gptq` and
`smoothing=full`, `fast`, `none` as in configs/methods/svdquant.py; `weights=eps_coefficient` or `sensitivity`
lets the errors of a step count in training by what they do to the sample (`stages/row_weights.py`), not all
alike; `parts=closed_form+efficientdm` runs another recipe alone (`qdiff_jax/methods/recipes.py`; each part has
the settings of its own config under the same words of size, PTQD and CSB the calibration set of the others).
`rounding=closed_form` decides in closed form the codes that the training begins with, and has no EfficientDM
alone beside it, which begins with none. The papers' sizes (16,000 steps: hours on a CPU) unless `laptop`, which
trains 300 steps of 8 and searches ten smoothings; `smoke` runs in seconds
(`dit_csb_svdquant_efficientdm.py:smoke`).

Expected of `w4a4,laptop`: the table of recipes in the README.
"""

from configs.methods import efficientdm, svdquant
from configs.methods._start import ROUNDING, parse, start
from configs.recipes._parts import take_settings
from qdiff_jax.methods.recipes import JOIN, PARTS

POLICIES = {"svdquant": "official:svdquant", "common": "common"}


def get_config(arg=None):
    arg = parse(
        arg,
        bits=("w4a4", "w4a8", "w8a8"),
        model=("dit",),
        policy=tuple(POLICIES),
        no_csb=False,
        no_svdquant=False,
        no_efficientdm=False,
        only=False,
        gptq=False,
        smoothing=("", "full", "fast", "none"),
        weights=("", "eps_coefficient", "sensitivity"),
        parts="",
        **ROUNDING,
    )
    if arg.parts and (arg.no_csb or arg.no_svdquant or arg.no_efficientdm):
        raise ValueError("parts= names another recipe: leave the words that begin with no_ out.")
    used = [p for p in ("csb", "svdquant", "efficientdm") if not getattr(arg, f"no_{p}")]
    recipe = arg.parts or _whole(used)
    alone = {} if arg.only or arg.parts else {part: _whole([part]) for part in recipe.split(JOIN)}
    if arg.rounding != "adaround":  # it trains its codes
        alone.pop("efficientdm", None)
    config = start(arg, **alone, **({"recipe": recipe} if recipe not in alone.values() else {}))
    size = ",".join(word for word in ("laptop", "smoke") if getattr(arg, word))
    take_settings(config, recipe, size, "dit")
    trained = efficientdm.get_config(f"{arg.bits},model=dit,{size}")
    smoothing = arg.smoothing or ("fast" if arg.laptop or arg.smoke else "full")
    branch = svdquant.get_config(f"{arg.bits},model=dit,smoothing={smoothing},{size}")
    config.policy = POLICIES[arg.policy]
    config.activations = trained.activations
    config.efficientdm = trained.efficientdm
    if arg.weights:
        config.closed_form.step_weights = arg.weights
        config.efficientdm.weighted = True
        config.efficientdm.source.sampling_steps = 0  # weights are of the sampler's own steps
    config.svdquant = branch.svdquant
    config.svdquant.branch.gptq = arg.gptq
    if arg.policy == "common":  # the patches of these images have fewer channels than a group
        config.svdquant.misfit = "adapt"
    if arg.laptop and not arg.smoke:
        config.efficientdm.steps = 300
    return config


def _whole(parts):
    """A recipe of these parts that quantizes: rounded to nearest where none of them decides codes."""
    decided = any({"codes", "training"} & set(PARTS[part].kinds) for part in parts if part in PARTS)
    return JOIN.join(parts if decided else [*parts, "rtn"])
