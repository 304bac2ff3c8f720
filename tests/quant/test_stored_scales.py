"""Scales of 8 bits (e4m3, e8m0) and 16 (f16): who may not move them; a search knows what will be stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.quant.lora import trained_grid
from qdiff_jax.quant.lsq import learned
from qdiff_jax.quant.qparams import dynamic_qparams, from_range
from qdiff_jax.quant.quantizer import fake_quant
from qdiff_jax.quant.ranges import min_max, shrink_search
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.quant.step_tables import repeated, trained_rows
from qdiff_jax.quant.timed import widen

FIELDS = {"symmetric": True, "signed": True}


@pytest.mark.parametrize("scale_format", ["e4m3", "e8m0"])
def test_nobody_trains_or_widens_them(scale_format):
    held = from_range(QuantSpec(scale_format=scale_format, **FIELDS), -3.0, 3.0, -8, 7)
    refused = f"format '{scale_format}' cannot be"
    for train in (learned, trained_grid, lambda q: trained_rows(repeated(q, 2))):
        with pytest.raises(ValueError, match=f"{refused} trained"):
            train(held)
    with pytest.raises(ValueError, match=f"{refused} widened"):
        widen({"a": held}, 1.1)
    assert float(widen(held, 1.0).scale) == float(held.scale)
    spec = QuantSpec(scale_format=scale_format, dynamic=True, **FIELDS)
    with pytest.raises(ValueError, match=f"{refused} multiplied by a gain"):
        dynamic_qparams(spec, -8, 7, 1.5)
    assert dynamic_qparams(spec, -8, 7)
    plain = from_range(QuantSpec(**FIELDS), -3.0, 3.0, -8, 7)
    assert float(widen(plain, 2.0).scale) == 2 * float(learned(plain).scale)


def test_scales_of_16_bits_are_rounded_before_codes_are_taken():
    """Over all of float16, its subnormal numbers too; training rounds straight through and refuses nothing."""
    spec = QuantSpec(scale_format="f16", granularity="channel", **FIELDS)
    top = np.exp(np.random.default_rng(0).uniform(-20, 15, 4096)).astype(np.float32)
    held = from_range(spec, -top, top, -7, 7)
    wanted = np.clip(np.asarray(top / 7), 2.0**-24, 65504.0).astype(np.float16).astype(np.float32)
    # Ties, and quotients one unit of float32 away from one, may fall either way.
    np.testing.assert_allclose(held.scale, wanted, rtol=1.1 * 2.0**-10, atol=2.0**-24)
    assert (np.asarray(held.scale) == wanted).mean() > 0.99
    np.testing.assert_array_equal(np.asarray(held.scale, np.float16), np.asarray(held.scale))

    moved = held.replace(scale=held.scale * jnp.float32(1.0003))
    trained = trained_grid(moved).scale
    np.testing.assert_array_equal(np.asarray(trained, np.float16), np.asarray(trained))
    gradient = jax.grad(lambda s: trained_grid(held.replace(scale=s)).scale.sum())(moved.scale)
    np.testing.assert_array_equal(gradient, 1.0)
    with pytest.raises(ValueError, match="format 'f16' cannot be trained"):
        learned(held)
    assert np.isnan(from_range(spec, -top * np.nan, top, -7, 7).scale).all()


def test_a_search_weighs_ranges_by_the_scales_that_will_be_stored():
    """Powers of two: of all 80 shrunken ranges the chosen one loses least."""
    x = np.random.default_rng(2).standard_normal((64, 1)).astype(np.float32)
    spec = QuantSpec(scale_format="e8m0", **FIELDS)

    def loss(lo, hi):
        made = fake_quant(from_range(spec, lo, hi, -8, 7), jnp.asarray(x))
        return float(np.sum(np.abs(np.asarray(made) - x) ** 2.4))

    lo, hi = min_max(x, spec)
    losses = [loss(lo * (1 - 0.01 * i), hi * (1 - 0.01 * i)) for i in range(80)]
    assert loss(*shrink_search(x, spec, -8, 7)) == pytest.approx(min(losses), rel=1e-4)
    free = shrink_search(x, QuantSpec(**FIELDS), -8, 7)
    assert loss(*free) > 1.01 * min(losses)
