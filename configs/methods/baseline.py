"""The methods that others are compared with, one at a time: round-to-nearest, BRECQ, TFMQ-DM, closed form.

    python -m experiments.quantize --config=configs/methods/baseline.py:w4a8 --workdir=/tmp/rtn_w4a8
    python -m experiments.quantize --config=configs/methods/baseline.py:w4a8,method=brecq --workdir=/tmp/brecq

As in configs/quickstart.py, but with the words of the other configs of this folder, for experiments.compare:
bits `w4a8` (default), `w8a8`, `w4a4`, `w4a32`, `w6a6`, `w8a4`; `method=rtn` (default), `method=brecq`,
`method=tfmq`, `method=closed_form`; `rounding=closed_form` under BRECQ and TFMQ-DM; `model=unet` (default),
`model=dit`. Papers' settings (20,000 steps a unit, 5,000 for BRECQ's activations: hours on a CPU) unless
`laptop` (150 steps of 16 a unit); `smoke` runs in seconds (`baseline.py:smoke`). Expected of `laptop`: of `rtn`
and `closed_form`, which take no steps, the rows of the README's first table; those of `brecq` and `tfmq` there
are of 32 samples a step, and `laptop` takes 16.
"""

from configs.methods._start import ROUNDING, parse, start


def get_config(arg=None):
    arg = parse(arg, method=("rtn", "brecq", "tfmq", "closed_form"), **ROUNDING)
    return start(arg, **{arg.method: arg.method})
