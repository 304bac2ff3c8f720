"""Claims of PTQ4DiT and SVDQuant on the DiT, of EfficientDM on both models, of BinaryDM on the U-Net."""

from configs._claims import UNKNOWN, claim, every, side
from configs._claims_unet import MSE

GROUP = "dit_tuned_binary"
CSB = "DiT-XL/2, 50 steps, W4A8: FID 9.3 -> 9.17 (a user's ablation, issue 6 of its repository)"
# Half of `laptop`, since every run pays for its steps.
STEPS = "efficientdm.steps=300"
# Those it is held against have its ranges too (MSE) and, where activation steps are learned after the weights,
# steps to learn them in.
LEARNED = "reconstruct.activation_steps=40"
COMMON = "policy=common"
MANY = "calibration.samples=64"
MIXED = "efficientdm.source.order=mixed"
TABLE = "policy=official:svdquant"


def _tuned(words="", *changes):
    return side("efficientdm", words, STEPS, *changes)


DIT = {
    "csb": claim(
        "PTQ4DiT",
        "CSB with SSC, against no factors",
        side("ptq4dit"),
        side("ptq4dit", "no_csb"),
        "w4a8",
        CSB,
    ),
    "csb_alone": claim(
        "PTQ4DiT",
        "CSB without SSC, against no factors",
        side("ptq4dit", "no_ssc"),
        side("ptq4dit", "no_csb"),
        "w4a8",
        "part of the figure above",
    ),
    "ssc": claim(
        "PTQ4DiT",
        "SSC, against the plain mean over steps",
        side("ptq4dit"),
        side("ptq4dit", "no_ssc"),
        "w4a8",
        "part of the figure above",
    ),
    "ptq4dit_reconstruction": claim(
        "PTQ4DiT",
        "reconstruction, against nearest codes",
        side("ptq4dit"),
        side("ptq4dit", "no_reconstruction"),
        "w4a8",
        "DiT-XL/2, 50 steps, W4A8: FID 108 -> 9.17 (a user's ablation, issue 6 of its repository)",
    ),
}


def _branch(words=""):
    """Ten candidates of smoothing in place of thirty-nine, for as many runs."""
    return side("svdquant", ",".join(filter(None, ("smoothing=fast", words))))


def _smoothed(words):
    """The branch and none, under one smoothing."""
    return side("svdquant", words), side("svdquant", f"{words},rank=0")


def _svdquant(part, with_it, without, published=UNKNOWN):
    return claim("SVDQuant", part, with_it, without, "w4a4", published)


# 100 alpha, the share of the activations' range that goes into the weights, or no smoothing at all.
AWAY = {0: "smoothing=none"} | {a: f"alpha={a / 100},beta={(100 - a) / 100}" for a in (50, 80, 100)}
LESS = {0: "without smoothing", 50: "at alpha = 0.5", 80: "at alpha = 0.8"}
GAIN = "argued, without figures of it"

DIT |= {
    "svdquant_branch": _svdquant(
        "low-rank branch, smoothing searched on both sides",
        _branch(),
        _branch("rank=0"),
        "part of the next figure",
    ),
    "svdquant_branch_and_smoothing": _svdquant(
        "low-rank branch and smoothing",
        _branch(),
        side("svdquant", "smoothing=none,rank=0"),
        "FLUX.1-dev LPIPS 0.322 -> 0.256, PSNR 18.5 -> 20.1; SANA-1.6B 0.339 -> 0.234, 15.3 -> 17.4",
    ),
    "svdquant_smoothing": _svdquant(
        "smoothing search, against none", _branch(), side("svdquant", "smoothing=none")
    ),
    "svdquant_groups": _svdquant(
        "groups of 64, against one scale per channel and token", _branch(), _branch("group=0")
    ),
    **{
        f"svdquant_gain_{more}": _svdquant(
            f"the branch gains more at alpha = {more / 100} than {LESS[less]}",
            _smoothed(AWAY[more]),
            _smoothed(AWAY[less]),
            GAIN,
        )
        for less, more in ((0, 50), (50, 80), (80, 100))
    },
}


def _binary(words):
    """Two thirds of the steps that `laptop` takes."""
    return side("binarydm", words, "binarydm.steps=200")


BEATS = "LSUN-Bedrooms W4A4 FID 10.60, ImageNet 6.17"


def _beats(title, mine, other, published=BEATS):
    return claim("EfficientDM", f"fine-tuning, against {title}", mine, other, "w4a4", published)


