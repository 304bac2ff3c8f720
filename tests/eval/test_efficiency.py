"""How many samples order variants: against cases whose answer follows from the normal distribution."""

import numpy as np
import pytest
from scipy.stats import norm

from qdiff_jax.eval.efficiency import samples_needed

COUNT = 4000
SIZES = (2, 5, 10, 20, 40, 80, 160)


def noisy(gap, seed=0):
    """Two variants whose samples differ by `gap` on average, each with independent noise."""
    rng = np.random.default_rng(seed)
    pool = rng.standard_normal((2, COUNT)) + gap * np.arange(2)[:, None]
    return lambda variant, chosen: pool[variant][chosen].mean()


def test_the_share_of_right_orders_follows_the_normal_law():
    found = samples_needed(noisy(0.5), 2, COUNT, SIZES, draws=400)
    expected = norm.cdf(0.5 * np.sqrt(np.array(SIZES) / 2))
    np.testing.assert_allclose(found.correct, expected, atol=0.06)
    assert found.needed in (20, 40)  # the law says 22


def test_shared_noise_needs_fewer_samples():
    common = np.random.default_rng(1).standard_normal(COUNT)
    paired = samples_needed(lambda v, i: (common[i] + 0.5 * v).mean(), 2, COUNT, SIZES, draws=20)
    assert paired.needed == 2
    np.testing.assert_array_equal(paired.correct, 1.0)


def test_a_falling_metric_and_three_variants():
    values = np.array([0.9, 0.8, 0.7])
    found = samples_needed(lambda v, i: values[v], 3, COUNT, SIZES, rising=False, draws=5)
    assert found.needed == 2
    wrong = samples_needed(lambda v, i: values[v], 3, COUNT, SIZES, draws=5)
    assert wrong.needed is None
    assert not wrong.correct.any()


def test_a_lucky_small_size_does_not_count():
    # Right at 10, wrong at 20, right from 40 on: only from 40 is it to be trusted.
    order = {10: 1.0, 20: -1.0}
    found = samples_needed(
        lambda v, i: v * order.get(len(i), 1.0 if len(i) >= 40 else -1.0), 2, COUNT, SIZES, draws=3
    )
    assert found.needed == 40


def test_sizes_that_the_pool_cannot_give_are_refused():
    with pytest.raises(ValueError, match="half of the pool, 50"):
        samples_needed(lambda v, i: 0.0, 2, 100, (60,))
    with pytest.raises(ValueError, match="got 1 variants"):
        samples_needed(lambda v, i: 0.0, 1, 100, (10,))
