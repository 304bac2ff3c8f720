"""The methods that others are compared with, one at a time: round-to-nearest, BRECQ, TFMQ-DM.

    python -m experiments.quantize --config=configs/methods/baseline.py:w4a8 --workdir=/tmp/rtn_w4a8
    python -m experiments.quantize --config=configs/methods/baseline.py:w4a8,method=brecq --workdir=/tmp/brecq

As in configs/quickstart.py, but with the words of the other configs of this folder, for experiments.compare:
bits `w4a8` (default), `w8a8`, `w4a4`, `w4a32`; `method=rtn` (default), `method=brecq`, `method=tfmq`;
`model=unet` (default), `model=dit`. Papers' settings (20,000 steps a unit, 5,000 for BRECQ's activations:
hours on a CPU) unless `laptop` (150 steps a unit); `smoke` runs in seconds (`baseline.py:smoke`). Expected of
`laptop` on two CPU cores: less than 5 minutes a method; figures of W4A8 and W8A8 in the README.
"""

import ml_collections

from configs import quickstart
from qdiff_jax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(
        arg,
        bits=("w4a8", "w8a8", "w4a4", "w4a32"),
        method=("rtn", "brecq", "tfmq"),
        model=("unet", "dit"),
        laptop=False,
        smoke=False,
    )
    words = "smoke" if arg.smoke else None if arg.laptop else "paper"
    config = ml_collections.ConfigDict(quickstart.get_config(words))
    if arg.smoke:
        config.model = {"unet": "random:miniature", "dit": "random:dit"}[arg.model]
    else:
        config.model = {"unet": "unet_fashion", "dit": "dit_fashion"}[arg.model]
    w_bits, a_bits = (int(part) for part in arg.bits[1:].split("a"))
    config.variants = {
        f"{arg.method}_{arg.bits}": dict(method=arg.method, w_bits=w_bits, a_bits=a_bits)
    }
    return config
