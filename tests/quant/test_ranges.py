"""Range estimators against the published figures and against the loops they replace."""

import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.quant import ranges
from qdiff_jax.quant.cells import cells
from qdiff_jax.quant.qparams import from_range, scale_and_zero_point
from qdiff_jax.quant.quantizer import fake_quant
from qdiff_jax.quant.spec import QuantSpec, code_range

TENSOR = QuantSpec()
CHANNEL = QuantSpec(granularity="channel")


@pytest.fixture(scope="module")
def gaussian():
    return np.random.default_rng(0).standard_normal(100_000).astype(np.float32)


def error(params, x):
    return float(np.mean((np.asarray(fake_quant(params, jnp.asarray(x)), np.float64) - x) ** 2))


# bits: (min-max, search), mean squared error on N(0, 1), 1e5 samples.
PUBLISHED = {
    2: (0.668, 0.153),
    3: (0.145, 0.0418),
    4: (0.0314, 0.0123),
    6: (1.78e-3, 1.12e-3),
    8: (1.09e-4, 9.8e-5),
}


@pytest.mark.parametrize("bits", PUBLISHED)
def test_shrink_search_reaches_the_published_error(gaussian, bits):
    widest = error(ranges.estimate_qparams(gaussian, TENSOR, bits, method="minmax"), gaussian)
    best = error(ranges.estimate_qparams(gaussian, TENSOR, bits), gaussian)
    expected = PUBLISHED[bits]
    # Min-max hangs on the two extreme draws, hence the wider tolerance.
    assert widest == pytest.approx(expected[0], rel=0.05)
    assert best == pytest.approx(expected[1], rel=0.03)
    assert best <= widest


def test_four_bits_gain_twofold_with_thresholds_between_2_3_and_3_sigma(gaussian):
    lo, hi = ranges.shrink_search(gaussian, TENSOR, 0, 15)
    params = from_range(TENSOR, lo, hi, 0, 15)
    low = float(-params.zero_point * params.scale)
    high = float((15 - params.zero_point) * params.scale)
    assert 2.3 <= -low <= 3.0
    assert 2.3 <= high <= 3.0
    minmax = ranges.estimate_qparams(gaussian, TENSOR, 4, method="minmax")
    assert error(minmax, gaussian) >= 2 * error(params, gaussian)


def test_one_outlier_of_fifty_sigma(gaussian):
    spoilt = np.append(gaussian, np.float32(50.0))
    figures = {
        (bits, method): error(
            ranges.estimate_qparams(spoilt, TENSOR, bits, method=method), gaussian
        )
        for bits in (4, 8)
        for method in ("minmax", "mse")
    }
    assert figures[4, "minmax"] >= 4 * figures[4, "mse"]
    assert figures[4, "minmax"] == pytest.approx(0.806, rel=0.05)
    assert figures[4, "mse"] == pytest.approx(0.155, rel=0.05)
    assert figures[8, "minmax"] == pytest.approx(3.8e-3, rel=0.05)
    assert figures[8, "mse"] == pytest.approx(3.5e-3, rel=0.05)


def loop_shrink(w, qmin, qmax, symmetric, signed):
    """The official double loop, one channel, in float64."""
    best, chosen = np.inf, None
    for i in range(80):
        lo, hi = (f(w.astype(np.float64), 0) * (1 - 0.01 * i) for f in (np.min, np.max))
        lo, hi = min(lo, 0.0), max(hi, 0.0)
        if symmetric:
            scale, zero = (max(-lo, hi) if signed else hi) / qmax, 0.0
        else:
            scale = (hi - lo) / (qmax - qmin)
            zero = qmin - np.round(lo / scale)
        q = np.clip(np.round(w / scale) + zero, qmin, qmax)
        loss = (np.abs((q - zero) * scale - w) ** 2.4).mean()
        if loss < best:
            best, chosen = loss, (lo, hi)
    return chosen


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (CHANNEL, (3, 3, 5, 7)),
        (QuantSpec(granularity="channel", symmetric=True, signed=True), (9, 70)),
        (QuantSpec(granularity="channel", axis=-2, signed=True), (4, 3, 6)),
        (QuantSpec(granularity="group", group=4, axis=-2), (8, 5)),
        (QuantSpec(granularity="group", group=3), (5, 6)),
        (TENSOR, (3, 50)),
    ],
)
def test_vectorised_search_is_the_loop_over_channels_and_candidates(spec, shape):
    w = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    codes = code_range(spec, 3)
    lo, hi = ranges.shrink_search(w, spec, *codes)
    columns = cells(spec, w)
    expected = [loop_shrink(c, *codes, spec.symmetric, spec.signed) for c in columns.T]
    np.testing.assert_allclose(lo.ravel(), [e[0] for e in expected], rtol=1e-5)
    np.testing.assert_allclose(hi.ravel(), [e[1] for e in expected], rtol=1e-5)
    params = from_range(spec, lo, hi, *codes)
    fake_quant(params, jnp.asarray(w))  # raises if the ranges do not have the shape of a scale


def test_layers_of_many_shapes_share_the_compiled_search(monkeypatch):
    """Convolutions and dense layers of one network: a few column heights, not one compile each."""
    traces = []

    def counted(*args):
        traces.append(args)
        return scale_and_zero_point(*args)

    monkeypatch.setattr(ranges, "scale_and_zero_point", counted)
    ranges.candidate_losses.clear_cache()
    shapes = [(70, 64), (80, 130), (3, 3, 8, 70), (90, 256), (65, 100)]  # height 96
    shapes += [(3, 3, 12, 64), (120, 128), (100, 90)]  # height 128
    shapes += [(3, 3, 3, 8), (30, 6), (1, 1, 50, 8)]  # fewer than 64 channels: folded, height 8
    for shape in shapes:
        ranges.shrink_search(np.random.default_rng(0).standard_normal(shape), CHANNEL, 0, 15)
    assert len(traces) == 3


