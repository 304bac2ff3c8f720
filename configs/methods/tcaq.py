"""TCAQ-DM: even channels, log2 or uniform attention by step, calibration on the quantized sampler's states.

    python -m experiments.quantize --config=configs/methods/tcaq.py:w4a8 --workdir=/tmp/tcaq

Paper: TCAQ-DM (Huang et al. 2024, arXiv:2412.16700), parts of it reconstructed, see `methods/tcaq.py`. Words
behind the colon: bits `w4a8` (default), `w8a8`, `w4a4`, `w4a32`; `model=unet` (default), `model=dit`;
`rounds=2` (0 for none), `no_tcr` and `no_daq` for ablations; `exponent=paper` for factors with exponent 1 in
every layer; `softmax=target` for softmax outputs at the target bits (policy `official:tcaq`);
`rounding=closed_form` solves the weights anew in every round, before its activation steps.
20,000 steps a unit and 5,000 more in each round: hours on a CPU. Round-to-nearest stands beside it.
`laptop` takes 100 steps of 16 a unit and 25 in each round (150 where there are none); `smoke` runs in seconds.

Expected of `tcaq.py:w4a8,laptop` on two CPU cores: less than 10 minutes; teacher-forced and rollout errors
below those of round-to-nearest. The paper's gain is largest at 4-bit activations.
"""

from configs.methods._start import ROUNDING, parse, start


def get_config(arg=None):
    arg = parse(
        arg,
        exponent=("search", "paper"),
        rounds=2,
        no_tcr=False,
        no_daq=False,
        softmax=("8", "target"),
        **ROUNDING,
    )
    config = start(arg, rtn="rtn", tcaq="tcaq")
    if arg.smoke:
        config.reconstruct.steps = 8
    elif arg.laptop:
        # As many in all with rounds as without.
        config.reconstruct.steps = 100 if arg.rounds else 150
        config.reconstruct.temporal_steps = 1000
    if arg.softmax == "target":
        config.policy = "official:tcaq"
    config.tcaq = dict(
        tcr=not arg.no_tcr,
        daq=not arg.no_daq,
        rounds=arg.rounds,
        round_share=0.25,
        factors=dict(exponent=1.0 if arg.exponent == "paper" else "search"),
        softmax=dict(criterion="mle"),
    )
    return config
