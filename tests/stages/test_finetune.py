"""Fine-tuning and EfficientDM's student on a small denoiser: what moves, at what rate, what never does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.export.qtensor import QTensor, dequantize, from_codes
from qdiff_jax.export.qtensor import codes as codes_of
from qdiff_jax.models.registry import predictor
from qdiff_jax.observe.sources import cached, online
from qdiff_jax.quant.qparams import from_range
from qdiff_jax.quant.quantizer import dequantize as values_of
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.quant.timed import TimeIndexed, select, step_context
from qdiff_jax.sites import flatten_sites, nest_sites
from qdiff_jax.stages import finetune as module
from qdiff_jax.stages.finetune import FinetuneConfig, Phase, finetune, schedule
from qdiff_jax.stages.qalora import QALoRAConfig, qalora
from qdiff_jax.stages.stage import decide_codes, fold_weights, kernel_at, run_stage

from . import toy
from .chain import leaves_equal

STEPS = 4
TIMES = np.arange(STEPS, dtype=np.float32)
RATES = {"lora": 0.05, "scales": 1e-3, "tables": 1e-2}
SUM = {"eps_sum": 1.0}
PLAIN = QALoRAConfig(rank=4)


@functools.cache
def recorded():
    return toy.record(toy.model(), STEPS, 6, seed=3)


@functools.cache
def start(w_bits=4, a_bits=4):
    return toy.calibrated(toy.model(), recorded().calibration, TIMES, w_bits, a_bits)


def live():
    return online(toy.sampler(STEPS, eta=1.0), shape=(toy.POINT,), batch_size=4)


def student(config=PLAIN, trained=TIMES, timesteps=TIMES, alone=()):
    return qalora(toy.model(), config, trained, timesteps, alone)


def stage(config=PLAIN, phases=None, source=None, training=FinetuneConfig(), **own):
    phases = (Phase(12, RATES, SUM),) if phases is None else phases
    made = student(config, alone=own.pop("alone", ()))
    return finetune("tuned", toy.model(), made, source or live(), phases, training, **own)


@functools.cache
def tuned(steps=12):
    return run_stage(stage(phases=(Phase(steps, RATES, SUM),)), start(), chunk=5)


def after(work, steps, state=None):
    """The carry after so many steps."""
    carry = work.init(start() if state is None else state, None)
    return work.run(carry, steps) if steps else carry


@functools.cache
def applied():
    return jax.jit(predictor(toy.module(16)))


@pytest.mark.parametrize("base", ["quantized", "full_precision"])
@pytest.mark.parametrize("shared", [False, True])
def test_step_zero_is_the_naively_quantized_model(base, shared):
    """Bit for bit, at every step of the sampler."""
    if shared and base == "full_precision":
        with pytest.raises(ValueError, match="speaks of a quantized base"):
            QALoRAConfig(base=base, base_delta_shared=shared)
        return
    made = student(QALoRAConfig(rank=4, base=base, base_delta_shared=shared))
    trainable, fixed, _ = made.begin(start())
    params, quant = fold_weights(
        toy.model().params, decide_codes(start().quant, toy.model().params)
    )
    variables = jax.jit(made.variables)(trainable, fixed, toy.model().params)
    for name in toy.LAYERS:
        np.testing.assert_array_equal(kernel_at(variables["params"], name), kernel_at(params, name))
    x = recorded().paired.trajectory.x
    for i, t in enumerate(TIMES):
        ctx = step_context(t, i)
        ours = applied()(variables, x[i], ctx, None)
        naive = applied()({"params": params, "quant": quant}, x[i], ctx, None)
        np.testing.assert_array_equal(ours, naive)


def test_codes_that_are_decided_are_where_training_begins():
    """Nearest codes decided beforehand give the student of the ranges; other codes are kept as they are."""
    decided = start().replace(quant=decide_codes(start().quant, toy.model().params))
    ours, naive = (student().begin(state)[1]["bases"] for state in (decided, start()))
    assert leaves_equal(ours, naive)
    flat = flatten_sites(decided.quant)
    moved = codes_of(flat["net/l1"].rhs) ^ 1
    held = from_codes(moved, flat["net/l1"].rhs.qparams, 4)
    flat["net/l1"] = flat["net/l1"].replace(rhs=held)
    other = decided.replace(quant=nest_sites(flat))
    np.testing.assert_array_equal(student().begin(other)[1]["bases"]["net/l1"], moved)
    state, report = run_stage(stage(phases=()), other)
    assert report["codes_moved"] == 0.0
    np.testing.assert_array_equal(codes_of(flatten_sites(state.quant)["net/l1"].rhs), moved)


def test_steps_count_by_their_weights():
    """Nothing moves: each step's loss is its weight, of mean 1, times the loss that all alike give. A sampler
    begins at the last step of the schedule."""
    resting = (Phase(2 * STEPS, {}, SUM),)
    shares = np.float64([0.0, 1.0, 2.0, 5.0])
    plain, weighted = (
        np.asarray(after(stage(phases=resting, **own), 2 * STEPS).losses)
        for own in ({}, {"step_weights": shares})
    )
    np.testing.assert_allclose(weighted, np.tile(shares[::-1] / 2.0, 2) * plain, rtol=1e-5)
    assert plain.min() > 0
    with pytest.raises(ValueError, match="weights for 3 steps, and the trajectories have 4"):
        stage(phases=resting, step_weights=shares[:3])


def test_it_learns_and_ends_in_integers_and_tables():
    state, report = tuned(400)
    assert report["last_loss"] < 0.5 * report["first_loss"]
    assert report["adapted"] == 3
    assert 0.02 < report["codes_moved"] < 0.9
    flat = flatten_sites(state.quant)
    assert set(flat) == set(toy.LAYERS)
    for site in flat.values():
        assert isinstance(site.rhs, QTensor)
        assert isinstance(site.lhs, TimeIndexed)
        assert site.lhs.rule == "step"
        zero = np.asarray(site.lhs.table.zero_point)
        np.testing.assert_array_equal(zero, np.round(zero))
        assert ((zero >= 0) & (zero <= 15)).all()
        assert len(np.unique(site.lhs.table.scale)) == STEPS


def test_merged_integers_are_what_was_trained_bit_for_bit():
    work = stage()
    carry = after(work, 12)
    trainable, fixed = carry.work["trainable"], carry.fixed["student"]
    seen = jax.jit(student().variables)(trainable, fixed, toy.model().params)
    state, _ = work.finish(carry)
    for name in toy.LAYERS:
        stored = dequantize(flatten_sites(state.quant)[name].rhs)
        np.testing.assert_array_equal(stored, kernel_at(seen["params"], name))
    quant = select(state.quant, step_context(2.0, 2))
    for name, site in flatten_sites(select(seen["quant"], step_context(2.0, 2))).items():
        assert leaves_equal(site.lhs, flatten_sites(quant)[name].lhs)


def test_rates_are_proportional_to_the_mean_step_of_the_layer():
    """Of the update, not the gradient: Adam's first step has size 1 whatever the gradient."""
    state = start()
    means = {
        name: float(jnp.mean(flatten_sites(state.quant)[name].rhs.scale)) for name in toy.LAYERS
    }
    assert means["net/l2"] < 0.3 * means["net/l0"]

    def moved(rates):
        one = (Phase(1, {"lora": 0.01}, SUM),)
        carry = after(stage(QALoRAConfig(rank=4, rates=rates), one), 1)
        return {
            name: float(jnp.abs(carry.work["trainable"]["lora"][name].b).max())
            for name in toy.LAYERS
        }

    aware, same, constant = (moved(rates) for rates in ("scale_aware", "mean", "constant"))
    for name in toy.LAYERS:
        assert aware[name] == pytest.approx(0.01 * means[name], rel=1e-4)
        assert same[name] == pytest.approx(0.01 * np.mean(list(means.values())), rel=1e-4)
        assert constant[name] == pytest.approx(0.01, rel=1e-4)
    ratio = aware["net/l2"] / aware["net/l0"]
    assert ratio == pytest.approx(means["net/l2"] / means["net/l0"], rel=1e-4)


