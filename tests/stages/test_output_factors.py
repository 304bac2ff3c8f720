"""Output factors on a network whose gradients are known: two dense layers, the second linear in the first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from qdiff_jax.models.layers import dense
from qdiff_jax.observe.selectors import CalibrationSet
from qdiff_jax.stages.output_factors import (
    _shapes,
    _squares,
    factor_bytes,
    fitting_batch,
    output_factors,
)
from qdiff_jax.stages.stage import Model

from .. import tiny_unet

pytestmark = pytest.mark.slow


class Two(nn.Module):
    @nn.compact
    def __call__(self, x, t, y=None, train=False):
        return dense(self, "second", dense(self, "first", x, 4) * t[:, None], 3)


RNG = np.random.default_rng(0)
PARAMS = {
    "first": {"kernel": RNG.standard_normal((5, 4)), "bias": np.zeros(4)},
    "second": {"kernel": RNG.standard_normal((4, 3)), "bias": np.zeros(3)},
}
MODEL = Model(Two(), (), jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), PARAMS))
SET = CalibrationSet(
    x=RNG.standard_normal((24, 5)).astype(np.float32),
    t=np.full(24, 2.0, np.float32),
    index=np.zeros(24, np.int32),
    branch=np.zeros(24, np.int32),
    y=None,
    eps_fp=np.zeros((24, 3), np.float32),
)
KEY = jax.random.key(1)


def test_chain_rule():
    factors = output_factors(MODEL, SET, KEY, batch_size=8)
    w = 2.0 * PARAMS["second"]["kernel"]
    np.testing.assert_allclose(np.diag(factors["second"]), np.ones(3), rtol=1e-5)
    np.testing.assert_allclose(factors["first"], w @ factors["second"] @ w.T, rtol=1e-4)


def test_batches_change_nothing():
    a, b = (output_factors(MODEL, SET, KEY, batch_size=size) for size in (24, 6))
    np.testing.assert_allclose(a["first"], b["first"], rtol=1e-5)


def test_samples_of_no_weight_are_not_there():
    weights = np.float32([1.0, 0.0] * 12)
    spoilt = SET.replace(t=np.where(weights > 0, SET.t, 100.0).astype(np.float32))
    a, b = (output_factors(MODEL, s, KEY, row_weights=weights) for s in (SET, spoilt))
    np.testing.assert_array_equal(a["first"], b["first"])


def test_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match="must divide the 24 samples"):
        output_factors(MODEL, SET, KEY, batch_size=7)


def test_the_estimate_of_memory_is_near_the_program_s():
    net = tiny_unet.network(tiny_unet.SMALL)
    model = Model(net.module, net.program, net.params)
    x, t = tiny_unet.inputs(tiny_unet.SMALL, 12)
    seen = CalibrationSet(x, t, np.zeros(12, np.int32), np.zeros(12, np.int32), None, x)
    batch = {"x": x, "t": t, "y": None, "weight": np.ones(12, np.float32), "number": np.arange(12)}
    own = _squares.lower(model.module, _shapes(model, batch), model.params, batch, KEY)
    held = own.compile().memory_analysis()
    peak = held.argument_size_in_bytes + held.output_size_in_bytes + held.temp_size_in_bytes
    need = factor_bytes(model, seen, 12)
    assert peak < need < 3 * peak
    assert fitting_batch(model, seen, 12, 1 + (need >> 20), "a stage") == 12
    with pytest.raises(ValueError, match="3 samples at once, more than memory_mib=0; raise"):
        fitting_batch(model, seen, 12, 0, "a stage")


def test_a_batch_that_does_not_fit_is_halved():
    net = tiny_unet.network(tiny_unet.SMALL)
    model = Model(net.module, net.program, net.params)
    x, t = tiny_unet.inputs(tiny_unet.SMALL, 64)
    seen = CalibrationSet(x, t, np.zeros(64, np.int32), np.zeros(64, np.int32), None, x)
    half = factor_bytes(model, seen, 32)
    assert factor_bytes(model, seen, 64) > (limit := -(-half >> 20)) << 20 >= half
    assert fitting_batch(model, seen, 64, limit, "a stage") == 32
