"""TDQ: activation step sizes predicted from the timestep by small networks, folded to step tables.

    python -m experiments.quantize --config=configs/methods/tdq.py:w4a8 --workdir=/tmp/tdq

Paper: Temporal Dynamic Quantization (So et al. 2023, arXiv:2306.02316). Words behind the colon: bits `w4a8`
(default), `w8a8`, `w4a4`, `w4a32`, `w6a6`, `w8a4`; `model=unet` (default), `model=dit`; `mode=ptq` (default:
weights by block reconstruction, 256 trajectories and 20,000 steps a unit, then the networks) or `mode=qat`
(everything together, 200,000 steps at batch 128; without images, on the full-precision prediction);
`rounding=closed_form` solves the weights of `ptq`; `shared` learns one step size for all timesteps (the
ablation). Round-to-nearest stands beside it. `laptop` takes 150 steps of 16 a unit for the weights and 100 for
the networks, or 300 steps of training; `smoke` runs in seconds.

Expected of `tdq.py:w4a8,laptop` on two CPU cores: less than 10 minutes, and a teacher-forced eps error below
that of round-to-nearest. The networks matter at few activation bits (`w4a4`); at 8 bits ranges hardly do.
"""

from configs.methods._start import ROUNDING, parse, start


def get_config(arg=None):
    arg = parse(arg, mode=("ptq", "qat"), shared=False, **ROUNDING)
    config = start(arg, rtn="rtn", tdq="tdq")
    scales = dict(
        encoding=0,  # the model's channels
        hidden=64,
        exact_shift=False,
        shared=arg.shared,
        steps=5_000,
        batch_size=32,
        lr=2e-4,
    )
    train = dict(steps=200_000, batch_size=128, lr=2e-4, warmup=5_000, per_tensor=True)
    if not (arg.laptop or arg.smoke):
        config.calibration.samples = 256
    if arg.laptop:
        # So few steps need a faster rate; a network on a laptop's budget has no time to overfit.
        scales.update(steps=100, lr=2e-3, dropout=0.0)
        train.update(steps=300, batch_size=16, warmup=30, dropout=0.0)
    if arg.smoke:
        scales.update(encoding=16, hidden=16, steps=4, batch_size=8)
        train.update(steps=4, batch_size=8, warmup=2)
        config.reconstruct.steps = 8
    config.tdq = dict(mode=arg.mode, scales=scales, train=train)
    return config
