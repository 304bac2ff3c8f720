"""TCAQ-DM: even channels, log2 or uniform attention by step, calibration on the quantized sampler's states.

    python -m experiments.quantize --config=configs/methods/tcaq.py:w4a8 --workdir=/tmp/tcaq

Paper: TCAQ-DM (Huang et al. 2024, arXiv:2412.16700), parts of it reconstructed, see `methods/tcaq.py`. Words
behind the colon: bits `w4a8` (default), `w8a8`, `w4a4`, `w4a32`, `w6a6`, `w8a4`; `model=unet` (default),
`model=dit`; `rounds=2` (0 for none) and `no_tcr` for ablations; how DAQ chooses between log2 and uniform,
`criterion=mle` (default, the paper's), `mse`, `attn_out_mse`, or `uniform`, which keeps its tables and chooses
nothing (`no_daq` says the same: the ablation of the choice); `exponent=paper` for factors with exponent 1 in
every layer; `softmax=target` for softmax outputs at the target bits (policy `official:tcaq`);
`rounding=closed_form` solves the weights anew in every round, before its activation steps. 256 trajectories,
20,000 steps a unit and 5,000 more in each round: hours on a CPU. Round-to-nearest stands beside it. `laptop`
takes 16 trajectories, 100 steps of 16 a unit and 25 in each round; `smoke` runs in seconds. `budget=N` is for
comparing rounds at equal cost: the first pass gets (1 + N/4) / (1 + rounds/4) times its steps, those of the
time layers too, so that all passes together are as long as with N rounds. With `laptop` N is 2 unless given,
whatever `rounds` is; at the papers' size the 20,000 stay unless it is given.

Expected of `tcaq.py:w4a8,laptop` on two CPU cores: less than 10 minutes; teacher-forced and rollout errors
below those of round-to-nearest. The paper's gain is largest at 4-bit activations.
"""

from configs.methods._start import ROUNDING, parse, start
from qdiff_jax.quant.softmax_grid import CRITERIA

SHARE = 0.25  # of the first pass's steps, in each round


def get_config(arg=None):
    arg = parse(
        arg,
        exponent=("search", "paper"),
        rounds=2,
        no_tcr=False,
        no_daq=False,
        criterion=CRITERIA,
        budget=-1,
        softmax=("8", "target"),
        **ROUNDING,
    )
    if arg.no_daq and arg.criterion not in (CRITERIA[0], "uniform"):
        raise ValueError(
            f"no_daq is criterion=uniform, and criterion={arg.criterion} was given: leave one of them out."
        )
    config = start(arg, rtn="rtn", tcaq="tcaq")
    if arg.smoke:
        config.reconstruct.steps = 8
    elif arg.laptop:
        config.reconstruct.steps = 100
        config.reconstruct.temporal_steps = 1000
    else:
        config.calibration.samples = 256
    budget = 2 if arg.budget < 0 and arg.laptop else arg.budget
    if budget >= 0 and not arg.smoke:
        longer = (1 + SHARE * budget) / (1 + SHARE * arg.rounds)
        for key in ("steps", "temporal_steps"):
            config.reconstruct[key] = round(config.reconstruct[key] * longer)
    if arg.softmax == "target":
        config.policy = "official:tcaq"
    config.tcaq = dict(
        tcr=not arg.no_tcr,
        daq=True,
        rounds=arg.rounds,
        round_share=SHARE,
        factors=dict(exponent=1.0 if arg.exponent == "paper" else "search"),
        softmax=dict(criterion="uniform" if arg.no_daq else arg.criterion),
    )
    return config
