"""The EMA-MSE observer: the search of one batch against `ranges.mse_search`, and who is refused."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from qdiff_jax.policy import Entry, SitePlan
from qdiff_jax.quant.ranges import mse_search
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.stages.batch_ranges import BatchRangeConfig, calibrate_by_batch, search
from qdiff_jax.stages.stage import initial_state


def searched(x, bits, symmetric=False):
    lo, hi = np.float32(min(x.min(), 0)), np.float32(max(x.max(), 0))
    levels = np.float32(2**bits - 1)
    return np.asarray(
        search(x, lo, hi, levels, np.float32(2.4), np.bool_(symmetric), candidates=100)
    )


def error(x, ends, levels):
    unit = np.float64(ends[1] - ends[0]) / levels
    zero = np.round(-ends[0] / unit)
    q = np.clip(np.round(x / unit) + zero, 0, levels)
    return (np.abs((q - zero) * unit - x) ** 2.4).sum()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", ["two-sided", "skewed", "positive", "negative", "always zero"])
def test_the_search_of_a_batch_is_the_search_of_the_observer(kind, bits):
    x = np.random.default_rng(0).standard_normal(256).astype(np.float32)
    x = {"skewed": x * np.abs(x) + 0.5 * x, "positive": np.abs(x), "negative": -np.abs(x)}.get(
        kind, x
    )
    if kind == "always zero":
        x = np.abs(x)
    symmetric = kind == "always zero"
    wanted = mse_search(x, QuantSpec(symmetric=symmetric), 0, 2**bits - 1)
    made = searched(x, bits, symmetric)
    if symmetric:
        np.testing.assert_allclose(made[1], wanted[1], rtol=1e-6)
        return
    # Ties between candidates are broken by float32 rounding; the error is what is searched for.
    levels = 2**bits - 1
    assert error(x, made, levels) <= error(x, wanted, levels) * (1 + 1e-4)
    assert error(x, made, levels) <= error(x, (min(x.min(), 0), max(x.max(), 0)), levels)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="momentum is 1"):
        BatchRangeConfig(momentum=1.0)
    with pytest.raises(ValueError, match="values must be at least 1"):
        BatchRangeConfig(values=0)


@pytest.mark.parametrize(
    ("spec", "bits"),
    [(QuantSpec(signed=True), 8), (QuantSpec(granularity="token"), 8), (QuantSpec(), 10)],
)
def test_a_plan_it_cannot_search_is_refused(spec, bits):
    plan = SitePlan((Entry("block/conv", "input", bits, spec, "rule"),))
    stage = calibrate_by_batch(None, SimpleNamespace(t=np.zeros(4)))
    with pytest.raises(ValueError, match="block/conv:input is planned on"):
        stage.init(initial_state(plan, jax.random.key(0)), None)
