"""Observers: merging, splitting and sharding a stream changes nothing; a row never seen raises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qdiff_jax.observe import observers, reservoirs
from qdiff_jax.quant.ranges import shrink_search
from qdiff_jax.quant.spec import QuantSpec

ROWS, BATCH, SIZE = 3, 16, 40
TENSOR = QuantSpec()
OBSERVERS = {
    "minmax": observers.minmax(),
    "ema": observers.ema(0.9),
    "percentile": reservoirs.percentile(0.01, 0.99, size=128),
    "mse": reservoirs.mse(TENSOR, 0, 15, size=128),
}
UPDATE = {name: jax.jit(o.update) for name, o in OBSERVERS.items()}
MERGE = {name: jax.jit(o.merge) for name, o in OBSERVERS.items()}
EXACT = ("minmax", "percentile", "mse")  # order-free; ema depends on order by definition
every_observer = pytest.mark.parametrize("name", OBSERVERS)


@functools.cache
def stream():
    """Values [N, SIZE] of N samples in mixed rows, each row with its own spread."""
    r = np.random.default_rng(0)
    row = r.integers(0, ROWS, 6 * BATCH).astype(np.int32)
    x = r.standard_normal((6 * BATCH, SIZE)) * (1.0 + row[:, None])
    return x.astype(np.float32), row


def arguments(name, start, stop):
    x, row = stream()
    x, row = x[start:stop], row[start:stop]
    common = (x.min(1), x.max(1), row)
    if OBSERVERS[name].takes == "range":
        return common
    return (*common, x, np.arange(start, stop, dtype=np.int32))


def observe(name, batches, rows=ROWS):
    state = OBSERVERS[name].init(rows)
    for start, stop in batches:
        state = UPDATE[name](state, *arguments(name, start, stop))
    return state


def batches(first, last):
    return [(BATCH * i, BATCH * (i + 1)) for i in range(first, last)]


def assert_same(name, a, b):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if name in EXACT:
            np.testing.assert_array_equal(one, other)
        else:
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@every_observer
def test_merge_continues_the_stream_and_is_associative(name):
    whole = observe(name, batches(0, 6))
    a, b, c = (observe(name, batches(i, i + 2)) for i in (0, 2, 4))
    merge = MERGE[name]
    assert_same(name, merge(merge(a, b), c), whole)
    assert_same(name, merge(a, merge(b, c)), whole)
    empty = OBSERVERS[name].init(ROWS)
    assert_same(name, merge(empty, a), a)
    assert_same(name, merge(a, empty), a)


@pytest.mark.parametrize("name", EXACT)
def test_order_and_batch_size_do_not_matter(name):
    whole = observe(name, batches(0, 6))
    assert_same(name, observe(name, batches(0, 6)[::-1]), whole)
    assert_same(name, observe(name, [(0, 6 * BATCH)]), whole)
    a, b = observe(name, batches(0, 3)), observe(name, batches(3, 6))
    assert_same(name, MERGE[name](b, a), MERGE[name](a, b))


@every_observer
def test_sharded_over_eight_devices_is_unsharded(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    state = OBSERVERS[name].init(ROWS)
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    for start, stop in batches(0, 2):
        state = UPDATE[name](state, *jax.device_put(arguments(name, start, stop), split))
    assert_same(name, jax.device_get(state), jax.device_get(observe(name, batches(0, 2))))


@every_observer
def test_a_row_never_seen_raises_with_its_name(name):
    seen = observe(name, batches(0, 6))
    lo, hi = OBSERVERS[name].finish(seen)
    assert lo.shape == hi.shape == (ROWS,)
    assert lo.dtype == hi.dtype == np.float32
    with pytest.raises(ValueError, match=r"rows \[3, 4\] of 5 were never seen"):
        OBSERVERS[name].finish(observe(name, batches(0, 6), rows=5))


@every_observer
def test_a_row_that_does_not_exist_raises_instead_of_joining_a_neighbour(name):
    few = observe(name, batches(0, 6), rows=2)
    count = int((stream()[1] == 2).sum())
    with pytest.raises(ValueError, match=f"{count} samples named a row outside 0..1"):
        OBSERVERS[name].finish(few)
    whole = observe(name, batches(0, 6))
    seen, all_seen = (s.extremes if hasattr(s, "extremes") else s for s in (few, whole))
    np.testing.assert_array_equal(seen.count, all_seen.count[:2])


@every_observer
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_nan_and_infinity_raise(name, bad):
    args = list(arguments(name, 0, BATCH))
    args[1] = np.where(np.arange(BATCH) == 3, bad, args[1]).astype(np.float32)
    state = UPDATE[name](observe(name, batches(0, 6)), *args)
    with pytest.raises(ValueError, match=rf"rows \[{args[2][3]}\] saw NaN or infinity"):
        OBSERVERS[name].finish(state)


def test_minmax_is_the_minimum_and_maximum_of_each_row():
    x, row = stream()
    lo, hi = OBSERVERS["minmax"].finish(observe("minmax", batches(0, 6)))
    for r in range(ROWS):
        assert lo[r] == x[row == r].min()
        assert hi[r] == x[row == r].max()


def test_ranges_per_channel():
    observer = observers.minmax()
    lo = np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32)
    row = jnp.array([0, 1, 0, 1, 1, 0])
    state = observer.update(observer.init(2, (4,)), lo, lo + 1.0, row)
    got, _ = observer.finish(state)
    np.testing.assert_array_equal(got, [lo[[0, 2, 5]].min(0), lo[[1, 3, 4]].min(0)])
    with pytest.raises(ValueError, match="one range per cell"):
        observer.update(observer.init(2), lo, lo, row)


def test_ema_is_the_recurrence_over_the_batches_that_visit_a_row():
    x, row = stream()
    lo, hi = OBSERVERS["ema"].finish(observe("ema", batches(0, 6)))
    for r in range(ROWS):
        averages = None
        for start, stop in batches(0, 6):
            part = x[start:stop][row[start:stop] == r]
            if len(part):
                now = np.array([part.min(), part.max()])
                averages = now if averages is None else 0.9 * averages + 0.1 * now
        np.testing.assert_allclose([lo[r], hi[r]], averages, rtol=1e-5)


def test_percentile_is_exact_below_the_reservoir_and_close_above():
    x, row = stream()
    big = reservoirs.percentile(0.01, 0.99, size=8192)
    state = big.update(big.init(ROWS), *arguments("percentile", 0, 6 * BATCH))
    exact = [np.quantile(x[row == r], [0.01, 0.99]) for r in range(ROWS)]
    np.testing.assert_allclose(np.stack(big.finish(state), 1), exact, rtol=1e-5)
    lo, hi = OBSERVERS["percentile"].finish(observe("percentile", batches(0, 6)))
    spread = 1.0 + np.arange(ROWS)
    # 128 values of each row: the 1 % quantile moves by about half a standard deviation.
    np.testing.assert_allclose(np.stack([lo, hi], 1), exact, atol=0.9 * spread.max())


def test_the_kept_values_are_a_sample_of_the_row_without_repeats():
    x, row = stream()
    state = observe("mse", batches(0, 6))
    for r in range(ROWS):
        kept = np.asarray(state.values[r])
        assert len(np.unique(kept)) == 128
        assert np.isin(kept, x[row == r]).all()
        # Unbiased: the mean lies within four standard errors of zero.
        assert abs(kept.mean()) < 4 * (1 + r) / 128**0.5


def test_mse_shrinks_from_the_exact_extremes():
    x, row = stream()
    everything = reservoirs.mse(TENSOR, 0, 15, size=8192)
    state = everything.update(everything.init(ROWS), *arguments("mse", 0, 6 * BATCH))
    lo, hi = everything.finish(state)
    for r in range(ROWS):
        np.testing.assert_allclose(
            [lo[r], hi[r]], shrink_search(x[row == r], TENSOR, 0, 15), rtol=1e-6
        )
    # From a sample the factor may differ, but it is a factor of the true extremes.
    lo, hi = OBSERVERS["mse"].finish(observe("mse", batches(0, 6)))
    extremes = np.array([[x[row == r].min(), x[row == r].max()] for r in range(ROWS)])
    factors = np.stack([lo, hi], 1) / extremes
    np.testing.assert_allclose(factors[:, 0], factors[:, 1], rtol=1e-5)
    np.testing.assert_allclose(factors * 100, np.round(factors * 100), atol=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_searched_range_is_not_worse_than_min_max(seed):
    """1e5 Gaussian values at 8 bits, of which the observer keeps a sixth: the tails decide."""
    x = np.random.default_rng(seed).standard_normal((390, 256)).astype(np.float32)
    observer, bits = reservoirs.mse(TENSOR, 0, 255), 8
    # The kept set by hand: sorting 1e5 values in a compiled program takes longer than all of this.
    size = observer.init(1).values.shape[1]
    kept = np.random.default_rng(seed + 9).permutation(x.ravel())[None, :size]
    seen = observers.RangeState(x.min()[None], x.max()[None], np.int32([390]), np.int32(0))
    lo, hi = observer.finish(reservoirs.SampleState(seen, kept, np.zeros(kept.shape, np.uint32)))

    def error(lo, hi):
        scale = np.float64(hi - lo) / (2**bits - 1)
        zero = np.round(-lo / scale)
        q = np.clip(np.round(x / scale) + zero, 0, 2**bits - 1)
        return np.square((q - zero) * scale - x).mean()

    assert error(lo[0], hi[0]) <= error(x.min(), x.max())


def test_percentiles_that_a_sample_cannot_know_are_the_extremes():
    """Two spoilt values of two million: cut off by a quantile that the sample knows, kept by one beyond it."""
    values = np.random.default_rng(0).standard_normal(2_000).astype(np.float32)
    spoilt = np.concatenate([values, np.float32([-60.0, 60.0])])
    kept = np.ones((1, spoilt.size), bool)
    state = reservoirs.SampleState(
        observers.RangeState(*np.float32([[-99.0], [99.0]]), np.int32([9]), np.int32(0)),
        spoilt[None],
        np.where(kept, np.uint32(0), np.uint32(0xFFFFFFFF)),
    )
    lo, hi = reservoirs.percentile_search(TENSOR, 0, 255).finish(state)
    # 0.999 leaves two values outside; 0.9999 and 0.99999 none, so they are the extremes of everything seen.
    # Two outliers of that size weigh more than the rounding of all others in 256 steps.
    np.testing.assert_allclose([lo[0], hi[0]], [-99.0, 99.0])
    lo, hi = reservoirs.percentile_search(TENSOR, 0, 255, percentiles=(0.999,)).finish(state)
    np.testing.assert_allclose([lo[0], hi[0]], np.quantile(spoilt, [0.001, 0.999]), rtol=1e-5)


def test_sample_observers_have_one_range_per_tensor():
    with pytest.raises(ValueError, match="per channel"):
        OBSERVERS["mse"].init(2, (4,))
