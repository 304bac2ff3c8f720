"""BinaryDM: weights of one bit, trained from two bases to one.

    python -m experiments.quantize --config=configs/methods/binarydm.py:w1a4 --workdir=/tmp/binarydm

Paper: BinaryDM (Zheng et al. 2025, arXiv:2404.05662). Words behind the colon: bits `w1a4` (default), `w1a8`,
`w1a32`; the parts left out, `no_ebb` (one basis from the start), `no_lrm`, `no_progressive` (everything binary
from the first step); `tau=X`, weight of the penalty on the second basis. 200,000 steps at batch 64; first and
last layer and time embedding in full precision (`official:binarydm`). What is trained on: with
`--config.data.source=idx:DIR` (or `npz:FILE`, `folder:DIR`, ...) the training images there, noised anew at
every step, as in the paper; without, the full-precision prediction on every state of 1,024 recorded
trajectories (20,480 states, of which those of 4 trajectories are held out: the transition is judged on them, as
on 64 held-out images). Signs of the weights without any training stand beside it as round-to-nearest. Every
field of `BinaryTrainConfig` is a key: `--config.binarydm.remat=True` recomputes blocks in place of keeping
them. `laptop` trains 300 steps at batch 16 and a faster rate on 64 trajectories (1,280 states), spreads the
progression over a twelfth of the steps and takes a penalty of 100, for so few steps, and asks for the
transition from three tenths of them on; `smoke` runs in seconds.

Expected of `binarydm.py:w1a4,laptop`: an eps error well below that of bare signs. `transition` of the stage's
report (`variants/binarydm_w1a4/quantize.json`) says when the second basis went and whether it was missed. The
penalty of 100 is taken from the tests' toy, where it gives each scale the pull that lets it go; no figure of
this network at these sizes has been measured.
"""

import dataclasses

from configs.methods._start import parse, start
from qdiff_jax.stages.train_binary import BinaryTrainConfig

BITS = ("w1a4", "w1a8", "w1a32")


def get_config(arg=None):
    arg = parse(
        arg,
        bits=BITS,
        model=("unet",),
        no_ebb=False,
        no_lrm=False,
        no_progressive=False,
        tau=-1.0,
    )
    config = start(arg, rtn="rtn", binarydm="binarydm")
    config.policy = "official:binarydm"
    config.data = dict(source="", split="train")
    if not arg.smoke:
        config.calibration.samples = 64 if arg.laptop else 1024
    train = dict(steps=200_000, batch_size=64, lr=2e-5, tau=9e-2, lrm=1e-4, interval=1)
    if arg.laptop:
        # So few steps need a faster rate, and a penalty that is felt in them.
        train.update(steps=300, batch_size=16, lr=1e-3, schedule="cosine", interval=6)
        train.update(tau=100.0, transition=0.3)
        config.activations.observer = "mse"
    if arg.smoke:
        train.update(
            steps=8, batch_size=8, lrm_samples=8, gate_samples=8, checks=2, transition=0.75
        )
    if arg.tau >= 0:
        train["tau"] = arg.tau
    if arg.no_ebb:
        train["two_bases"] = 2.0
    if arg.no_lrm:
        train["lrm"] = 0.0
    if arg.no_progressive:
        train["interval"] = 0
    config.binarydm = dataclasses.asdict(BinaryTrainConfig(**train))
    return config
