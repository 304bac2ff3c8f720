"""Log2 or uniform: the evidence, the choice by step, and the grid whose type is data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.quant.either import LOG2, UNIFORM
from qdiff_jax.quant.qparams import QParams, from_range
from qdiff_jax.quant.quantizer import codes, dequantize, fake_quant
from qdiff_jax.quant.softmax_grid import evidence, grid_rows, kind_of
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.quant.timed import TimeIndexed, select, step_context

STEPS = np.float32([900.0, 500.0, 100.0])
HI = np.float32([0.3, 0.7, 1.0])


def softmax(std, seed=0):
    logits = np.random.default_rng(seed).normal(0.0, std, (64, 256))
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def table(kinds=(UNIFORM, LOG2, UNIFORM), bits=4):
    rows = grid_rows(np.float32(kinds), HI, 2.0**bits - 1)
    return TimeIndexed(rows, jnp.asarray(STEPS), "step")


@jax.jit
def quantized(table, x, ctx):
    return fake_quant(select(table, ctx), x)


def test_a_power_law_is_recognised():
    rng = np.random.default_rng(0)
    found = evidence(0.01 * (1.0 + rng.pareto(1.5, 200_000)))
    np.testing.assert_allclose(found.exponent, 2.5, rtol=0.02)
    # Heavy tails make the mean, hence the exponential's likelihood, move from draw to draw.
    np.testing.assert_allclose(found.ratio, 0.42, atol=0.1)


def test_a_shifted_exponential_is_recognised():
    rng = np.random.default_rng(0)
    x = 1.0 + rng.exponential(0.5, 200_000)
    found = evidence(x)
    np.testing.assert_allclose(found.rate, 2.0, rtol=0.02)
    assert -0.2 < found.ratio < 0.0


@pytest.mark.parametrize(
    ("std", "kind"), [(0.05, UNIFORM), (0.2, UNIFORM), (3.0, LOG2), (6.0, LOG2)]
)
def test_peaked_attention_takes_log2(std, kind):
    assert kind_of(softmax(std), 1.0, 255.0) == kind


def test_the_type_switches_once_as_attention_sharpens():
    kinds = [kind_of(softmax(std), 1.0, 255.0) for std in np.linspace(0.1, 5.0, 12)]
    assert kinds[0] == UNIFORM
    assert kinds[-1] == LOG2
    assert sum(a != b for a, b in zip(kinds, kinds[1:])) == 1


def test_zeros_are_dropped_and_values_of_one_kind_decide_nothing():
    x = softmax(3.0)
    assert evidence(np.r_[np.zeros(100), x.ravel()]) == evidence(x)
    assert evidence(np.full(10, 0.25)).ratio == 0.0
    assert kind_of(np.zeros(10), 1.0, 15.0) == UNIFORM


def test_likelihood_is_not_error():
    """Logits of std 1 at 4 bits: log2 has the lower error although the evidence speaks against it."""
    x = softmax(1.0)
    assert kind_of(x, x.max(), 15.0, "mle") == UNIFORM
    assert kind_of(x, x.max(), 15.0, "mse") == LOG2
    with pytest.raises(ValueError, match="unknown"):
        kind_of(x, 1.0, 15.0, "aic")


def test_rows_of_the_union_are_the_two_grids_bit_for_bit():
    x = jnp.asarray(softmax(2.0)[:3, :32], jnp.float32)
    for i, kind in enumerate((UNIFORM, LOG2, UNIFORM)):
        spec = QuantSpec(symmetric=True) if kind == UNIFORM else QuantSpec(grid="log2")
        alone = from_range(spec, 0.0, HI[i], 0.0, 15.0)
        row = select(table(), step_context(STEPS[i], i))
        np.testing.assert_allclose(row.scale, alone.scale, rtol=1e-6)
        alone = alone.replace(scale=row.scale)
        np.testing.assert_array_equal(fake_quant(row, x), fake_quant(alone, x))
        np.testing.assert_array_equal(dequantize(row, codes(row, x)), fake_quant(row, x))


def test_step_may_be_traced_and_a_batch_may_mix_steps():
    x = jnp.asarray(softmax(2.0)[:3, :32], jnp.float32)
    index = np.int32([2, 0, 1])
    mixed = quantized(table(), x, step_context(STEPS[index], index))
    for i, row in enumerate(index):
        alone = quantized(table(), x[i : i + 1], step_context(STEPS[row], row))
        np.testing.assert_array_equal(mixed[i], alone[0])
    assert np.isnan(quantized(table(), x, step_context(123.0, 1))).all()


def test_the_type_is_data():
    x = jnp.asarray(softmax(2.0)[:1, :32], jnp.float32)
    quantized(table(), x, step_context(STEPS[0], 0))
    compiled = quantized._cache_size()
    other = quantized(table((LOG2, UNIFORM, UNIFORM)), x, step_context(STEPS[0], 0))
    assert quantized._cache_size() == compiled
    assert not np.array_equal(other, quantized(table(), x, step_context(STEPS[0], 0)))


def test_gradients_are_those_of_the_chosen_grid():
    x = jnp.float32([[0.02, 0.11, 0.29]])

    def gradient(qparams):
        return jax.grad(lambda v: jnp.sum(fake_quant(qparams, v)))(x)

    for i in (0, 1):
        row = select(table(), step_context(STEPS[i], i))
        spec = QuantSpec(symmetric=True) if i == 0 else QuantSpec(grid="log2")
        alone = QParams(row.scale, jnp.zeros(()), row.qmin, row.qmax, spec)
        np.testing.assert_array_equal(gradient(row), gradient(alone))


def test_a_table_of_one_kind_is_an_ordinary_one():
    assert table((UNIFORM,) * 3).table.spec == QuantSpec(symmetric=True)
    assert table((LOG2,) * 3).table.spec == QuantSpec(grid="log2")
    assert not np.asarray(table((LOG2,) * 3).table.zero_point).any()


def test_a_range_alone_does_not_make_the_union():
    with pytest.raises(ValueError, match="do not follow from a range"):
        from_range(QuantSpec(grid="affine_or_log2", symmetric=True), 0.0, 1.0, 0.0, 15.0)