BEATEN = {
    "brecq": ("BRECQ", side("baseline", "method=brecq", MSE, LEARNED)),
    "closed_form": ("closed form (ours)", side("baseline", "method=closed_form", MSE)),
    "ptq4dm": ("PTQ4DM", side("ptq4dm", "plain", MSE)),
    "qdiffusion": ("Q-Diffusion", side("qdiffusion", "", MSE, LEARNED, COMMON)),
    "tfmq": ("TFMQ-DM", side("tfmq", "", MSE)),
    "tdq": ("TDQ", side("tdq", "", MSE)),
    "tcaq": ("TCAQ-DM", side("tcaq", "", MSE)),
    "ptqd": ("PTQD over BRECQ", side("ptqd", "base=brecq", MSE, LEARNED)),
}
PUBLISHED = {"tcaq": "LSUN-Bedrooms W4A4 FID 10.60 against 16.43, ImageNet 6.17 against 30.69"}
# SVDQuant's groups have their own table of who is quantized: fine-tuning takes it over.
TABLED = {
    "svdquant": ("SVDQuant, under its table", _branch()),
    "closed_form": (
        "closed form (ours), under SVDQuant's table",
        side("baseline", "method=closed_form", MSE, TABLE),
    ),
    "ptq4dit": ("PTQ4DiT, under SVDQuant's table", side("ptq4dit", "", MSE, TABLE)),
}
PREFIX = "efficientdm_beats_"

UNET = {
    "efficientdm": claim(
        "EfficientDM",
        "fine-tuning, against the ranges it starts from",
        _tuned(),
        side("efficientdm", "untuned"),
        "w4a4",
        "ImageNet W4A4 sFID +0.05 over full precision, FID 6.17",
    ),
    "efficientdm_lora_w2": claim(
        "EfficientDM",
        "low-rank updates, against scales alone",
        _tuned(),
        _tuned("no_lora"),
        "w2a8",
    ),
    "scale_aware": claim(
        "EfficientDM",
        "rates by each layer's step, against their mean for all",
        _tuned(),
        _tuned("rates=mean"),
        "w2a8",
    ),
    "talsq": claim(
        "EfficientDM", "TALSQ, against one learned scale", _tuned(), _tuned("no_talsq"), "w4a4"
    ),
    "distillation": claim(
        "EfficientDM",
        "the teacher's estimate as the target, against noise, on the same 64 recorded trajectories in "
        "the same order",
        _tuned("source=cached", MIXED, MANY),
        _tuned("source=cached,target=noise", MIXED, MANY),
        "w4a4",
        "no images needed",
    ),
    **{
        PREFIX + name: _beats(title, _tuned(), other, PUBLISHED.get(name, BEATS))
        for name, (title, other) in BEATEN.items()
    },
    PREFIX + "svdquant": _beats(TABLED["svdquant"][0], _tuned("", TABLE), TABLED["svdquant"][1]),
    PREFIX + "every_ptq": every(
        "EfficientDM",
        "fine-tuning beats every method above; the ratio is that against the best of them",
        (PREFIX + name for name in (*BEATEN, "svdquant")),
        "w4a4",
        "the central finding of the review (arXiv 2505.05215)",
    ),
    **{
        f"binarydm_{name}": claim(
            "BinaryDM", part, _binary(with_it), _binary(word), "w1a4", published
        )
        for name, part, with_it, word, published in (
            (
                "ebb",
                "EBB, without LRM",
                "no_lrm",
                "no_ebb,no_lrm",
                "LSUN-Bedrooms W1A4 FID 10.87 -> 8.53 (W1A32 8.43 -> 7.39)",
            ),
            (
                "lrm",
                "LRM, with EBB",
                "",
                "no_lrm",
                "LSUN-Bedrooms W1A4 FID 8.53 -> 7.74 (W1A32 7.39 -> 6.99)",
            ),
            (
                "progressive",
                "progressive binarization, against all at once",
                "",
                "no_progressive",
                UNKNOWN,
            ),
        )
    },
}

DIT |= {
    **{
        PREFIX + name: _beats(title, _tuned("", TABLE), other)
        for name, (title, other) in TABLED.items()
    },
    PREFIX + "every_ptq": every(
        "EfficientDM",
        "fine-tuning beats every method above; the ratio is that against the best of them",
        (PREFIX + name for name in TABLED),
        "w4a4",
        "the central finding of the review (arXiv 2505.05215)",
    ),
}
