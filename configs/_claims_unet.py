"""Claims of the six methods for U-Nets, on the U-Net; `TAKEN` are those that the DiT is asked for too."""

from configs._claims import CHEAP, DEAR, claim, side

GROUP = "unet_methods"
LOSSLESS = "ImageNet W4A8: FID within 0.06 of full precision, with all of it"

# Every unit with as many steps: the time embedding's (TIAR), or the blocks with its projections (without).
ALIKE = "reconstruct.temporal_steps=0"
# At W4A4 the ranges that EfficientDM is held against (configs/_claims_more.py): these runs serve there too.
MSE = "activations.observer=mse"


def _tcaq(words="", *changes):
    """Without rounds, whose steps `laptop` then adds to those of the first pass."""
    return side("tcaq", ",".join(filter(None, ("rounds=0", words))), *changes)


def _ptqd(part, words, against, published, **more):
    return claim("PTQD", part, side("ptqd", words), against, "w4a8", published, seeds=CHEAP, **more)


CLAIMS = {
    "ndtc": claim(
        "PTQ4DM",
        "NDTC, against steps drawn evenly",
        side("ptq4dm", "plain"),
        side("ptq4dm", "plain,selector=random_steps"),
        "w8a8",
        "of the whole method: ImageNet-64 FID 21.7 -> 24.3",
        seeds=CHEAP,
    ),
    "ndtc_one_step": claim(
        "PTQ4DM",
        "NDTC, against the least noisy step alone",
        side("ptq4dm", "plain"),
        side("ptq4dm", "plain,selector=one_step"),
        "w8a8",
        "of the whole method: ImageNet-64 FID 21.7 -> 24.3",
        seeds=CHEAP,
    ),
    "sampler_tensors": claim(
        "PTQ4DM",
        "sampler tensors in 8 bits, against full precision",
        side("ptq4dm"),
        side("ptq4dm", "plain"),
        "w8a8",
        "ImageNet-64 FID 21.63 -> 21.99: no loss",
        seeds=CHEAP,
        aim="no_worse",
    ),
    "selector": claim(
        "Q-Diffusion",
        "every step alike, against as many items at steps drawn at random",
        side("qdiffusion"),
        side("qdiffusion", "", "calibration.selector=random_steps", "calibration.count=320"),
        "w4a8",
    ),
    "split": claim(
        "Q-Diffusion",
        "split of shortcuts",
        side("qdiffusion"),
        side("qdiffusion", "split=none"),
        "w4a8",
        "CIFAR-10 W4A8 FID 188.11 -> 4.93",
    ),
    "tiar": claim(
        "TFMQ-DM",
        "TIAR, with as many steps for every unit",
        side("tfmq", "", ALIKE),
        side("tfmq", "no_tiar", ALIKE),
        "w4a8",
        "LSUN-Bedrooms W4A8 FID -4.52 from 9.36, sFID -13.44",
    ),
    "fsc": claim(
        "TFMQ-DM",
        "FSC",
        side("tfmq"),
        side("tfmq", "no_fsc"),
        "w4a8",
        "LSUN-Bedrooms W4A8 FID -3.29 from 9.36, sFID -11.42",
    ),
    "freeze": claim(
        "TFMQ-DM",
        "Freeze: time embedding at nearest codes, against reconstruction in its blocks",
        side("tfmq", "freeze,no_fsc"),
        side("tfmq", "no_tiar,no_fsc"),
        "w4a8",
        "LSUN-Bedrooms W4A8 FID 9.36 -> 7.08, sFID 22.73 -> 16.82",
    ),
    "tables_everywhere": claim(
        "TFMQ-DM",
        "the code's tables at every site, against the paper's",
        side("tfmq", "variant=faithful"),
        side("tfmq"),
        "w4a8",
    ),
    "tdq": claim(
        "TDQ",
        "step sizes by timestep, against learned shared ones",
        side("tdq", "", MSE),
        side("tdq", "shared", MSE),
        "w4a4",
    ),
    "tcr": claim(
        "TCAQ-DM",
        "TCR with searched exponents, without rounds",
        _tcaq(),
        _tcaq("no_tcr"),
        "w6a6",
        "CIFAR-10 W6A6 FID 26.60 -> 4.59",
    ),
    "tcr_paper": claim(
        "TCAQ-DM",
        "TCR with the paper's exponent, without rounds",
        _tcaq("exponent=paper"),
        _tcaq("no_tcr"),
        "w6a6",
        "CIFAR-10 W6A6 FID 26.60 -> 4.59",
    ),
    "daq": claim(
        "TCAQ-DM",
        "DAQ, against uniform grids; softmax at 8 bits, without rounds",
        _tcaq("", MSE),
        _tcaq("criterion=uniform", MSE),
        "w4a4",
        "FID -0.17 and -0.45",
    ),
    "daq_target": claim(
        "TCAQ-DM",
        "DAQ, against uniform grids; softmax at the target bits, without rounds",
        _tcaq("softmax=target", MSE),
        _tcaq("softmax=target,criterion=uniform", MSE),
        "w4a4",
        "FID -0.17 and -0.45",
    ),
    "par": claim(
        "TCAQ-DM",
        "PAR, against as many steps of every unit without rounds",
        side("tcaq", "", MSE),
        _tcaq("", MSE),
        "w4a4",
        "CIFAR-10 W4A4 FID 9.09 -> 6.38",
    ),
    "ptqd_slope": _ptqd("correlated part", "terms=slope", side("baseline"), LOSSLESS),
    "ptqd_bias": _ptqd("bias", "terms=bias", side("baseline"), LOSSLESS),
    "ptqd_all": _ptqd("all terms", "", side("baseline"), LOSSLESS),
    "ptqd_uncorrelated": _ptqd(
        "uncorrelated part apart from its bias (variance schedule), eta = 1",
        "terms=variance,eta=1.0",
        side("ptqd", "terms=none,eta=1.0"),
        "part of the figure above",
    ),
    "ptqd_variance": _ptqd(
        "variance schedule, eta = 1",
        "terms=variance,eta=1.0",
        side("ptqd", "terms=none,eta=1.0"),
        "part of the figure above",
        aim="spread",
    ),
    "ptqd_mixed": _ptqd(
        "4 to 8 activation bits by step, against 8 throughout",
        "mixed",
        side("ptqd"),
        "19.9 times fewer bit operations than full precision",
        aim="cheaper",
    ),
}

# Claims that the DiT has layers for too, with three seeds each.
TAKEN = {
    name: {**CLAIMS[name], "seeds": DEAR}
    for name in ("ndtc", "tdq", "tcr", "par", "ptqd_slope", "ptqd_bias", "ptqd_all")
}