@pytest.mark.parametrize("order", ["trajectory", pytest.param("mixed", marks=pytest.mark.slow)])
def test_a_table_row_has_a_gradient_only_where_the_batch_has_its_step(order):
    made = student()
    trainable, fixed, _ = made.begin(start())
    source = cached(recorded().paired, batch_size=2, order=order)
    visit = jax.tree.map(lambda leaf: leaf[0], source.inputs(jax.random.key(2), 0, 1))
    _, batch = source.draw(source.init(jax.random.key(2)), visit, source.data, None)

    def loss(tables):
        variables = made.variables({**trainable, "tables": tables}, fixed, toy.model().params)
        output = predictor(toy.module(16))(variables, batch.x, batch.ctx, None)
        return jnp.sum((output - batch.target) ** 2)

    slopes = jax.jit(jax.grad(loss))(trainable["tables"])
    visited = set(np.atleast_1d(batch.ctx.index).tolist())
    assert len(visited) < STEPS
    assert set(np.asarray(made.rows(fixed, batch.ctx)).tolist()) == visited
    for slope in slopes.values():
        for row in range(STEPS):
            assert (float(slope["scale"][row]) != 0.0) == (row in visited)
            assert row in visited or float(slope["zero_point"][row]) == 0.0


def test_rows_that_nobody_visits_and_their_moments_stay_bit_identical():
    """From the noisiest step on: after three steps rows 3, 2 and 1 have moved and 0 has not. The fifth is the
    first of another trajectory: row 3 moves, and 2, 1 and 0 rest although they have momentum."""
    begun, three, four, five = (kept(after(stage(), n)) for n in (0, 3, 4, 5))
    for old, new, resting in ((begun, three, slice(0, 1)), (four, five, slice(0, 3))):
        for (path, before), (_, now) in zip(*map(jax.tree_util.tree_leaves_with_path, (old, new))):
            np.testing.assert_array_equal(before[resting], now[resting], str(path))
        for name, table in old[0].items():
            moved = np.asarray(table["scale"] != new[0][name]["scale"])
            assert moved.tolist() == [False] * resting.stop + [True] * (STEPS - resting.stop)
    assert all(np.any(leaf[:3] != 0) for leaf in jax.tree.leaves(four[1]))


