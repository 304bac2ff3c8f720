"""The claims of the papers, one part of a method each, as pairs of runs: with the part and without it.

    python -m experiments.claims --config=configs/claims.py --out=W
    python -m experiments.claims --config=configs/claims.py:claim=fsc,seeds=1 --out=W

Papers: PTQ4DM (arXiv:2211.15736), Q-Diffusion (2302.04304), TFMQ-DM (2311.16503), TDQ (2306.02316), TCAQ-DM
(2412.16700), PTQD (2305.10657), BinaryDM (2404.05662). Every run is a config of configs/methods at its
`laptop` size, measured on 256 samples from shared noise over 20 steps, with three seeds; a run that two claims
share is made once. Hours in all on two cores, resumable. Expected: experiments/results/claims.md once it has
been run in full.
`claims.py:smoke` pairs two runs on a miniature.
"""

import ml_collections

from qdiff_jax.config import parse_arg

METHODS = "configs/methods"

# name: (method, part, with it, without it, bits, what was published)
LAPTOP = "{bits},laptop"
UNKNOWN = "figures not at hand"


def _claim(method, part, name, with_it, without, bits, published=UNKNOWN, other=None):
    """with_it, without: words of configs/methods/<name>.py beside the bits; other: file of the latter."""
    files = (name, other or name)
    words = (",".join(filter(None, (LAPTOP, own))) for own in (with_it, without))
    given = (f"{METHODS}/{file}.py:{word}" for file, word in zip(files, words))
    return (method, part, *given, bits, published)


