"""PTQD: noise correction, variance schedule calibration and step-aware bits, on top of another method.

    python -m experiments.quantize --config=configs/methods/ptqd.py:w4a8 --workdir=/tmp/ptqd

Paper: PTQD (He et al. 2023, arXiv:2305.10657). Words behind the colon: bits `w4a8` (default), `w8a8`, `w4a4`,
`w4a32`; `base=rtn` (default), `base=brecq`, `base=tfmq`; `model=unet` (default), `model=dit`; `eta=1` for
ancestral DDIM, where the variance schedule is calibrated (at eta 0 there is no noise to calibrate, and the
report says so); `mixed` for 4 to 8 activation bits by step; `faithful` for the official code's statistics;
`terms=slope`, `bias` or `variance` for one term of the correction alone (default: all);
`rounding=closed_form` under BRECQ and TFMQ-DM.
20 steps on the quadratic grid and 16 trajectories (the paper's code takes 1,024:
`--config.calibration.samples=1024`), with the papers' 20,000 steps a unit under BRECQ and TFMQ-DM: hours on a
CPU with those. `laptop` takes 150 steps of 16 a unit; `smoke` runs in seconds (`ptqd.py:smoke`).

Expected of `ptqd.py:w4a8,laptop` on two CPU cores: less than 10 minutes; the teacher-forced eps error below
that of round-to-nearest, and the rollout error too (0.8 of it or less). At 4-bit activations only the first
holds: the statistics come from full-precision states, which the quantized trajectory leaves.
"""

from configs.methods._start import ROUNDING, parse, start

TERMS = ("all", "slope", "bias", "variance", "none")


def get_config(arg=None):
    arg = parse(
        arg,
        base=("rtn", "brecq", "tfmq"),
        eta=0.0,
        mixed=False,
        faithful=False,
        terms=TERMS,
        **ROUNDING,
    )
    name = "ptqd" if arg.base == "rtn" else f"ptqd_{arg.base}"
    config = start(arg, **{name: "ptqd"})
    config.sampler.eta = arg.eta
    config.ptqd = dict(
        base=arg.base,
        variant="faithful" if arg.faithful else "fixed",
        slope=arg.terms in ("all", "slope"),
        bias=arg.terms in ("all", "bias"),
        calibrate_variance=arg.terms in ("all", "variance"),
        step_bits=(4, 5, 6, 7, 8) if arg.mixed else (),
        batch_size=64,
    )
    return config