def test_codes_may_differ_from_channel_to_channel():
    w = np.random.default_rng(1).standard_normal((50, 4)).astype(np.float32)
    qmax = np.array([3.0, 15.0, 3.0, 255.0], np.float32)
    mixed = ranges.shrink_search(w, CHANNEL, np.zeros(4, np.float32), qmax)
    for c, q in enumerate(qmax):
        alone = ranges.shrink_search(w[:, c : c + 1], CHANNEL, 0.0, q)
        np.testing.assert_array_equal([m[c] for m in mixed], [a[0] for a in alone])


def test_range_gain_margin_and_start(gaussian):
    x = gaussian[:4000]
    plain = ranges.estimate_qparams(x, TENSOR, 4, method="minmax")
    for options in ({"range_gain": 0.75}, {"margin": 0.75}):
        narrow = ranges.estimate_qparams(x, TENSOR, 4, method="minmax", **options)
        np.testing.assert_allclose(narrow.scale, 0.75 * plain.scale, rtol=1e-6)
    searched = ranges.estimate_qparams(x, TENSOR, 4)
    widened = ranges.estimate_qparams(x, TENSOR, 4, margin=1.1)
    np.testing.assert_allclose(widened.scale, 1.1 * searched.scale, rtol=1e-6)
    # Known extremes of a larger set: the grid of candidates hangs on them, not on the sample's own.
    lo, hi = ranges.shrink_search(x, TENSOR, 0, 15, start=(-10.0, 10.0), candidates=3)
    np.testing.assert_allclose([lo, hi], [-9.8, 9.8], rtol=1e-6)


def loop_mse(x, levels, one_sided):
    """QDrop's observer as nested loops, in float64."""
    best, chosen = np.inf, None
    lo, hi = min(x.min(), 0.0), max(x.max(), 0.0)
    for i in range(1, 101):
        if one_sided:
            candidates = [(lo * i / 100, hi * i / 100)]
        else:
            unit = (hi - lo) * i / 100 / levels
            candidates = [(-z * unit, (levels - z) * unit) for z in range(levels + 1)]
        for low, high in candidates:
            scale = (high - low) / levels
            zero = -np.round(low / scale)
            q = np.clip(np.round(x / scale) + zero, 0, levels)
            loss = (np.abs((q - zero) * scale - x) ** 2.4).mean()
            if loss < best:
                best, chosen = loss, (low, high)
    return best, chosen


@pytest.mark.parametrize("one_sided", [False, True])
def test_search_over_zero_points_is_the_nested_loop(one_sided):
    x = np.random.default_rng(5).standard_gamma(2.0, 400).astype(np.float32)
    x = x if one_sided else x - 1.0
    lo, hi = ranges.mse_search(x, TENSOR, 0, 7)
    loss, expected = loop_mse(x.astype(np.float64), 7, one_sided)
    np.testing.assert_allclose([lo, hi], expected, rtol=1e-4, atol=1e-6)
    ours = np.asarray(fake_quant(from_range(TENSOR, lo, hi, 0, 7), jnp.asarray(x)), np.float64)
    assert (np.abs(ours - x) ** 2.4).mean() == pytest.approx(loss, rel=1e-4)


def test_search_over_zero_points_is_symmetric_when_the_grid_is():
    spec = QuantSpec(symmetric=True, signed=True)
    x = np.random.default_rng(6).standard_normal(300).astype(np.float32)
    lo, hi = ranges.mse_search(x, spec, -8, 7)
    assert lo == -hi


def test_percentiles(gaussian):
    lo, hi = ranges.percentile(gaussian, TENSOR)
    np.testing.assert_allclose([lo, hi], np.quantile(gaussian, [0.0004, 0.9996]), rtol=1e-5)
    # One far outlier: of the three percentile ranges the widest but one is best at 4 bits.
    spoilt = np.append(gaussian, np.float32(50.0))
    lo, hi = ranges.percentile_search(spoilt, TENSOR, 0, 15)
    np.testing.assert_allclose([lo, hi], np.quantile(spoilt, [0.001, 0.999]), rtol=1e-5)


@pytest.mark.parametrize("shape", [(1,), (1, 3), (4, 1)])
def test_one_element_and_constant_cells(shape):
    x = np.full(shape, -0.7, np.float32)
    for method in ranges.METHODS:
        params = ranges.estimate_qparams(x, CHANNEL, 4, method=method)
        np.testing.assert_allclose(fake_quant(params, jnp.asarray(x)), x, atol=0.7 / 15)


def test_requests_that_make_no_sense_raise():
    x = np.ones((4, 4), np.float32)
    with pytest.raises(ValueError, match="unknown"):
        ranges.estimate_qparams(x, TENSOR, 4, method="kl")
    with pytest.raises(ValueError, match="either bits"):
        ranges.estimate_qparams(x, TENSOR)
    with pytest.raises(ValueError, match="not both"):
        ranges.estimate_qparams(x, TENSOR, 4, qmin=0, qmax=15)
    with pytest.raises(ValueError, match="NaN or"):
        ranges.estimate_qparams(np.where(x == 1, np.nan, x), TENSOR, 4)
    with pytest.raises(ValueError, match="run time"):
        ranges.estimate_qparams(x, QuantSpec(dynamic=True), 4)
    with pytest.raises(ValueError, match="minmax"):
        ranges.estimate_qparams(x, QuantSpec(grid="log2"), 4)
    with pytest.raises(ValueError, match="do not divide"):
        ranges.estimate_qparams(x, QuantSpec(granularity="group", group=3), 4)
