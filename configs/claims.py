"""The claims of the papers, one part of a method each, as pairs of runs: with the part and without it.

    python -m experiments.claims --config=configs/claims.py --out=W
    python -m experiments.claims --config=configs/claims.py:claim=fsc,seeds=1 --out=W

Papers: PTQ4DM (arXiv:2211.15736), Q-Diffusion (2302.04304), TFMQ-DM (2311.16503), TDQ (2306.02316), TCAQ-DM
(2412.16700), PTQD (2305.10657), PTQ4DiT (2405.16005, `model=dit`), SVDQuant (2411.05007), EfficientDM
(2310.03270), BinaryDM (2404.05662). Every run is a config of configs/methods at its `laptop` size, measured on
256 samples from shared noise over 20 steps without guidance, with three seeds; a run that two claims share is
made once. Hours in all on two cores, resumable. Expected: experiments/results/claims.md once it has been run
in full.
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
        "variant=faithful,margin=1.1",
        "variant=faithful",
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
    "csb": _claim(
        "PTQ4DiT",
        "CSB with SSC, against no factors",
        "ptq4dit",
        "",
        "no_csb",
        "w4a8",
        "DiT-XL/2, 50 steps, W4A8: FID 9.3 -> 9.17 (a user's ablation)",
    ),
    "csb_a4": _claim(
        "PTQ4DiT", "CSB with SSC, against no factors", "ptq4dit", "", "no_csb", "w4a4"
    ),
    "csb_nearest": _claim(
        "PTQ4DiT",
        "CSB with SSC, against no factors, nearest codes",
        "ptq4dit",
        "no_reconstruction",
        "no_reconstruction,no_csb",
        "w4a8",
    ),
    "ssc": _claim(
        "PTQ4DiT",
        "SSC, against the plain mean over steps",
        "ptq4dit",
        "",
        "no_ssc",
        "w4a8",
        "part of the figure of CSB",
    ),
    "ssc_samples": _claim(
        "PTQ4DiT",
        "SSC over single samples (the code's), against steps",
        "ptq4dit",
        "variant=faithful",
        "",
        "w4a8",
    ),
    "ptq4dit_reconstruction": _claim(
        "PTQ4DiT",
        "reconstruction, against nearest codes",
        "ptq4dit",
        "",
        "no_reconstruction",
        "w4a8",
        "DiT-XL/2, 50 steps, W4A8: FID 108 -> 9.17 (a user's ablation)",
    ),
    **{
        f"ptqd_{term}": _claim(
            "PTQD",
            {"slope": "correlated part", "bias": "bias", "all": "all terms"}[term],
            "ptqd",
            # The same words as other claims use for the same run.
            "" if term == "all" else f"terms={term}",
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
    "efficientdm": _claim(
        "EfficientDM",
        "fine-tuning, against the ranges it starts from",
        "efficientdm",
        "",
        "untuned",
        "w4a4",
        "ImageNet W4A4 sFID +0.05 over full precision, FID 6.17",
    ),
    "efficientdm_lora": _claim(
        "EfficientDM",
        "low-rank updates, against scales alone",
        "efficientdm",
        "",
        "no_lora",
        "w4a4",
    ),
    "efficientdm_lora_w2": _claim(
        "EfficientDM",
        "low-rank updates, against scales alone",
        "efficientdm",
        "",
        "no_lora",
        "w2a8",
    ),
    "scale_aware": _claim(
        "EfficientDM",
        "rates by each layer's step, against their mean for all",
        "efficientdm",
        "",
        "rates=mean",
        "w2a8",
    ),
    "scale_aware_w4": _claim(
        "EfficientDM",
        "rates by each layer's step, against their mean for all",
        "efficientdm",
        "",
        "rates=mean",
        "w4a4",
    ),
    "talsq": _claim(
        "EfficientDM", "TALSQ, against one learned scale", "efficientdm", "", "no_talsq", "w4a4"
    ),
    "distillation": _claim(
        "EfficientDM",
        "the teacher's estimate as the target, against noise, on the recorded trajectories",
        "efficientdm",
        "source=cached",
        "source=cached,target=noise",
        "w4a4",
        "no images needed; 16.2 times faster than quantization-aware training",
    ),
    "online": _claim(
        "EfficientDM",
        "trajectories as training goes, against the recorded ones",
        "efficientdm",
        "",
        "source=cached",
        "w4a4",
    ),
    # Q-Diffusion's config has a site policy of its own, and would not compare.
    **{
        f"efficientdm_beats_{name}": _claim(
            "EfficientDM",
            f"fine-tuning, against {title}",
            "efficientdm",
            "",
            words,
            "w4a4",
            "LSUN-Bedrooms W4A4 FID 10.60, ImageNet 6.17",
            other=file,
        )
        for name, title, file, words in (
            ("brecq", "BRECQ", "baseline", "method=brecq"),
            ("tfmq", "TFMQ-DM", "tfmq", ""),
            ("tdq", "TDQ", "tdq", ""),
            ("tcaq", "TCAQ-DM", "tcaq", ""),
            ("ptqd", "PTQD over BRECQ", "ptqd", "base=brecq"),
            ("closed_form", "closed form (ours)", "baseline", "method=closed_form"),
        )
    },
    **{
        f"svdquant_{name}": _claim(
            "SVDQuant", part, "svdquant", with_it, without, "w4a4", published
        )
        for name, part, with_it, without, published in (
            (
                "branch",
                "low-rank branch, smoothing searched on both sides",
                "",
                "rank=0",
                "part of the next figure",
            ),
            (
                "branch_and_smoothing",
                "low-rank branch and smoothing",
                "",
                "rank=0,smoothing=none",
                "FLUX.1-dev LPIPS 0.322 -> 0.256, PSNR 18.5 -> 20.1; SANA-1.6B 0.339 -> 0.234, 15.3 -> 17.4",
            ),
            ("smoothing", "smoothing search, against none", "", "smoothing=none", UNKNOWN),
            (
                "groups",
                "groups of 64, against one scale per channel and token",
                "",
                "group=0",
                UNKNOWN,
            ),
            (
                "alternation",
                "alternation, against the paper's single decomposition",
                "",
                "iterations=1",
                UNKNOWN,
            ),
            ("unsigned", "unsigned codes behind GELU", "", "signed", UNKNOWN),
            (
                "gptq",
                "GPTQ on what the branch leaves",
                "gptq",
                "",
                "FLUX.1-dev LPIPS 0.256 -> 0.223, PSNR 20.1 -> 21.0; PixArt-Sigma 0.356 -> 0.323, 17.0 -> 17.6",
            ),
        )
    },
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
            ("qdiffusion", "Q-Diffusion", "qdiffusion", "split=both,"),
            ("tfmq", "TFMQ-DM", "tfmq", ""),
        )
    },
}


def _serves(name, model):
    """Whether a claim has something to work on: skips in a U-Net, adaLN blocks and GELUs in a DiT."""
    if CLAIMS[name][0] == "PTQ4DiT" or name.startswith("svdquant_unsigned"):
        return model == "dit"
    return model == "unet" or not name.startswith(("split", "binarydm"))


def get_config(arg=None):
    arg = parse_arg(arg, claim="all", model=("unet", "dit"), bits="", seeds=3, smoke=False)
    if arg.claim != "all" and arg.claim not in CLAIMS:
        raise ValueError(f"claim={arg.claim!r} is unknown; there are {sorted(CLAIMS)}.")
    config = ml_collections.ConfigDict()
    config.seeds = tuple(range(arg.seeds))
    config.samples = 256
    # Without guidance, as the papers' pixel and LSUN models are sampled, and at half the cost.
    config.guidance_scale = -1.0
    words = f",model={arg.model}"
    names = tuple(CLAIMS) if arg.claim == "all" else (arg.claim,)
    names = tuple(name for name in names if _serves(name, arg.model))
    if not names:
        other = next(model for model in ("unet", "dit") if model != arg.model)
        raise ValueError(
            f"claim={arg.claim} asks for nothing of model={arg.model}: take model={other}."
        )
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
