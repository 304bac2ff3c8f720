"""Step tables: every rule selects the right row or NaN, never a neighbour; rows train apart."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qdiff_jax.quant.qparams import from_range
from qdiff_jax.quant.quantizer import fake_quant
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.quant.timed import (
    TimeIndexed,
    check_schedule,
    from_ranges,
    from_rows,
    locate,
    rowwise,
    select,
    step_context,
    widen,
)

TENSOR = QuantSpec()
CHANNEL = QuantSpec(granularity="channel")
VALUES = jnp.array([10.0, 11.0, 12.0, 13.0])
STEPS = [0.0, 250.0, 500.0, 750.0]

selected = jax.jit(select)


def table(rule, timesteps=STEPS):
    return TimeIndexed(VALUES, jnp.asarray(timesteps), rule)


@pytest.mark.parametrize(
    ("rule", "t", "index", "row"),
    [
        ("step", 250.0, 1, 1),
        ("step", 250.0, 2, None),  # the step exists, but for another timestep
        ("step", 250.0, -1, None),  # index unknown
        ("step", 250.0, 4, None),
        ("exact", 750.0, -1, 3),
        ("exact", 749.0, -1, None),
        ("nearest", 374.0, -1, 1),
        ("nearest", 376.0, -1, 2),
        ("nearest", 0.0, -1, 0),
        ("nearest", -0.5, -1, None),
        ("nearest", 751.0, -1, None),
        ("nearest", np.nan, -1, None),
        ("bin", 0.0, -1, 0),
        ("bin", 249.5, -1, 0),
        ("bin", 250.0, -1, 1),
        ("bin", 999.0, -1, 3),
        ("bin", 1000.0, -1, 3),
        ("bin", 1000.5, -1, None),
        ("bin", -1.0, -1, None),
    ],
)
def test_rules(rule, t, index, row):
    got = float(selected(table(rule), step_context(t, index)))
    assert np.isnan(got) if row is None else got == float(VALUES[row])


def test_a_schedule_that_repeats_a_timestep_needs_the_rule_step():
    repeated = [0.0, 500.0, 500.0, 750.0]
    ctx = step_context(500.0, 2)
    assert float(selected(table("step", repeated), ctx)) == 12.0
    assert float(selected(table("exact", repeated), ctx)) == 11.0  # the first of its name


def test_unknown_rule_and_unequal_rows_raise():
    with pytest.raises(ValueError, match="rule"):
        select(table("sometimes"), step_context(0.0))
    with pytest.raises(ValueError, match="rule"):
        from_rows([VALUES], [0.0], "sometimes")
    with pytest.raises(ValueError, match="2 rows were given for 1"):
        from_rows([VALUES, VALUES], [0.0])
    with pytest.raises(ValueError, match="ascending"):
        from_rows([VALUES, VALUES], [1.0, 0.0], "bin")
    one = from_range(TENSOR, -1.0, 1.0, 0, 15)
    other = from_range(QuantSpec(symmetric=True), 0.0, 1.0, 0, 15)
    with pytest.raises(ValueError, match="structure"):
        from_rows([one, other], [0.0, 1.0])


def quantizers(rule="exact"):
    """Four steps whose range and number of bits differ, per channel."""
    rows = [
        from_range(CHANNEL, -jnp.ones(3) * (i + 1), jnp.arange(1.0, 4.0), 0, 2**bits - 1)
        for i, bits in enumerate((2, 4, 6, 8))
    ]
    return rows, from_rows(rows, STEPS, rule)


def test_a_selected_row_is_the_quantizer_that_was_stacked():
    rows, timed = quantizers()
    tree = {"block": {"conv1": timed, "other": jnp.ones(2)}}
    for t, row in zip(STEPS, rows, strict=True):
        got = selected(tree, step_context(t))
        chex.assert_trees_all_equal(got["block"]["conv1"], row)
        np.testing.assert_array_equal(got["block"]["other"], jnp.ones(2))


def test_a_step_outside_the_rule_poisons_the_output():
    _, timed = quantizers()
    x = jnp.ones((2, 3))
    row = selected(timed, step_context(1.0))
    assert np.isnan(np.asarray(fake_quant(row, x))).all()
    rows = selected(timed, step_context([1.0, 250.0]))
    poisoned = np.isnan(np.asarray(fake_quant(rows, x)))
    np.testing.assert_array_equal(poisoned, [[True] * 3, [False] * 3])


def test_a_mixed_batch_is_the_loop_over_samples_and_maps_no_weight():
    _, timed = quantizers()
    x = jax.random.normal(jax.random.key(0), (5, 4, 4, 3))
    w = jax.random.normal(jax.random.key(1), (3, 3, 3, 2))
    t = jnp.array([500.0, 0.0, 750.0, 0.0, 250.0])

    def conv(timed, ctx, x):
        x = fake_quant(select(timed, ctx), x)
        dims = ("NHWC", "HWIO", "NHWC")
        return x, jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims)

    run = jax.jit(conv)
    x_hat, y = run(timed, step_context(t), x)
    for i in range(5):
        one_x, one_y = run(timed, step_context(t[i]), x[i : i + 1])
        np.testing.assert_array_equal(x_hat[i : i + 1], one_x)
        np.testing.assert_allclose(y[i : i + 1], one_y, atol=1e-5)
    jaxpr = str(jax.make_jaxpr(conv)(timed, step_context(t), x))
    assert "feature_group_count=1" in jaxpr
    assert "batch_group_count=1" in jaxpr


def test_branches_are_two_tables():
    rows, _ = quantizers()
    other = [r.replace(scale=r.scale * 2.0) for r in rows]
    timed = from_rows([rows, other], STEPS, branched=True)
    for branch, expected in enumerate((rows, other)):
        got = selected(timed, step_context(250.0, branch=branch))
        chex.assert_trees_all_equal(got, expected[1])
    # One step, both halves of a guided batch.
    both = selected(timed, step_context(250.0, branch=[0, 1]))
    assert both.rows
    np.testing.assert_array_equal(both.scale, jnp.stack([rows[1].scale, other[1].scale]))
    assert np.isnan(selected(timed, step_context(250.0, branch=2)).scale).all()
    row, valid = locate(timed, step_context([0.0, 750.0, 1.0], branch=[1, 0, 0]))
    np.testing.assert_array_equal(row[:2], [4, 3])
    np.testing.assert_array_equal(valid, [True, True, False])
    # A table without branches ignores whose half it is: no batch axis appears.
    assert not selected(from_rows(rows, STEPS), step_context(250.0, branch=[0, 1])).rows


def test_other_steps_and_other_values_reuse_the_compile():
    _, timed = quantizers()
    x = jnp.ones((2, 3))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(timed, ctx):
        return fake_quant(select(timed, ctx), x)

    for t in STEPS:
        run(timed, step_context(t))
    run(widen(timed, 1.5), step_context(0.0))


def test_check_schedule_names_the_site_the_timestep_and_the_remedy():
    _, timed = quantizers()
    tree = {"down_0_block_0": {"conv1": {"lhs": timed}, "conv2": jnp.ones(3)}}
    check_schedule(tree, STEPS)
    check_schedule(tree, STEPS[::-1])
    with pytest.raises(
        ValueError, match=r"down_0_block_0/conv1/lhs: timestep 10 \(step 1 of 3\)"
    ) as e:
        check_schedule(tree, [0.0, 10.0, 500.0])
    assert "rule='nearest'" in str(e.value)
    # By step, the order counts too.
    tree = {"a": table("step")}
    check_schedule(tree, STEPS)
    with pytest.raises(ValueError, match="a: timestep 750"):
        check_schedule(tree, STEPS[::-1])
    check_schedule({"a": table("bin")}, np.arange(1000))
    check_schedule({"a": table("nearest")}, np.arange(751))


def test_from_ranges_is_from_range_row_by_row():
    lo = -np.arange(1.0, 5.0)[:, None] * np.ones(3)
    hi = jnp.broadcast_to(jnp.arange(1.0, 4.0), (4, 3))
    timed = from_ranges(CHANNEL, lo, hi, 0, 2.0 ** np.array([2, 4, 6, 8]) - 1, STEPS)
    chex.assert_trees_all_equal(timed, quantizers()[1])
    with pytest.raises(ValueError, match="4 ranges were given for 2"):
        from_ranges(CHANNEL, lo, hi, 0, 15, [0.0, 1.0])


def test_widen_stretches_both_ends_and_keeps_zero():
    assert widen((-1.0, 2.0), 1.5) == (-1.5, 3.0)
    assert widen((1.0, 2.0), 1.5) == (0.0, 3.0)  # never moves an end towards zero
    params = from_range(TENSOR, -1.0, 2.0, 0, 15)
    wide = widen({"a": params}, 1.1)["a"]
    np.testing.assert_allclose(wide.scale, 1.1 * params.scale, rtol=1e-6)
    assert float(wide.zero_point) == float(params.zero_point)


def train(optimizer, steps, extra):
    """Visit row 1, then rows 2 and 3 only, with gradient to the visited rows alone."""
    weights = {"scale": jnp.ones((4, 3)), "zero": jnp.arange(4.0)}
    state = optimizer.init(weights)

    def one(weights, state, rows):
        def loss(w):
            return sum((leaf[rows] ** 2).sum() for leaf in jax.tree.leaves(w))

        options = {"rows": rows} if extra else {}
        updates, state = optimizer.update(jax.grad(loss)(weights), state, weights, **options)
        return optax.apply_updates(weights, updates), state

    with jax.numpy_dtype_promotion("standard"):  # optax multiplies by its integer step count
        step = jax.jit(one)
        weights, state = step(weights, state, jnp.array([1, 1]))
        after_visit = (weights, state)
        for _ in range(steps):
            weights, state = step(weights, state, jnp.array([2, 3]))
    return after_visit, (weights, state)


def test_rowwise_adam_leaves_unvisited_rows_and_their_state_bit_identical():
    before, after = train(rowwise(optax.adam(0.1)), 5, extra=True)

    def rows(tree, keep):
        return jax.tree.map(lambda leaf: np.asarray(leaf)[keep], tree)

    chex.assert_trees_all_equal(rows(before, [0, 1]), rows(after, [0, 1]))
    assert (np.asarray(after[0]["scale"][2:]) != np.asarray(before[0]["scale"][2:])).all()
    # The same with one Adam for the whole table: the row that was visited once walks on.
    plain_before, plain_after = train(optax.adam(0.1), 5, extra=False)
    assert (plain_before[0]["scale"][1] != plain_after[0]["scale"][1]).all()


def test_rowwise_moves_a_visited_row_as_its_own_adam_would():
    _, (weights, _) = train(rowwise(optax.adam(0.1)), 4, extra=True)
    with jax.numpy_dtype_promotion("standard"):
        optimizer = optax.adam(0.1)
        w = jnp.ones(3)
        state = optimizer.init(w)
        for _ in range(4):
            updates, state = optimizer.update(2.0 * w, state, w)
            w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(weights["scale"][2], w, rtol=1e-6)
