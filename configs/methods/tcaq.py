"""TCAQ-DM: even channels, log2 or uniform attention by step, calibration on the quantized sampler's states.

    python -m experiments.quantize --config=configs/methods/tcaq.py:w4a8 --workdir=/tmp/tcaq

Paper: TCAQ-DM (Huang et al. 2024, arXiv:2412.16700), parts of it reconstructed, see `methods/tcaq.py`. Words
behind the colon: bits `w4a8` (default), `w8a8`, `w4a4`, `w4a32`; `model=unet` (default), `model=dit`;
`rounds=2` (0 for none), `no_tcr` and `no_daq` for ablations; `exponent=paper` for factors with exponent 1 in
every layer.
20,000 steps a unit and 5,000 more in each round: hours on a CPU. Round-to-nearest stands beside it.
`laptop` takes 100 steps a unit and 25 in each round; `smoke` runs in seconds.

Expected of `tcaq.py:w4a8,laptop` on two CPU cores: less than 10 minutes; teacher-forced and rollout errors
below those of round-to-nearest. The paper's gain is largest at 4-bit activations.
"""

import ml_collections

from configs import quickstart
from qdiff_jax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(
        arg,
        bits=("w4a8", "w8a8", "w4a4", "w4a32"),
        model=("unet", "dit"),
        exponent=("search", "paper"),
        rounds=2,
        no_tcr=False,
        no_daq=False,
        laptop=False,
        smoke=False,
    )
    words = "smoke" if arg.smoke else None if arg.laptop else "paper"
    config = ml_collections.ConfigDict(quickstart.get_config(words))
    if arg.smoke:
        config.model = {"unet": "random:miniature", "dit": "random:dit"}[arg.model]
        config.reconstruct.steps = 8
    else:
        config.model = {"unet": "unet_fashion", "dit": "dit_fashion"}[arg.model]
    if arg.laptop and not arg.smoke:
        config.reconstruct.steps = 100
        config.reconstruct.temporal_steps = 1000
    w_bits, a_bits = (int(part) for part in arg.bits[1:].split("a"))
    config.variants = {
        f"{method}_{arg.bits}": dict(method=method, w_bits=w_bits, a_bits=a_bits)
        for method in ("rtn", "tcaq")
    }
    config.tcaq = dict(
        tcr=not arg.no_tcr,
        daq=not arg.no_daq,
        rounds=arg.rounds,
        round_share=0.25,
        factors=dict(exponent=1.0 if arg.exponent == "paper" else "search"),
        softmax=dict(criterion="mle"),
    )
    return config