def kept(carry):
    """Tables and their optimizer's state."""
    return [carry.work[part][label] for part, label in PARTS]


PARTS = (("trainable", "tables"), ("optimizer", "tables"))


def test_phases_are_data_and_what_rests_stays_bit_identical():
    phases = (Phase(4, {"tables": 1e-2}, SUM), Phase(4, {"lora": 0.05}, {"eps_mse": 2.0}))
    begun, first, second = (after(stage(phases=phases), n) for n in (0, 4, 8))
    parts = ("trainable", "optimizer")
    for part in parts:
        assert leaves_equal(begun.work[part]["lora"], first.work[part]["lora"])
        assert leaves_equal(first.work[part]["tables"], second.work[part]["tables"])
        # What no phase trains has neither a copy nor moments.
        assert set(begun.work[part]) == set(second.work[part]) == {"lora", "tables"}
    resting = second.fixed["resting"]
    assert set(resting) == {"scales"}
    assert leaves_equal(resting["scales"], student().begin(start())[0]["scales"])
    assert not leaves_equal(begun.work["trainable"]["tables"], first.work["trainable"]["tables"])
    assert not leaves_equal(first.work["trainable"]["lora"], second.work["trainable"]["lora"])
    rates, weights = schedule(phases, ("lora", "tables"), ("eps_mse", "eps_sum"), 2, 7)
    np.testing.assert_allclose(rates["tables"], [0.005, 0.0025, 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(rates["lora"], [0, 0, 0.05, 0.0375, 0.025], rtol=1e-6)
    np.testing.assert_array_equal(weights["eps_mse"], [0, 0, 2, 2, 2])
    np.testing.assert_array_equal(weights["eps_sum"], [1, 1, 0, 0, 0])
    for wrong in ({"lore": 1.0}, {"base_scales": 1.0}):
        with pytest.raises(ValueError, match="labels are"):
            stage(phases=(Phase(1, wrong, SUM),))
    with pytest.raises(ValueError, match="eps_sum"):
        stage(phases=(Phase(1, RATES, {"eps": 1.0}),))


@pytest.mark.parametrize("steps", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_killed_in_the_middle_of_a_trajectory_and_resumed_equals_uninterrupted(steps, tmp_path):
    training = FinetuneConfig(save_seconds=0.0)
    work = stage(training=training)
    work.run(work.init(start(), tmp_path), steps)
    seen = []
    resumed, report = run_stage(
        stage(training=training, on_progress=lambda done, total, loss: seen.append(done)),
        start(),
        tmp_path,
        chunk=5,
    )
    assert seen[0] == min(steps + 5, 12)
    assert leaves_equal(resumed.quant, tuned()[0].quant)
    assert {k: report[k] for k in ("first_loss", "last_loss")} == {
        k: tuned()[1][k] for k in ("first_loss", "last_loss")
    }


def test_a_middle_of_other_settings_is_not_gone_on_from(tmp_path):
    training = FinetuneConfig(save_seconds=0.0)
    work = stage(training=training)
    work.run(work.init(start(), tmp_path), 3)
    assert stage(training=FinetuneConfig(remat=True)).init(start(), tmp_path).step == 3
    slower = (Phase(12, {**RATES, "lora": 0.01}, SUM),)
    others = (
        (dict(phases=slower), "phases"),
        (dict(source=cached(recorded().paired, batch_size=4)), "source"),
        (dict(source=online(toy.sampler(STEPS), shape=(toy.POINT,), batch_size=4)), "source"),
        (dict(training=FinetuneConfig(weight_decay=0.0)), "weight_decay"),
        (dict(config=QALoRAConfig(rank=4, zp_ste=False)), "student"),
        (dict(step_weights=np.float64([1.0, 1.0, 2.0, 1.0])), "step_weights"),
    )
    for own, named in others:
        with pytest.raises(ValueError, match=f"holds the middle of a run with another {named};"):
            stage(**own).init(start(), tmp_path)


@pytest.mark.parametrize("field", ["weight_decay", "save_seconds"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_settings_of_the_training_are_numbers(field, value):
    with pytest.raises(ValueError, match=f"FinetuneConfig.{field} is {value}"):
        FinetuneConfig(**{field: value})


def test_a_loss_that_is_not_finite_stops_the_run():
    wild = (Phase(8, {"lora": 1e38, "scales": 1e38}, SUM),)
    with pytest.raises(FloatingPointError, match="tuned: the loss became"):
        run_stage(stage(phases=wild), start(), chunk=2)


def test_without_steps_it_is_round_to_nearest():
    state, report = run_stage(stage(phases=(Phase(0, RATES, SUM),)), start())
    nearest = flatten_sites(decide_codes(start().quant, toy.model().params))
    for name, site in flatten_sites(state.quant).items():
        assert leaves_equal(site.rhs, nearest[name].rhs)
        np.testing.assert_array_equal(site.lhs.table.scale, np.full(STEPS, nearest[name].lhs.scale))
    assert report["first_loss"] is None
    assert report["codes_moved"] == 0.0


@pytest.mark.slow
def test_sites_left_alone_keep_their_codes_and_their_one_range():
    state, report = run_stage(stage(alone=("net/l1",)), start())
    assert report["adapted"] == 2
    nearest = flatten_sites(decide_codes(start().quant, toy.model().params))["net/l1"]
    assert leaves_equal(flatten_sites(state.quant)["net/l1"], nearest)
    assert isinstance(flatten_sites(state.quant)["net/l0"].lhs, TimeIndexed)


@pytest.mark.slow
def test_one_learned_range_for_all_steps_instead_of_tables():
    state, _ = run_stage(stage(QALoRAConfig(rank=4, talsq=False)), start())
    before = flatten_sites(start().quant)
    for name, site in flatten_sites(state.quant).items():
        assert site.lhs.scale.shape == ()
        assert float(site.lhs.scale) != float(before[name].lhs.scale)


@pytest.mark.slow
def test_weights_alone():
    phases = (Phase(800, {"lora": 0.05, "scales": 3e-3}, SUM),)
    work = stage(QALoRAConfig(rank=16), phases, cached(recorded().paired, batch_size=6))
    state, report = run_stage(work, start(2, None), chunk=100)
    assert all(site.lhs is None for site in flatten_sites(state.quant).values())
    assert report["last_loss"] < 0.7 * report["first_loss"]  # of the same six samples


@pytest.mark.slow
def test_a_shared_step_takes_the_updates_of_both_its_uses():
    one = (Phase(1, {"scales": 1e-3, "base_scales": 1e-3}, SUM),)
    shared = QALoRAConfig(rank=4, base_delta_shared=True)
    begun = after(stage(shared, one), 0)
    before = {name: np.asarray(v) for name, v in begun.work["trainable"]["scales"].items()}
    carry = stage(shared, one).run(begun, 1)
    for name in toy.LAYERS:
        scale = carry.work["trainable"]["scales"][name]
        np.testing.assert_array_equal(scale, carry.work["trainable"]["base_scales"][name])
        size = np.abs(np.asarray(scale) - before[name])
        assert size.max() <= 2.1e-3
        # At the start both pull the same way where W0 follows the step, and then count twice.
        assert size.max() > 1.1e-3
    # W0 is valued with the learned step: with B still 0 the weight is its codes times that step.
    trainable, fixed = carry.work["trainable"], carry.fixed["student"]
    grid = fixed["grids"]["net/l0"].replace(scale=trainable["scales"]["net/l0"])
    seen = jax.jit(student(shared).variables)(trainable, fixed, toy.model().params)
    expected = values_of(grid, fixed["bases"]["net/l0"].astype(jnp.int32))
    np.testing.assert_allclose(kernel_at(seen["params"], "net/l0"), expected, rtol=1e-6)


def test_weight_decay_is_decoupled_and_has_the_rate_of_its_leaf():
    """As long as B is 0, A has no gradient: it becomes A (1 - lr mean(delta_w) decay)."""
    work = stage(phases=(Phase(1, {"lora": 1.0}, SUM),), training=FinetuneConfig(weight_decay=0.5))
    drawn = student().begin(start())[0]["lora"]
    trained = after(work, 1).work["trainable"]["lora"]
    for name in toy.LAYERS:
        mean = float(jnp.mean(flatten_sites(start().quant)[name].rhs.scale))
        np.testing.assert_allclose(trained[name].a, drawn[name].a * (1 - 0.5 * mean), rtol=1e-5)


def test_only_a_zero_point_is_learned_as_one():
    """Of a symmetric grid it is 0, and a float grid has exponent bits in its place: decay moved them."""
    grids = {
        "net/l0": from_range(QuantSpec(grid="e2m1"), -3.0, 3.0, -7, 7),
        "net/l1": from_range(QuantSpec(symmetric=True, signed=True), -3.0, 3.0, -8, 7),
    }
    flat = flatten_sites(start().quant)
    mixed = {name: flat[name].replace(lhs=grids.get(name, flat[name].lhs)) for name in flat}
    work = stage(training=FinetuneConfig(weight_decay=0.5))
    carry = after(work, 5, start().replace(quant=nest_sites(mixed)))
    learned = {name: set(leaves) for name, leaves in carry.work["trainable"]["tables"].items()}
    assert learned == {
        "net/l0:input": {"scale"},
        "net/l1:input": {"scale"},
        "net/l2:input": {"scale", "zero_point"},
    }
    made = flatten_sites(work.finish(carry)[0].quant)
    for name, grid in grids.items():
        zero = made[name].lhs.table.zero_point
        np.testing.assert_array_equal(zero, np.full(STEPS, grid.zero_point))


def test_the_step_is_told_to_recompute_blocks(monkeypatch):
    told = []
    monkeypatch.setattr(module, "make_step", lambda net, program, *rest: told.append(program))
    for remat in (False, True):
        stage(training=FinetuneConfig(remat=remat))
    assert told == [None, toy.program(16)]


@pytest.mark.slow
def test_recomputing_blocks_changes_nothing_but_memory():
    kept, made = (
        run_stage(stage(training=FinetuneConfig(remat=remat)), start())[1]
        for remat in (False, True)
    )
    assert made["last_loss"] == pytest.approx(kept["last_loss"], rel=1e-3)


def test_a_schedule_that_no_table_will_serve_is_refused_before_the_training():
    with pytest.raises(ValueError, match="a grid that covers it"):
        student(timesteps=np.float32([1.0, 4.0]))
    assert student(QALoRAConfig(talsq=False), timesteps=np.float32([1.0, 4.0]))


def test_a_state_without_ranges_is_refused():
    flat = flatten_sites(start().quant)
    bare = start().replace(quant=nest_sites({n: s.replace(rhs=None) for n, s in flat.items()}))
    with pytest.raises(ValueError, match="net/l0 has no range"):
        student().begin(bare)
    weights, tables = (flatten_sites(state.quant) for state in (start(), tuned()[0]))
    mixed = {name: tables[name].replace(rhs=weights[name].rhs) for name in tables}
    with pytest.raises(ValueError, match="one calibrated range"):
        student().begin(start().replace(quant=nest_sites(mixed)))
