"""PTQ4DM: ranges alone, calibrated at steps drawn from a normal distribution (NDTC).

    python -m experiments.quantize --config=configs/methods/ptq4dm.py:w4a8 --workdir=/tmp/ptq4dm

Paper: PTQ4DM (Shang et al. 2023, arXiv:2211.15736), whose own setting is `w8a8`. Words behind the colon: bits
`w4a8` (default), `w8a8`, `w4a4`, `w4a32`, `w6a6`, `w8a4`; `model=unet` (default), `model=dit`; the calibration
set `ndtc` (default), or what it is compared with, `random_steps` (every step equally likely) and `one_step`
(the least noisy; `--config.calibration.position=N` for another); `mean=0.4`, `std=0.4` (the code's; the paper
takes std 0.5) of NDTC, and `mirror_bug` for its state and step mirrored in time, as in the code; `plain` keeps
the sampler's own tensors in full precision, which are in 8 bits otherwise. 1,024 trajectories with one step of
each, as in the paper; policy `common` (first and last layer at 8 bits). `laptop` takes 128 trajectories and 256
items; `smoke` runs in seconds (`ptq4dm.py:smoke`).

Expected of `ptq4dm.py:w8a8,laptop` on two CPU cores: less than 10 minutes, an eps error like that of
round-to-nearest at the same bits; at 4-bit weights nothing makes up for nearest rounding.
"""

from configs.methods._start import parse, start


def get_config(arg=None):
    arg = parse(
        arg,
        selector=("ndtc", "random_steps", "one_step"),
        mean=0.4,
        std=0.4,
        mirror_bug=False,
        plain=False,
    )
    config = start(arg, ptq4dm="ptq4dm")
    config.sampler.tensor_bits = 0 if arg.plain else 8
    config.calibration.selector = arg.selector
    config.calibration.position = 0
    config.calibration.update(mean=arg.mean, std=arg.std, mirror_bug=arg.mirror_bug)
    if arg.smoke:
        config.calibration.count = 16
    elif arg.laptop:
        config.calibration.samples = 128
        config.calibration.count = 256
    else:
        config.calibration.samples = 1024
        config.calibration.count = 1024
    return config
