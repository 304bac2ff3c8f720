"""How weights are rounded: nearest, AdaRound in several lengths, and in closed form; error against CPU seconds.

    python -m experiments.bench_rounding --config=configs/bench_rounding.py --out=W
    python -m experiments.bench_rounding --config=configs/bench_rounding.py:model=dit_fashion,bits=w4a8 --out=W

Papers: AdaRound (Nagel et al. 2020) with BRECQ's blocks (Li et al. 2021), GPTQ (Frantar et al. 2023),
asymmetric targets as in GPTAQ (Li et al. 2025). Models, sampler and sizes are the main job's: 20 DDIM steps, 16
trajectories of calibration, 16 held out, 64 rollouts, policy `common`; the time embedding takes as many steps
as every other unit, and the main job's 2,000 where a recipe says so.

With quantized activations the recipes differ in more than the rounding. Closed form and GPTQ calibrate
activation ranges first, on the network in full precision, and round in a stream that carries the activation
quantizers ("blind": that does not). AdaRound's stream has none, and its ranges, like those of nearest, are
calibrated afterwards on the quantized network, as in the papers. "+ scales" is BRECQ's second phase, which
trains activation scales for as many steps; like "blind" it is left out where activations are not quantized.
"on 1 trajectory" and "on 4 trajectories" calibrate on as many instead of 16.

`model=` names one shipped model (default: both), `bits=` one width of `w4a32`, `w3a32`, `w4a8`, `w4a4`, `w2a8`
(default: all), `recipe=` one row of the table or a pattern such as `adaround 1000*`; `seeds=1` takes fewer than
three. Days in all on two cores; killed at any moment, the same command goes on, and other words with the same
--out add to the table. Expected: experiments/results/rounding.md, where the block target in closed form has
less error at 4 bits than AdaRound of 1,000 steps at its best rate, in a 34th (U-Net) and a 50th (DiT) of its
CPU seconds, and more eps error than 5,000 steps. `bench_rounding.py:smoke` runs four recipes on a miniature.
"""

import fnmatch

import ml_collections

from configs import quickstart
from qdiff_jax.config import parse_arg

MODELS = ("unet_fashion", "dit_fashion")
BITS = ("w4a32", "w3a32", "w4a8", "w4a4", "w2a8")


def _recipe(method, settings, activations=False):
    """activations: whether it differs from another recipe only where they are quantized."""
    return {"method": method, "set": settings, "activations": activations}


def _adaround(steps, lr, schedule="cosine", *, temporal_steps=None, activation_steps=0):
    settings = {"reconstruct.steps": steps, "reconstruct.lr": lr, "reconstruct.schedule": schedule}
    if temporal_steps is not None:
        settings["reconstruct.temporal_steps"] = temporal_steps
    if activation_steps:
        settings["reconstruct.activation_steps"] = activation_steps
    return _recipe("brecq", settings, activation_steps > 0)


def _closed_form(target, **settings):
    settings = {f"closed_form.{name}": value for name, value in settings.items()}
    blind = not settings.get("closed_form.activations", True)
    return _recipe("closed_form", {"closed_form.target": target, **settings}, blind)


def _on(trajectories, recipe):
    """The recipe with less to calibrate on; 20 states a trajectory, in batches that divide them."""
    few = {
        "calibration.samples": trajectories,
        "reconstruct.walk_batch": 20,
        "activations.batch_size": 20,
    }
    return {**recipe, "set": {**recipe["set"], **few}}


RECIPES = {
    "nearest": _recipe("rtn", {}),
    **{f"adaround {n} at 1e-3": _adaround(n, 1e-3, "constant") for n in (50, 200, 1000)},
    **{f"adaround {n} at 1e-2": _adaround(n, 1e-2) for n in (50, 200, 1000)},
    **{f"adaround {n} at 3e-2": _adaround(n, 3e-2) for n in (50, 200, 1000)},
    **{f"adaround {n} at 1e-1": _adaround(n, 1e-1) for n in (200, 1000)},
    "adaround 5000 at 1e-2": _adaround(5000, 1e-2),
    "adaround 5000 at 3e-2": _adaround(5000, 3e-2),
    **{
        f"adaround {n} at 3e-2 (2000 for time)": _adaround(n, 3e-2, temporal_steps=2000)
        for n in (200, 1000)
    },
    **{
        f"adaround {n} at 3e-2 + scales": _adaround(n, 3e-2, activation_steps=n)
        for n in (200, 1000)
    },
    "gptq": _closed_form("layer_quantized_input", refit_bias=False),
    "gptq + bias": _closed_form("layer_quantized_input"),
    "asym1 + bias": _closed_form("layer_fp_output"),
    "asym2 + bias": _closed_form("block_fp_output"),
    "asym2 + bias (blind)": _closed_form("block_fp_output", activations=False),
    "asym2 + bias by c^2": _closed_form("block_fp_output", step_weights="eps_coefficient"),
    "asym2 + bias by sensitivity": _closed_form("block_fp_output", step_weights="sensitivity"),
    # Parts of the Hessian: taps of a convolution, groups of a dense layer's inputs (quant.hessian_size).
    "asym2 + bias in 5 MiB": _closed_form("block_fp_output", hessian_mib=5),
    "asym2 + bias in 1 MiB": _closed_form("block_fp_output", hessian_mib=1),
    "asym2 + bias + kronecker": _closed_form("block_fp_output", kronecker_sweeps=2),
    "asym2 + bias + tuning": _closed_form("block_fp_output", tune_steps=50),
}
RECIPES |= {
    f"{name} on {count}": _on(n, RECIPES[name])
    for n, count in ((1, "1 trajectory"), (4, "4 trajectories"))
    for name in ("adaround 1000 at 3e-2", "gptq", "asym1 + bias", "asym2 + bias")
}
SMOKE = ("nearest", "adaround 50 at 1e-2", "gptq", "asym2 + bias + tuning")


def get_config(arg=None):
    arg = parse_arg(
        arg,
        model=("both", *MODELS),
        bits=("all", *BITS),
        recipe="all",
        seeds=3,
        smoke=False,
    )
    config = ml_collections.ConfigDict()
    config.quantize = quickstart.get_config("smoke" if arg.smoke else None)
    # Every unit takes the steps of its recipe, that of the time embedding too unless a recipe says so.
    config.quantize.reconstruct.temporal_steps = 0
    config.models = MODELS if arg.model == "both" else (arg.model,)
    config.bits = BITS if arg.bits == "all" else (arg.bits,)
    config.seeds = tuple(range(arg.seeds))
    pattern = "*" if arg.recipe == "all" else arg.recipe
    names = tuple(name for name in RECIPES if fnmatch.fnmatchcase(name, pattern))
    if arg.smoke:
        config.models, config.bits, config.seeds = ("random:miniature",), ("w4a8",), (0,)
        names = SMOKE
    if not names:
        raise ValueError(f"recipe={arg.recipe!r} is unknown; there are {list(RECIPES)}.")
    config.recipes = tuple((name, RECIPES[name]) for name in names)
    return config
