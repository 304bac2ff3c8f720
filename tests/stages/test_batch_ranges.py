"""The EMA-MSE observer: all values of every batch are searched, and who is refused."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import linen as nn

from qdiff_jax.models.layers import dense
from qdiff_jax.policy import Entry, SitePlan
from qdiff_jax.quant.ranges import mse_search
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.stages.batch_ranges import BatchRangeConfig, calibrate_by_batch
from qdiff_jax.stages.stage import Model, initial_state, run_stage


def toy_calibration(items):
    x = np.random.default_rng(0).standard_normal((items, 50, 20)).astype(np.float32)
    return SimpleNamespace(x=x, t=np.zeros(items, np.float32), y=None)


class Plain(nn.Module):
    """One dense site on x [B, ..., C]."""

    @nn.compact
    def __call__(self, x, t, y):
        del t, y
        return dense(self, "dense", x, 2)


def averaged(calibration, bits, **options):
    params = {"dense": {"kernel": np.ones((20, 2), np.float32), "bias": np.zeros(2, np.float32)}}
    model = Model(Plain(), (), params)
    plan = SitePlan((Entry("dense", "input", bits, QuantSpec(), "rule"),))
    stage = calibrate_by_batch(model, calibration, BatchRangeConfig(batch_size=50, **options))
    _, report = run_stage(stage, initial_state(plan, jax.random.key(0)))
    return tuple(float(v) for v in report["ranges"]["dense:input"])


def error(x, ends, levels):
    unit = (ends[1] - ends[0]) / levels
    zero = np.round(-ends[0] / unit)
    q = np.clip(np.round(x / unit) + zero, 0, levels)
    return np.square((q - zero) * unit - x).mean()


def test_at_eight_bits_the_tails_are_kept():
    """1e5 Gaussian values in two batches: every value is searched, so a range below 4 sigma costs too much."""
    calibration = toy_calibration(100)
    lo, hi = averaged(calibration, 8)
    x = np.float64(calibration.x)
    assert -lo + hi >= 8.0
    assert error(x, (lo, hi), 255) <= 1.1 * error(x, (x.min(), x.max()), 255)


def test_the_average_is_that_of_the_batches_searched_over_all_their_values():
    calibration = toy_calibration(100)
    halves = [
        mse_search(part, QuantSpec(), 0, 15) for part in (calibration.x[:50], calibration.x[50:])
    ]
    wanted = [0.9 * old + 0.1 * new for old, new in zip(*halves, strict=True)]
    found = averaged(calibration, 4)
    ends = [error(np.float64(calibration.x), pair, 15) for pair in (found, wanted)]
    assert ends[0] == pytest.approx(ends[1], rel=0.01)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="momentum is 1"):
        BatchRangeConfig(momentum=1.0)
    with pytest.raises(ValueError, match="bins must be at least 1"):
        BatchRangeConfig(bins=0)


@pytest.mark.parametrize(
    ("spec", "bits"),
    [(QuantSpec(signed=True), 8), (QuantSpec(granularity="token"), 8), (QuantSpec(), 10)],
)
def test_a_plan_it_cannot_search_is_refused(spec, bits):
    plan = SitePlan((Entry("block/conv", "input", bits, spec, "rule"),))
    stage = calibrate_by_batch(None, SimpleNamespace(t=np.zeros(4)))
    with pytest.raises(ValueError, match="block/conv:input is planned on"):
        stage.init(initial_state(plan, jax.random.key(0)), None)
