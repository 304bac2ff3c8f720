"""What rounding to nearest does to a shipped model: W8A8, W4A8, W4A4 and W2A8, nothing learned.

    python -m experiments.quantize --config=configs/damage.py --workdir=/tmp/damage_unet
    python -m experiments.quantize --config=configs/damage.py:dit --workdir=/tmp/damage_dit

The room that methods have: 20 DDIM steps on the quadratic grid, guidance 2, policy `common` (everything
quantized, first and last layer and softmax at 8 bits), activation ranges by exponential moving average
over full-precision trajectories. Expected: rollout errors that grow in this order, and an eps error
that is largest at W4A4 (the README has the table).
`damage.py:smoke` runs in seconds.
"""

import ml_collections

from configs import quickstart
from qdiff_jax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, model=("unet", "dit"), smoke=False)
    config = ml_collections.ConfigDict(quickstart.get_config("smoke" if arg.smoke else None))
    if arg.smoke:
        config.model = {"unet": "random:miniature", "dit": "random:dit"}[arg.model]
    else:
        config.model = {"unet": "unet_fashion", "dit": "dit_fashion"}[arg.model]
    config.sampler.guidance_scale = 2.0
    bits = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4), "w2a8": (2, 8)}
    config.variants = {
        f"rtn_{name}": dict(method="rtn", w_bits=w, a_bits=a) for name, (w, a) in bits.items()
    }
    return config
