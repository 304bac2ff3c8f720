"""PTQD: noise correction, variance schedule calibration and step-aware bits, on top of another method.

    python -m experiments.quantize --config=configs/methods/ptqd.py:w4a8 --workdir=/tmp/ptqd

Paper: PTQD (He et al. 2023, arXiv:2305.10657). Words behind the colon: bits `w4a8` (default), `w8a8`, `w4a4`,
`w4a32`, `w6a6`, `w8a4`; `base=brecq` (default, the paper's; `rtn` with `laptop` and `smoke`), `base=rtn`,
`base=tfmq`; `model=unet` (default), `model=dit`; `eta=1` for ancestral DDIM, where the variance schedule is
calibrated (at eta 0 there is no noise to calibrate, and the report says so); `mixed` for 4 to 8 activation bits
by step, whatever the bits say; `faithful` for the official code's statistics; `terms=slope`, `bias` or
`variance` for one term of the correction alone, `none` for none (default: all); `rounding=closed_form` under
BRECQ and TFMQ-DM. 20 steps on the quadratic grid and 1,024 trajectories, of which reconstruction sees one step
each; under BRECQ one range for each weight tensor, 10,000 steps of 8 a unit and 5,000 of 16 for the activation
scales, as in the paper's code; under TFMQ-DM its own 20,000: hours on a CPU. `laptop` takes 16 trajectories,
one range for each output channel, and 150 steps of 16 a unit; `smoke` runs in seconds (`ptqd.py:smoke`).

Expected of `ptqd.py:w4a8,laptop` on two CPU cores: less than 10 minutes; the teacher-forced eps error below
that of round-to-nearest, and the rollout error too (0.8 of it or less). At 4-bit activations only the first
holds: the statistics come from full-precision states, which the quantized trajectory leaves.
"""

from configs.methods._start import ROUNDING, parse, start

TERMS = ("all", "slope", "bias", "variance", "none")


def get_config(arg=None):
    arg = parse(
        arg,
        base=("default", "rtn", "brecq", "tfmq"),
        eta=0.0,
        mixed=False,
        faithful=False,
        terms=TERMS,
        **ROUNDING,
    )
    paper = not (arg.laptop or arg.smoke)
    base = arg.base
    if base == "default":
        base = "brecq" if paper else "rtn"
    # With bits by step the activation bits behind the name say nothing.
    name = "_".join(["ptqd", *([base] if base != "rtn" else []), *(["mixed"] if arg.mixed else [])])
    config = start(arg, **{name: "ptqd"})
    config.sampler.eta = arg.eta
    config.ptqd = dict(
        base=base,
        variant="faithful" if arg.faithful else "fixed",
        slope=arg.terms in ("all", "slope"),
        bias=arg.terms in ("all", "bias"),
        calibrate_variance=arg.terms in ("all", "variance"),
        step_bits=(4, 5, 6, 7, 8) if arg.mixed else (),
        per_tensor=paper and base == "brecq",
        batch_size=64,
    )
    if paper:
        config.calibration.update(samples=1024, selector="random_steps", count=1024)
    if paper and base == "brecq":
        config.reconstruct.update(steps=10_000, batch_size=8)
        config.reconstruct.activation_batch = 16
    return config
