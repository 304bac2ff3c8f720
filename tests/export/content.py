"""What the stored bundles of every format version hold, from literal numbers: they must never change.

`fixtures/v1` was written once by save_bundle(folder, params=params(), quant=quant(), **CONFIGS), `fixtures/v2`
with quant={**quant(), **grouped()}. A new version of the format gets a folder of its own; these keep loading.
"""

import jax.numpy as jnp
import numpy as np

from qdiff_jax.export.qtensor import QTensor
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.quant.timed import TimeIndexed
from qdiff_jax.sites import SiteQuant

CONFIGS = {
    "plan_json": [
        {
            "site": "down/conv",
            "operand": "weight",
            "bits": 4,
            "spec": {"granularity": "channel"},
            "rule": "weights",
        },
        {"site": "out", "operand": "weight", "bits": None, "spec": None, "rule": "last layer"},
    ],
    "model_config": {"family": "unet_ddpm", "channels": 3, "multipliers": [1, 2]},
    "schedule_config": {"name": "linear", "steps": 1000, "beta_end": 0.02},
    "sampler_config": {"name": "ddim", "steps": 3},
    "source": {"sha256": "00" * 32, "name": "example"},
    "extra": {"method": "rtn"},
}


def floats(*values):
    return jnp.asarray(values[0] if len(values) == 1 else values, jnp.float32)


def grid(scale, zero_point, qmin, qmax, **spec):
    return QParams(
        floats(*scale) if isinstance(scale, tuple) else floats(scale),
        floats(*zero_point) if isinstance(zero_point, tuple) else floats(zero_point),
        floats(qmin),
        floats(qmax),
        QuantSpec(**spec),
    )


def params():
    """All full-precision tensors, the kernels that become codes among them."""
    return {
        "down": {
            "conv": {"kernel": jnp.ones((3, 1, 1, 2)), "bias": floats(0.5, -0.25)},
            "norm": {"scale": floats(1.0, 2.0), "bias": floats(0.0, 1e-9)},
        },
        "mid": {"proj": {"kernel": jnp.ones((3, 2))}},
        "out": {"kernel": floats(0.1, 0.2, 0.3).reshape(3, 1)},
    }


def quant():
    table = QParams(
        floats(0.25, 0.5),
        floats(3.0, 128.0),
        floats(0.0, 0.0),
        floats(255.0, 255.0),
        QuantSpec(),
    )
    conv_codes = np.array([[0xF0, 0x21], [0x08, 0x07]], np.uint8)
    proj_codes = np.array([[-128, 127], [1, -1], [0, 64]], np.int8)
    return {
        "down": {
            "conv": SiteQuant(
                lhs=TimeIndexed(table, floats(999.0, 0.5), "exact"),
                rhs=QTensor(
                    jnp.asarray(conv_codes),
                    grid((0.125, 1 / 3), (8.0, 2.0), 0, 15, granularity="channel"),
                    (3, 1, 1, 2),
                    4,
                ),
            )
        },
        "mid": {
            "proj": SiteQuant(
                lhs=grid(1.0, 0.0, 0, 255, granularity="token", dynamic=True),
                rhs=QTensor(
                    jnp.asarray(proj_codes),
                    grid(0.01, 0.0, -128, 127, symmetric=True, signed=True),
                    (3, 2),
                    8,
                ),
                execute=True,
            ),
            "qk": SiteQuant(lhs=grid(0.1, 128.0, 0, 255), rhs=grid(0.2, 7.0, 0, 255), product=True),
        },
    }


def grouped():
    """A weight in groups whose scales are float16, new in version 2; a number below float16's normal range."""
    spec = dict(symmetric=True, signed=True, granularity="group", axis=-2, group=2, narrow=True)
    scale = floats(0.333251953125, 2.0**-24, 65504.0, 1.0).reshape(2, 2)
    qparams = QParams(
        scale,
        jnp.zeros((2, 2), jnp.float32),
        floats(-7.0),
        floats(7.0),
        QuantSpec(scale_format="f16", **spec),
    )
    codes = np.array([[0x7F, 0x91], [0x00, 0x35]], np.uint8)
    return {"more": {"fc": SiteQuant(rhs=QTensor(jnp.asarray(codes), qparams, (4, 2), 4))}}
