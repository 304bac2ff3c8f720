"""agreement: exact against float64 numpy, independent of how the stream is cut, loud on misuse."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_jax.eval import agreement

ROWS = 5


def pairs(count=20, seed=0, noise=0.1):
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(count, 3, 2, 1)).astype(np.float32)
    other = (reference + noise * rng.normal(size=reference.shape)).astype(np.float32)
    row = np.concatenate([np.arange(ROWS), rng.integers(0, ROWS, size=count - ROWS)])
    return reference, other, row.astype(np.int32)


def numpy_metrics(reference, other, row):
    reference, other = reference.astype(np.float64), other.astype(np.float64)
    error, energy = np.square(other - reference), np.square(reference)
    rows = [row == r for r in range(ROWS)]
    return (
        error.sum() / energy.sum(),
        error.mean(),
        np.array([error[m].sum() / energy[m].sum() for m in rows]),
        np.array([error[m].mean() for m in rows]),
    )


def stream(parts):
    state = agreement.init(ROWS)
    for reference, other, row in parts:
        state = jax.jit(agreement.update)(state, reference, other, row)
    return state


def test_matches_float64_numpy():
    batch = pairs()
    rel_mse, mse, rel_rows, mse_rows = numpy_metrics(*batch)
    result = agreement.finish(stream([batch]))
    np.testing.assert_allclose(result.rel_mse, rel_mse, rtol=1e-6)
    np.testing.assert_allclose(result.mse, mse, rtol=1e-6)
    np.testing.assert_allclose(result.rel_mse_rows, rel_rows, rtol=1e-6)
    np.testing.assert_allclose(result.mse_rows, mse_rows, rtol=1e-6)
    np.testing.assert_array_equal(result.samples, np.bincount(batch[2], minlength=ROWS))
    np.testing.assert_allclose(result.sqnr_db, -10 * np.log10(rel_mse), rtol=1e-6)


@given(cut=st.integers(1, 19), seed=st.integers(0, 3))
@settings(deadline=None, max_examples=8, derandomize=True)
def test_stream_and_merge_equal_the_whole(cut, seed):
    batch = pairs(seed=seed)
    head, tail = tuple(v[:cut] for v in batch), tuple(v[cut:] for v in batch)
    whole = agreement.finish(stream([batch]))
    for state in (stream([head, tail]), agreement.merge(stream([head]), stream([tail]))):
        result = agreement.finish(state)
        np.testing.assert_allclose(result.rel_mse_rows, whole.rel_mse_rows, rtol=1e-6)
        np.testing.assert_allclose(result.mse, whole.mse, rtol=1e-6)
        np.testing.assert_array_equal(result.samples, whole.samples)


def test_small_terms_are_not_lost_in_a_long_stream():
    """Plain float32 addition of ones to 1e8 would leave the sum where it was."""
    step = jax.jit(agreement.update)
    zero, large, one = jnp.zeros((1,)), jnp.full((1,), 1e4), jnp.ones((1,))
    state = step(agreement.init(1), zero, large, 0)
    for _ in range(50):
        state = step(state, zero, one, 0)
    assert agreement.finish(state).mse * 51 == 1e8 + 50
    assert agreement.finish(agreement.merge(state, state)).mse * 102 == 2 * (1e8 + 50)


def test_low_precision_inputs_are_summed_in_float32():
    reference = jnp.full((4, 300), 1.0, jnp.bfloat16)
    other = jnp.full((4, 300), 1.0078125, jnp.bfloat16)
    result = agreement.finish(agreement.update(agreement.init(), reference, other))
    np.testing.assert_allclose(result.rel_mse, 0.0078125**2, rtol=1e-6)


def test_equal_models_are_exactly_zero_even_where_the_reference_is():
    reference = jnp.stack([jnp.zeros((3,)), jnp.ones((3,))])
    state = agreement.update(agreement.init(2), reference, reference, jnp.arange(2))
    result = agreement.finish(state)
    assert result.rel_mse == 0.0
    assert result.mse == 0.0
    assert result.sqnr_db == math.inf
    np.testing.assert_array_equal(result.rel_mse_rows, [0.0, 0.0])


def test_divergence_is_a_result():
    reference = jnp.ones((2, 3))
    state = agreement.update(agreement.init(), reference, reference.at[0, 0].set(jnp.inf))
    assert not math.isfinite(agreement.finish(state).rel_mse)


@pytest.mark.parametrize("row", [-1, ROWS])
def test_a_row_that_does_not_exist_is_refused(row):
    reference, other, rows = pairs()
    rows[-1] = row
    with pytest.raises(ValueError, match="1 samples named a row outside 0..4"):
        agreement.finish(stream([(reference, other, rows)]))


def test_a_row_never_seen_is_named():
    state = agreement.init(3)
    state = agreement.update(state, jnp.ones((2, 2)), jnp.ones((2, 2)), jnp.array([0, 2]))
    with pytest.raises(ValueError, match=r"rows \[1\] of 3"):
        agreement.finish(state)


def test_shapes_are_checked():
    state = agreement.init(2)
    with pytest.raises(ValueError, match="one shape"):
        agreement.update(state, jnp.ones((2, 3)), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="row has shape"):
        agreement.update(state, jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.zeros((3,), jnp.int32))
    with pytest.raises(ValueError, match="same rows"):
        agreement.merge(state, agreement.init(3))
    with pytest.raises(ValueError, match="rows=0"):
        agreement.init(0)


def test_thirds_go_by_timestep_and_not_by_position():
    timesteps = np.array([900, 600, 500, 400, 100, 50, 0])  # a sampler counts down
    values = np.array([9.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    # Of seven steps the lowest third takes the odd one.
    assert agreement.thirds(values, timesteps) == {"low": 2.0, "mid": 4.5, "high": 7.5}
    with pytest.raises(ValueError, match="S >= 3"):
        agreement.thirds(values[:2], timesteps[:2])


def test_psnr():
    assert agreement.psnr_db(0.04) == pytest.approx(20.0)
    assert agreement.psnr_db(0.01, data_range=1.0) == pytest.approx(20.0)
    assert agreement.psnr_db(0.0) == math.inf
    assert math.isnan(agreement.psnr_db(math.inf))
