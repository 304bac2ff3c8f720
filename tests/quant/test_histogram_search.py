"""The search of a histogram against the search of all values, at few bits and at eight."""

import numpy as np
import pytest

from qdiff_jax.quant.histogram_search import search_histogram
from qdiff_jax.quant.ranges import mse_search
from qdiff_jax.quant.spec import QuantSpec

BINS = 2048


def searched(x, bits, **options):
    lo, hi = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    counts = np.histogram(x[x != 0.0], BINS, (lo, hi))[0]
    return search_histogram(counts, lo, hi, 2**bits - 1, **options)


def error(x, ends, bits, power=2.4):
    levels, x = 2**bits - 1, np.float64(x)
    unit = (np.float64(ends[1]) - ends[0]) / levels
    zero = np.round(-ends[0] / unit)
    q = np.clip(np.round(x / unit) + zero, 0, levels)
    return (np.abs((q - zero) * unit - x) ** power).mean()


def values(kind, size):
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    return {
        "two-sided": x,
        "skewed": x * np.abs(x) + 0.5 * x,
        "outlier": np.append(x, np.float32(60.0)),
        "silu": x / (1 + np.exp(-3 * x)),
        "positive": np.abs(x) + 0.5,
        "negative": -np.abs(x),
        "half zero": np.maximum(x, 0),
    }[kind]


KINDS = ("two-sided", "skewed", "outlier", "silu", "positive", "negative", "half zero")


@pytest.mark.parametrize(("bits", "size"), [(2, 4096), (4, 4096), (8, 512)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_range_is_as_good_as_that_of_all_values(kind, bits, size):
    x = values(kind, size)
    wanted = error(x, mse_search(x, QuantSpec(), 0, 2**bits - 1), bits)
    # At 8 bits 512 values leave two to a step: their own luck with a grid is no bin's to know.
    assert error(x, searched(x, bits), bits) <= wanted * (1.01 if bits < 8 else 1.1)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_fixed_zero_searches_the_width_alone(bits):
    x = values("half zero", 4096)
    lo, hi = searched(x, bits, zero_fixed=True)
    assert lo == 0.0
    np.testing.assert_allclose(
        hi, mse_search(x, QuantSpec(symmetric=True), 0, 2**bits - 1)[1], 0.02
    )


def test_the_loss_of_a_candidate_is_that_of_its_values():
    """One candidate alone: what is minimised is the error, not something that has its minimum near by."""
    x = values("skewed", 200_000)
    few, many = (searched(x, 8, candidates=n) for n in (1, 100))
    assert few[1] - few[0] == pytest.approx(x.max() - x.min(), rel=1e-6)
    assert error(x, many, 8) < 0.9 * error(x, few, 8)


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_a_constant_is_kept(value):
    lo, hi = searched(np.full(100, value, np.float32), 8)
    assert min(abs(lo - value), abs(hi - value)) <= 0.02 * abs(value)


@pytest.mark.parametrize("ends", [(0.5, 1.0), (-1.0, np.nan), (-np.inf, 1.0)])
def test_ends_that_hold_no_zero_are_refused(ends):
    with pytest.raises(ValueError, match="no finite range that contains zero"):
        search_histogram(np.ones(8), *ends, 15)
