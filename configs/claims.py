"""The claims of the papers, one part of a method each, as pairs of runs: with the part and without it.

    python -m experiments.claims --config=configs/claims.py --out=W
    python -m experiments.claims --config=configs/claims.py:claim=fsc,seeds=1 --out=W

Papers: PTQ4DM (arXiv:2211.15736), Q-Diffusion (2302.04304), TFMQ-DM (2311.16503), TDQ (2306.02316), TCAQ-DM
(2412.16700), PTQD (2305.10657). Every run is a config of configs/methods at its `laptop` size, measured on 256
samples from shared noise over 20 steps, with three seeds; a run that two claims share is made once. Hours in
all on two cores, resumable. Expected: experiments/results/claims.md once it has been run in full.
`claims.py:smoke` pairs two runs on a miniature.
"""

import ml_collections

from qdiff_jax.config import parse_arg

METHODS = "configs/methods"

# name: (method, part, with it, without it, bits, what was published)
CLAIMS = {
    "ndtc": (
        "PTQ4DM",
        "NDTC, against steps drawn evenly",
        f"{METHODS}/ptq4dm.py:{{bits}},laptop,selector=ndtc",
        f"{METHODS}/ptq4dm.py:{{bits}},laptop,selector=random_steps",
        "w8a8",
        "ablation of the paper, figures not at hand",
    ),
    "ndtc_one_step": (
        "PTQ4DM",
        "NDTC, against the least noisy step alone",
        f"{METHODS}/ptq4dm.py:{{bits}},laptop,selector=ndtc",
        f"{METHODS}/ptq4dm.py:{{bits}},laptop,selector=one_step",
        "w8a8",
        "ablation of the paper, figures not at hand",
    ),
    "split": (
        "Q-Diffusion",
        "split of skip concatenations",
        f"{METHODS}/qdiffusion.py:{{bits}},laptop,split=both",
        f"{METHODS}/qdiffusion.py:{{bits}},laptop,split=none",
        "w4a8",
        "CIFAR-10 W4A8 FID 188.11 -> 4.93",
    ),
    "tiar": (
        "TFMQ-DM",
        "TIAR",
        f"{METHODS}/tfmq.py:{{bits}},laptop",
        f"{METHODS}/tfmq.py:{{bits}},laptop,no_tiar",
        "w4a8",
        "LSUN-Bedrooms W4A8 FID -4.52 from 9.36",
    ),
    "fsc": (
        "TFMQ-DM",
        "FSC",
        f"{METHODS}/tfmq.py:{{bits}},laptop",
        f"{METHODS}/tfmq.py:{{bits}},laptop,no_fsc",
        "w4a8",
        "LSUN-Bedrooms W4A8 FID -3.29 from 9.36",
    ),
    "tdq": (
        "TDQ",
        "step sizes by timestep, against shared ones",
        f"{METHODS}/tdq.py:{{bits}},laptop",
        f"{METHODS}/baseline.py:{{bits}},method=brecq,laptop",
        "w4a4",
        "figures not at hand",
    ),
    "tcr": (
        "TCAQ-DM",
        "TCR",
        f"{METHODS}/tcaq.py:{{bits}},laptop",
        f"{METHODS}/tcaq.py:{{bits}},laptop,no_tcr",
        "w4a4",
        "CIFAR-10 W6A6 FID 26.60 -> 4.59",
    ),
    "daq": (
        "TCAQ-DM",
        "DAQ",
        f"{METHODS}/tcaq.py:{{bits}},laptop",
        f"{METHODS}/tcaq.py:{{bits}},laptop,no_daq",
        "w4a4",
        "FID -0.17 and -0.45",
    ),
    "par": (
        "TCAQ-DM",
        "PAR",
        f"{METHODS}/tcaq.py:{{bits}},laptop",
        f"{METHODS}/tcaq.py:{{bits}},laptop,rounds=0",
        "w4a4",
        "CIFAR-10 W4A4 FID 9.09 -> 6.38",
    ),
    **{
        f"ptqd_{term}": (
            "PTQD",
            {"slope": "correlated part", "bias": "bias", "all": "all terms"}[term],
            f"{METHODS}/ptqd.py:{{bits}},terms={term},laptop",
            f"{METHODS}/baseline.py:{{bits}},method=rtn,laptop",
            "w4a8",
            "ImageNet W4A8: FID within 0.06 of full precision, with all of it",
        )
        for term in ("slope", "bias", "all")
    },
    "ptqd_variance": (
        "PTQD",
        "variance schedule, eta = 1",
        f"{METHODS}/ptqd.py:{{bits}},terms=variance,eta=1.0,laptop",
        f"{METHODS}/ptqd.py:{{bits}},terms=none,eta=1.0,laptop",
        "w4a8",
        "part of the figure above",
    ),
}


def get_config(arg=None):
    arg = parse_arg(arg, claim="all", model=("unet", "dit"), bits="", seeds=3, smoke=False)
    if arg.claim != "all" and arg.claim not in CLAIMS:
        raise ValueError(f"claim={arg.claim!r} is unknown; there are {sorted(CLAIMS)}.")
    config = ml_collections.ConfigDict()
    config.seeds = tuple(range(arg.seeds))
    config.samples = 256
    words = f",model={arg.model}"
    names = tuple(CLAIMS) if arg.claim == "all" else (arg.claim,)
    if arg.model == "dit":
        names = tuple(name for name in names if name != "split")
    if arg.smoke:
        config.seeds, config.samples, names = (0,), 4, ("fsc",)
        words += ",smoke"
    claims = []
    for name in names:
        method, part, with_it, without, bits, published = CLAIMS[name]
        bits = arg.bits or bits
        given = tuple(path.format(bits=bits) + words for path in (with_it, without))
        claims.append((name, arg.model, method, part, *given, bits, published))
    config.claims = tuple(claims)
    return config