CLAIMS = {
    "ndtc": _claim(
        "PTQ4DM",
        "NDTC, against steps drawn evenly",
        "ptq4dm",
        "plain,selector=ndtc",
        "plain,selector=random_steps",
        "w8a8",
    ),
    "ndtc_one_step": _claim(
        "PTQ4DM",
        "NDTC, against the least noisy step alone",
        "ptq4dm",
        "plain,selector=ndtc",
        "plain,selector=one_step",
        "w8a8",
    ),
    "sampler_tensors": _claim(
        "PTQ4DM",
        "sampler tensors in full precision, against 8 bits",
        "ptq4dm",
        "plain",
        "",
        "w8a8",
        "ImageNet-64 FID 21.63 against 21.99: no loss",
    ),
    "split": _claim(
        "Q-Diffusion",
        "split of shortcuts and first convolutions",
        "qdiffusion",
        "split=both",
        "split=none",
        "w4a8",
        "CIFAR-10 W4A8 FID 188.11 -> 4.93",
    ),
    "split_shortcut": _claim(
        "Q-Diffusion",
        "split of shortcuts alone (the code's)",
        "qdiffusion",
        "split=shortcut",
        "split=none",
        "w4a8",
        "CIFAR-10 W4A8 FID 188.11 -> 4.93",
    ),
    "split_a4": _claim(
        "Q-Diffusion",
        "split of shortcuts and first convolutions",
        "qdiffusion",
        "split=both",
        "split=none",
        "w8a4",
    ),
    "tiar": _claim(
        "TFMQ-DM",
        "TIAR",
        "tfmq",
        "",
        "no_tiar",
        "w4a8",
        "LSUN-Bedrooms W4A8 FID -4.52 from 9.36, sFID -13.44",
    ),
    "fsc": _claim(
        "TFMQ-DM",
        "FSC",
        "tfmq",
        "",
        "no_fsc",
        "w4a8",
        "LSUN-Bedrooms W4A8 FID -3.29 from 9.36, sFID -11.42",
    ),
    "fsc_a4": _claim("TFMQ-DM", "FSC", "tfmq", "", "no_fsc", "w4a4"),
    "tables_everywhere": _claim(
        "TFMQ-DM",
        "the code's tables at every site, against the paper's",
        "tfmq",
        "variant=faithful",
        "",
        "w4a8",
    ),
    "margin": _claim(
        "TFMQ-DM",
        "margin 1.1 on the code's tables (ours), against none",
        "tfmq",
        "variant=faithful",
        "variant=faithful,margin=1.0",
        "w4a8",
        "ours",
    ),
    "tdq": _claim(
        "TDQ",
        "step sizes by timestep, against learned shared ones",
        "tdq",
        "",
        "shared",
        "w4a4",
    ),
    "tcr": _claim(
        "TCAQ-DM", "TCR", "tcaq", "", "no_tcr", "w6a6", "CIFAR-10 W6A6 FID 26.60 -> 4.59"
    ),
    "daq": _claim(
        "TCAQ-DM",
        "DAQ, softmax at the target bits",
        "tcaq",
        "softmax=target",
        "softmax=target,no_daq",
        "w4a4",
        "FID -0.17 and -0.45",
    ),
    "par": _claim(
        "TCAQ-DM",
        "PAR, against as many steps without rounds",
        "tcaq",
        "",
        "rounds=0",
        "w4a4",
        "CIFAR-10 W4A4 FID 9.09 -> 6.38",
    ),
    **{
        f"ptqd_{term}": _claim(
            "PTQD",
            {"slope": "correlated part", "bias": "bias", "all": "all terms"}[term],
            "ptqd",
            f"terms={term}",
            "method=rtn",
            "w4a8",
            "ImageNet W4A8: FID within 0.06 of full precision, with all of it",
            other="baseline",
        )
        for term in ("slope", "bias", "all")
    },
    "ptqd_variance": _claim(
        "PTQD",
        "variance schedule, eta = 1 (aims at the spread of samples, not at their error)",
        "ptqd",
        "terms=variance,eta=1.0",
        "terms=none,eta=1.0",
        "w4a8",
        "part of the figure above",
    ),
    "ptqd_all_eta1": _claim(
        "PTQD",
        "all terms, eta = 1",
        "ptqd",
        "eta=1.0",
        "terms=none,eta=1.0",
        "w4a8",
        "part of the figure above",
    ),
    "ptqd_mixed": _claim(
        "PTQD",
        "4 to 8 activation bits by step, against 8 throughout",
        "ptqd",
        "mixed",
        "",
        "w4a8",
        "19.9 times fewer bit operations",
    ),
    **{
        f"binarydm_{name}": _claim("BinaryDM", part, "binarydm", with_it, word, bits, published)
        for name, part, with_it, word, bits, published in (
            (
                "ebb",
                "EBB, without LRM",
                "no_lrm",
                "no_lrm,no_ebb",
                "w1a4",
                "LSUN-Bedrooms W1A4 FID 10.87 -> 8.53 (W1A32 8.43 -> 7.39)",
            ),
            (
                "lrm",
                "LRM, with EBB",
                "",
                "no_lrm",
                "w1a4",
                "LSUN-Bedrooms W1A4 FID 8.53 -> 7.74 (W1A32 7.39 -> 6.99)",
            ),
            (
                "all",
                "EBB and LRM",
                "",
                "no_ebb,no_lrm",
                "w1a4",
                "LSUN-Bedrooms W1A4 FID 10.87 -> 7.74, CIFAR-10 100.17 -> 87.77",
            ),
            (
                "progressive",
                "progressive binarization, against all at once",
                "",
                "no_progressive",
                "w1a4",
                UNKNOWN,
            ),
            (
                "tau",
                "penalty on the second basis, against none",
                "",
                "tau=0",
                "w1a4",
                "LSUN-Bedrooms W1A32 FID 8.01 -> 6.99",
            ),
        )
    },
    **{
        f"closed_form_{name}": _claim(
            method,
            "closed form (ours), against AdaRound of 150 steps",
            file,
            f"{words}rounding=closed_form",
            words.rstrip(","),
            "w4a8",
            "ours",
        )
        for name, method, file, words in (
            ("brecq", "BRECQ", "baseline", "method=brecq,"),
            ("qdiffusion", "Q-Diffusion", "qdiffusion", ""),
            ("tfmq", "TFMQ-DM", "tfmq", ""),
        )
    },
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
        names = tuple(name for name in names if not name.startswith(("split", "binarydm")))
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
