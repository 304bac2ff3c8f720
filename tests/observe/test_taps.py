"""What a tap reports of an operand: one statistic per sample, whatever the operand's shape."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.observe.taps import STATISTICS, Tap, measure

measured = jax.jit(measure)


@functools.cache
def operand():
    return np.random.default_rng(0).standard_normal((3, 4, 5, 6)).astype(np.float32)


def test_ranges_keep_the_batch_axis():
    x = operand()
    report = measured(Tap("range"), x)
    np.testing.assert_array_equal(report["lo"], x.min(axis=(1, 2, 3)))
    np.testing.assert_array_equal(report["hi"], x.max(axis=(1, 2, 3)))
    report = measured(Tap("channel_range"), x)
    np.testing.assert_array_equal(report["lo"], x.min(axis=(1, 2)))
    np.testing.assert_array_equal(report["hi"], x.max(axis=(1, 2)))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_vectors_and_half_precision_are_reported_in_float32(statistic):
    x = jnp.asarray(operand()[:, 0, 0], jnp.bfloat16)
    report = jax.eval_shape(functools.partial(measure, Tap(statistic)), x)
    assert {leaf.dtype for leaf in report.values()} == {jnp.dtype("float32")}
    assert {leaf.shape[0] for leaf in report.values()} == {3}


def test_samples_are_the_same_positions_for_every_sample_and_call():
    position = np.broadcast_to(np.arange(120, dtype=np.float32).reshape(4, 5, 6), (3, 4, 5, 6))
    first, second = (measured(Tap("sample", 50), x) for x in (position, position + 1000))
    chosen = np.asarray(first["sample"])
    assert chosen.shape == (3, 50)
    np.testing.assert_array_equal(chosen, np.broadcast_to(chosen[:1], chosen.shape))
    np.testing.assert_array_equal(second["sample"], chosen + 1000)
    assert len(set(chosen[0].tolist())) == 50  # without replacement
    assert chosen[0].max() - chosen[0].min() > 60  # spread over the tensor
    # The range beside it is that of the whole operand, not of the subset.
    np.testing.assert_array_equal(first["hi"], [119.0] * 3)


def test_an_operand_smaller_than_the_sample_is_reported_whole():
    x = operand()
    np.testing.assert_array_equal(measured(Tap("sample", 120), x)["sample"], x.reshape(3, -1))
    np.testing.assert_array_equal(measured(Tap("value"), x)["value"], x)


def test_a_histogram_counts_everything_but_zeros_between_the_ends_of_all_samples():
    x = operand().copy()
    x[0, 0] = 0.0
    counts = np.asarray(measured(Tap("histogram", 64), x)["counts"])
    for sample, row in zip(x, counts, strict=True):
        wanted = np.histogram(sample[sample != 0], 64, (x.min(), x.max()))[0]
        # A value on an edge may fall to either side in float32.
        assert np.abs(row - wanted).sum() <= 2
        assert row.sum() == np.count_nonzero(sample)
    positive = np.asarray(measured(Tap("histogram", 8), np.abs(x) + 7.0)["counts"])
    assert positive[:, :4].sum() == 0  # zero belongs to the range
    assert positive.sum() == x.size


def test_an_unknown_statistic_is_refused():
    with pytest.raises(ValueError, match="'median' is unknown; use one of"):
        measure(Tap("median"), operand())
