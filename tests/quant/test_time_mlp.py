"""Step sizes from the timestep: their start, their table, the two offsets of SiLU, and what learning gains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_jax.quant.quantizer import codes, dequantize, fake_quant
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.quant.time_mlp import (
    SILU_FLOOR,
    bake,
    frequency_encoding,
    initial_layers,
    predict_step,
    qparams_at,
    start_step,
    time_scale,
)
from qdiff_jax.quant.timed import select, step_context

T = jnp.arange(0.0, 1000.0, 7.0)
GRID = np.float32([20.0, 180.0, 540.0, 930.0])


def scale(lo=-3.0, bits=8, **options):
    seen = {"lo": lo, "hi": 3.0, "mean_magnitude": 0.8, "deviation": 1.0, "dim": 32, **options}
    return time_scale(jax.random.key(1), QuantSpec(), bits, **seen)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(start=st.floats(1e-3, 30.0), seed=st.integers(0, 10))
def test_before_training_every_step_is_within_five_per_cent_of_the_start(start, seed):
    layers = initial_layers(jax.random.key(seed), start)
    np.testing.assert_allclose(predict_step(layers, T), start, rtol=0.05)


def test_encoding_is_cosine_then_sine_from_the_highest_frequency():
    encoded = frequency_encoding(jnp.float32(3.0), 8)
    angles = 3.0 * 10000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(encoded, np.r_[np.cos(angles), np.sin(angles)], rtol=1e-5)
    assert frequency_encoding(jnp.zeros((2, 3)), 8).shape == (2, 3, 8)


def test_start_follows_the_published_rules():
    np.testing.assert_allclose(start_step(0.8, 1.0, 127.0, centred=True), 3.8 / 127)
    np.testing.assert_allclose(start_step(0.2, 0.5, 255.0, centred=False), 8.2 / 255)
    centred, silu = scale(), scale(lo=-0.27)
    np.testing.assert_allclose(qparams_at(centred, T).scale, 3.8 / 127, rtol=0.05)
    np.testing.assert_allclose(qparams_at(silu, T).scale, 16.8 / 255, rtol=0.05)


@pytest.mark.parametrize("bits", [4, 8])
def test_ordinary_activations_get_symmetric_codes(bits):
    grid = qparams_at(scale(bits=bits), jnp.float32(5.0))
    top = 2 ** (bits - 1) - 1
    q = codes(grid, jnp.float32([-1e4, 0.0, 1e4])) - grid.zero_point.astype(jnp.int32)
    np.testing.assert_array_equal(q, [-top, 0, top])


def test_the_table_is_what_the_network_says_and_mixed_steps_are_a_loop():
    held = scale(lo=-0.27)
    table = bake(held, GRID)
    straight = jax.jit(qparams_at)(held, jnp.asarray(GRID))
    np.testing.assert_array_equal(table.table.scale, straight.scale)
    np.testing.assert_array_equal(table.table.zero_point, straight.zero_point)
    index = np.int32([3, 0, 0, 2, 1])
    x = jax.random.normal(jax.random.key(2), (5, 4, 3))
    apply = jax.jit(lambda table, x, ctx: fake_quant(select(table, ctx), x))
    mixed = apply(table, x, step_context(GRID[index], index))
    for i, row in enumerate(index):
        alone = apply(table, x[i : i + 1], step_context(GRID[row], row))
        np.testing.assert_array_equal(mixed[i], alone[0])


def test_the_shared_ablation_has_one_step_for_all_timesteps():
    arguments = dict(lo=-1.0, hi=2.0, mean_magnitude=0.5, deviation=0.5)
    key, spec = jax.random.key(0), QuantSpec()
    alone, shared = (time_scale(key, spec, 4, **arguments, shared=s) for s in (False, True))
    steps = bake(shared, GRID).table.scale
    assert len(np.unique(steps)) == 1
    assert steps[0] == qparams_at(alone, jnp.float32(0.0)).scale
    assert len(np.unique(bake(alone, GRID).table.scale)) > 1


def test_exact_shift_holds_the_floor_of_silu_and_the_default_the_nearest_code():
    exact, default = scale(lo=-0.27, bits=4, exact=True), scale(lo=-0.27, bits=4)
    assert exact.spec.grid == "shifted"
    x = jnp.float32([-SILU_FLOOR, -5.0])
    grids = [qparams_at(s, jnp.float32(100.0)) for s in (exact, default)]
    np.testing.assert_allclose(fake_quant(grids[0], x), -SILU_FLOOR, rtol=1e-6)
    np.testing.assert_array_equal(codes(grids[0], x), [0, 0])
    np.testing.assert_array_equal(dequantize(grids[0], codes(grids[0], x)), fake_quant(grids[0], x))
    zero = grids[1].zero_point
    assert zero == jnp.round(zero)
    assert abs(fake_quant(grids[1], x)[0] + SILU_FLOOR) <= grids[1].scale / 2 + 1e-6
    assert fake_quant(grids[1], jnp.zeros(1)) == 0.0


def test_activations_that_are_never_negative_use_every_code_above_zero():
    held = scale(lo=0.0, bits=8, hi=1.0)
    grid = qparams_at(held, jnp.float32(0.0))
    assert grid.zero_point == 0.0
    # The range is known, so the rule for SiLU does not stretch it.
    np.testing.assert_allclose(grid.scale * 255, 1.0, rtol=0.05)


def test_a_spec_that_no_table_can_hold_is_refused():
    with pytest.raises(ValueError, match="per tensor"):
        time_scale(
            jax.random.key(0), QuantSpec(granularity="channel"), 8,
            lo=-1.0, hi=1.0, mean_magnitude=1.0, deviation=1.0,
        )  # fmt: skip


def test_dropout_draws_by_key_and_is_off_without_one():
    layers = initial_layers(jax.random.key(0), 0.1, 32)
    a, b = (predict_step(layers, T, jax.random.key(k), 0.5) for k in (0, 1))
    assert not np.array_equal(a, b)
    np.testing.assert_array_equal(predict_step(layers, T), predict_step(layers, T))


class TestGrowingActivations:
    """x_t ~ N(0, (1 + 4 t / T)^2) at 4 bits: a step per timestep against one for all."""

    std = jnp.linspace(1.0, 5.0, 21)
    times = jnp.linspace(0.0, 1000.0, 21)
    x = jax.random.normal(jax.random.key(0), (21, 2048)) * std[:, None]

    def errors(self, steps):
        """Mean squared error by timestep for steps [21]; codes -7..7."""
        s = steps[:, None]
        return jnp.mean((jnp.clip(jnp.round(self.x / s), -7, 7) * s - self.x) ** 2, axis=1)

    def searched(self):
        candidates = jnp.linspace(0.1, 3.0, 60)
        every = jax.vmap(lambda s: self.errors(jnp.full(21, s)))(candidates)
        return every.min(axis=0), every

    def test_the_gap_that_there_is_to_close(self):
        best, every = self.searched()
        assert every.sum(axis=1).min() / best.sum() >= 1.4
        relative = (every / self.std[None] ** 2).mean(axis=1).min()
        worst_case = (every[every.sum(axis=1).argmin()] / self.std**2).mean()
        best_relative = (best / self.std**2).mean()
        assert worst_case / best_relative >= 2.3
        assert relative >= best_relative

    def test_training_the_network_closes_it_within_ten_per_cent(self):
        best, _ = self.searched()
        start = time_scale(
            jax.random.key(3), QuantSpec(), 4,
            lo=-20.0, hi=20.0, mean_magnitude=2.4, deviation=3.2, dim=32,
        )  # fmt: skip
        adam = optax.adam(3e-3)

        def loss(layers):
            grid = qparams_at(start, self.times, layers=layers)
            return jnp.mean((fake_quant(grid, self.x) - self.x) ** 2)

        @jax.jit
        def step(layers, state):
            with jax.numpy_dtype_promotion("standard"):
                updates, state = adam.update(jax.grad(loss)(layers), state)
            return optax.apply_updates(layers, updates), state

        layers, state = start.layers, adam.init(start.layers)
        for _ in range(400):
            layers, state = step(layers, state)
        assert self.errors(predict_step(layers, self.times)).sum() <= 1.1 * best.sum()
