"""Training with binary weights on the miniature chain: phases, the transition, what comes out, resuming.

All tests but the slow ones run one compiled step: phases, penalties and gates are data.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.export.qtensor import QTensor, codes
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.quant.timed import from_rows
from qdiff_jax.sites import flatten_sites
from qdiff_jax.stages import binary_step
from qdiff_jax.stages import train_binary as module
from qdiff_jax.stages.binary_student import decide_student, split_student, student
from qdiff_jax.stages.calibrate import ActivationConfig, calibrate_activations
from qdiff_jax.stages.noising import Images, Noising
from qdiff_jax.stages.quantize_phases import Phase
from qdiff_jax.stages.stage import fold_weights, run_stage, set_site, tuned_params
from qdiff_jax.stages.train_binary import BinaryTrainConfig, train_binary

from . import chain

CONFIG = BinaryTrainConfig(
    steps=12, batch_size=8, lr=5e-3, tau=1.0, lrm=0.1, checks=3, save_seconds=0.0
)
EXAMPLE = {"x": chain.example()[0], "t": chain.example()[1], "y": None}


@functools.cache
def data():
    bare = chain.calibration()
    full = jax.jit(chain.model().module.apply)({"params": chain.model().params}, bare.x, bare.t)
    return bare.replace(eps_fp=np.asarray(full)[..., :3])


def parts(whole=None):
    """What is trained on and what is held out."""

    def rows(part):
        return jax.tree.map(lambda leaf: leaf[part], data() if whole is None else whole)

    return rows(slice(8, None)), rows(slice(8))


@functools.cache
def start(w_bits=1):
    ranges = calibrate_activations(
        chain.model(), data(), chain.TIMESTEPS, ActivationConfig(batch_size=16)
    )
    return run_stage(ranges, chain.state(w_bits, 4))[0]


def stage(config=CONFIG, on_progress=None, **options):
    return train_binary(chain.model(), *parts(), config, on_progress=on_progress, **options)


@functools.cache
def whole():
    return run_stage(stage(), start(), chunk=5)


def changed(**fields):
    return BinaryTrainConfig(**{**CONFIG.__dict__, **fields})


def test_every_planned_weight_ends_with_one_bit_and_the_rest_has_learned():
    state, report = whole()
    assert np.isfinite([report["first_loss"], report["last_loss"]]).all()
    before, after = flatten_sites(start().quant), flatten_sites(state.quant)
    for entry in chain.plan(1, 4).quantized():
        site = after[entry.site]
        held = site.lhs if entry.operand in ("input", "q") else site.rhs
        old = before[entry.site]
        old = old.lhs if entry.operand in ("input", "q") else old.rhs
        if entry.operand == "weight":
            assert isinstance(held, QTensor)
            assert held.bits == 1
            assert set(np.unique(codes(held))) == {0, 1}
            held = held.qparams
        assert isinstance(held, QParams)
        assert (np.asarray(held.scale) > 0).all()
        assert not np.array_equal(held.scale, old.scale)
        np.testing.assert_array_equal(held.zero_point, old.zero_point)
    tuned = state.aux["params"]
    assert "a/conv/bias" in tuned and not any(p.endswith("kernel") for p in tuned)  # noqa: PT018
    assert not np.array_equal(tuned["a/conv/bias"], chain.model().params["a"]["conv"]["bias"])


def test_what_is_exported_is_one_basis_of_the_averaged_weights():
    carry = stage().init(start(), None)
    while not stage().done(carry):
        carry = stage().run(carry, 6)
    average = jax.device_get(carry.work["optimizer"]["ema"])
    state = stage().finish(carry)[0]
    folded, _ = fold_weights(tuned_params(chain.model().params, state.aux), state.quant)
    kernel = average["kernels"]["b/conv/kernel"]
    signs = np.where(kernel >= 0, np.float32(1), np.float32(-1))
    np.testing.assert_array_equal(folded["b"]["conv"]["kernel"], signs * average["steps"]["b/conv"])
    live = jax.device_get(carry.work["trainable"])
    assert not np.array_equal(live["kernels"]["b/conv/kernel"], kernel)
    assert float(carry.work["optimizer"]["gate"]["open"]) == 0.0


@pytest.mark.parametrize("reports", [1, 2, 3])
def test_killed_and_resumed_equals_uninterrupted(reports, tmp_path):
    """Also where the transition is asked for (steps 6, 8, 11) and saved just before it."""
    left = iter(range(reports))

    def kill(done, total, **shown):
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(stage(on_progress=kill), start(), tmp_path, chunk=3)
    seen = []
    resumed, report = run_stage(
        stage(on_progress=lambda done, total, **shown: seen.append(done)),
        start(),
        tmp_path,
        chunk=5,
    )
    # Stopped at 3, 6 or 8 steps (a question comes at 8), saved at the first two.
    assert seen[0] > 3 * reports
    assert chain.leaves_equal((resumed.quant, resumed.aux), (whole()[0].quant, whole()[0].aux))
    assert report["transition"] == whole()[1]["transition"]


def test_the_teacher_and_the_data_are_shared_not_copied():
    carry = stage().init(start(), None)
    assert set(carry.work) == {"trainable", "optimizer", "frozen", "data"}
    assert not jax.tree.leaves((carry.work["frozen"], carry.work["data"]))
    held = zip(jax.tree.leaves(carry.fixed["params"]), jax.tree.leaves(chain.model().params))
    assert all(a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer() for a, b in held)


def test_a_middle_of_other_settings_is_not_gone_on_from(tmp_path):
    stage().run(stage().init(start(), tmp_path), 3)
    free = changed(save_seconds=9.0, remat=True)
    assert stage(free).init(start(), tmp_path).step == 3
    for other, what in (
        (stage(changed(tau=2.0)), "another config"),
        (stage(phases=LATE), "another phases"),
        (train_binary(chain.model(), *parts()[::-1], CONFIG), "another data, held out"),
    ):
        with pytest.raises(
            ValueError, match=f"train_binary: .* holds the middle of a run with {what}"
        ):
            other.init(start(), tmp_path)


def student_at(step, gate=1.0, config=CONFIG, phases=None):
    trainable, frozen = split_student(
        chain.model(), start(), config.two_bases, config.interval, phases, EXAMPLE
    )
    quant = student(trainable, frozen, jnp.int32(step), jnp.float32(gate))[1]
    return flatten_sites(quant), trainable


def test_phases_switch_blocks_then_products():
    """The chain has one depth, the shared time embedding with it, and then its products."""
    config = changed(interval=4)
    early, late = student_at(3, config=config)[0], student_at(4, config=config)[0]
    for name in ("a/conv", "proj/dense", "temb/dense_1"):
        assert bool(early[name].rhs.on)
        assert float(early[name].lhs.qmax) == 15
    assert float(early["a/qk"].lhs.qmax) > 2**20 < float(early["a/qk"].rhs.qmax)
    assert early["a/qk"].product and not early["a/conv"].product  # noqa: PT018
    assert float(late["a/qk"].lhs.qmax) == 15 == float(late["a/qk"].rhs.qmax)


def test_the_second_basis_belongs_to_blocks_of_enough_resolution():
    sites, trainable = student_at(0)
    assert set(trainable["second"]) == {"a/conv", "b/conv", "c/conv", "mix/conv", "proj/dense"}
    assert sites["temb/dense_0"].rhs.second is None
    assert float(student_at(0, gate=0.0)[0]["a/conv"].rhs.gate) == 0.0
    assert student_at(0, config=changed(two_bases=2.0))[1]["second"] == {}


LATE = (Phase(4, ("temb", "proj", "mix", "a", "b", "c")), Phase(6, (), products=True))


def test_quantizers_rest_until_their_phase_begins():
    """Numbers and moments, bit for bit; and their first step is then Adam's first, of the size of the rate."""
    made = stage(changed(weight_decay=0.1), phases=LATE)
    carry, works = made.init(start(), None), []
    for steps in ((), (4,), (1,), (1, 1)):
        for n in steps:
            carry = made.run(carry, n)
        kept = {part: carry.work[part] for part in ("trainable", "optimizer")}
        works.append(jax.tree.map(np.array, kept))  # copies: a step takes its buffers
    for kind in ("steps", "second", "activations"):
        for part in ("adam", "ema"):
            before, after = (work["optimizer"][part][kind] for work in works[:2])
            assert chain.leaves_equal(before, after)
    begun, *later = (work["trainable"] for work in works)
    for kind, suffix in (("steps", ":weight"), ("second", ":weight"), ("activations", "")):
        for name, old in begun[kind].items():
            first = 6 if "qk" in name + suffix else 4
            np.testing.assert_array_equal(old, later[0][kind][name])
            assert np.array_equal(old, later[1][kind][name]) == (first == 6)
            assert not np.array_equal(old, later[2][kind][name])
            if first == 6:
                size = np.abs(later[2][kind][name] - old * (1 - 0.1 * CONFIG.lr)).max()
                assert size <= 1.01 * CONFIG.lr
    assert not chain.leaves_equal(begun["kernels"], later[0]["kernels"])


def test_phases_that_begin_too_late_are_refused():
    never = (*LATE[:1], Phase(12, (), products=True))
    with pytest.raises(
        ValueError, match=r"qk:. begins to be quantized at step 12, and training ends"
    ):
        stage(phases=never).init(start(), None)
    with pytest.raises(
        ValueError, match=r"at step 7, and step 6 asks whether the second basis may go"
    ):
        stage(phases=(*LATE[:1], Phase(7, (), products=True))).init(start(), None)
    one = changed(two_bases=2.0)
    assert stage(one, phases=(*LATE[:1], Phase(7, (), products=True))).init(start(), None)


def test_without_a_gradient_weight_decay_alone_moves_a_weight():
    """p (1 - lr wd) a step; and a rotation, which is not to move, rests."""
    idle, signs = np.float32([2.0, -3.0]), np.ones((3, 2), np.float32)
    told = {"a/conv/unread": idle, "a/conv/rotation": signs}
    begun = start().replace(aux={**start().aux, "params": told})
    made = stage(changed(weight_decay=0.1, two_bases=2.0))
    carry = made.run(made.init(begun, None), 2)
    others = carry.work["trainable"]["others"]
    np.testing.assert_allclose(
        others["a/conv/unread"], idle * (1 - 0.1 * CONFIG.lr) ** 2, rtol=1e-6
    )
    assert "a/conv/rotation" not in others
    params = made.finish(carry)[0].aux["params"]
    np.testing.assert_array_equal(params["a/conv/rotation"], signs)


class TestTransition:
    def test_the_latest_step_is_always_among_those_asked(self):
        for checks, points in ((1, (6, 11)), (2, (6, 11)), (3, (6, 8, 11))):
            assert module._gate_points(changed(checks=checks)) == points

    def test_the_average_begins_anew(self):
        """It holds no weights that had a second basis to help them."""
        made = stage(changed(tolerance=1e9))
        carry = made.run(made.init(start(), None), 6)
        at = np.array(carry.work["trainable"]["kernels"]["b/conv/kernel"])
        carry = made.run(carry, 1)
        live, kept = (
            jax.device_get(tree["kernels"]["b/conv/kernel"])
            for tree in (carry.work["trainable"], carry.work["optimizer"]["ema"])
        )
        np.testing.assert_allclose(kept, live + 0.1 * (at - live), rtol=1e-5, atol=1e-7)

    def test_what_is_judged_at_the_end_is_what_is_exported(self):
        made = stage(changed(transition=1.0, latest=1.0))
        carry = made.run(made.init(start(), None), 12)
        live = jax.device_get(carry.work["trainable"])
        frozen = carry.fixed["grids"]
        state, report = made.finish(carry)
        assert report["transition"]["step"] == 12
        assert chain.leaves_equal(state.quant, decide_student(start(), live, frozen).quant)

    def test_the_error_is_that_of_the_channels_of_the_objective(self, monkeypatch):
        """The chain predicts six channels; what the last three hold is not asked."""
        made = stage()
        carry = made.init(start(), None)
        unit = module.tapped_program(chain.PROGRAM, ())
        batch = {"x": data().x[:2], "t": data().t[:2], "y": None, "eps_fp": data().eps_fp[:2]}
        plain = binary_step.prediction_error(unit, chain.model(), carry, 0, 1.0, batch)
        predict = binary_step._predict
        monkeypatch.setattr(binary_step, "_predict", lambda *a: predict(*a).at[..., 3:].set(1e3))
        assert binary_step.prediction_error(unit, chain.model(), carry, 0, 1.0, batch) == plain

    def test_the_second_basis_goes_when_it_is_not_missed(self):
        _, report = run_stage(stage(changed(tolerance=1e9)), start())
        found = report["transition"]
        assert found["step"] == 6
        assert found["passed"]
        assert found["as_trained"] > 0 < found["without"]

    def test_it_goes_at_the_latest_step_and_the_log_says_what_was_lost(self, caplog):
        logging.use_absl_handler()
        with caplog.at_level("WARNING"):
            _, report = run_stage(stage(changed(tolerance=0.0)), start())
        assert report["transition"]["step"] == 11
        assert not report["transition"]["passed"]
        assert "step 11 is the latest for the second basis to go" in caplog.text

    def test_a_large_penalty_takes_the_second_basis_away(self):
        """After as many steps, with 1,000 and with 0."""

        def remaining(tau):
            made = stage(changed(tau=tau, transition=1.0, latest=1.0))
            carry = made.run(made.init(start(), None), 12)
            second = jax.device_get(carry.work["trainable"]["second"])
            return np.mean([np.abs(leaf).mean() for leaf in second.values()])

        assert remaining(1e3) < 0.95 * remaining(0.0)


def test_a_loss_that_is_not_finite_stops_the_run():
    broken = data().replace(eps_fp=np.full_like(data().eps_fp, np.nan))
    with pytest.raises(FloatingPointError, match="train_binary: the loss became nan"):
        run_stage(train_binary(chain.model(), *parts(broken), CONFIG), start())


def test_zero_steps_keep_ranges_and_signs():
    """Without a step nothing is compiled: the state decided as it stands."""
    state, report = run_stage(stage(changed(steps=0)), start())
    trainable, frozen = split_student(chain.model(), start(), 0.5, 1, None, EXAMPLE)
    expected = decide_student(start(), trainable, frozen["grids"])
    assert chain.leaves_equal(state.quant, expected.quant)
    assert report["first_loss"] is None is report["last_loss"]
    assert "transition" not in report
    lhs = flatten_sites(start().quant)["a/conv"].lhs
    np.testing.assert_array_equal(flatten_sites(state.quant)["a/conv"].lhs.scale, lhs.scale)


def test_what_cannot_be_trained_is_refused():
    lhs = flatten_sites(start().quant)["a/conv"].lhs
    table = from_rows([lhs] * 4, chain.TIMESTEPS, "exact")
    timed = start().replace(quant=set_site(start().quant, "a/conv", lhs=table))
    with pytest.raises(ValueError, match="a/conv:input holds a TimeIndexed"):
        stage().init(timed, None)
    bare = start().replace(quant=set_site(start().quant, "a/conv", rhs=None))
    with pytest.raises(ValueError, match="a/conv has no range to train from"):
        stage().init(bare, None)


NUMBERS = ("lr", "weight_decay", "two_bases", "tau", "lrm", "tolerance", "save_seconds")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "linear"}, "schedule 'linear' is not"),
        ({"transition": 0.9, "latest": 0.5}, "must be shares of the steps"),
        ({"divisor": 0}, "divisor 0 must be at least 1"),
        ({"steps": -1}, "steps is -1; it is at least 0"),
        ({"batch_size": 0}, "batch_size is 0; it is at least 1"),
        ({"lrm_samples": 0}, "lrm_samples is 0"),
        ({"gate_samples": 0}, "gate_samples is 0"),
        *(({name: -1.0}, f"{name} is -1.0; it is a number") for name in NUMBERS),
        *(({name: float("nan")}, f"{name} is nan; it is a number") for name in NUMBERS),
    ],
)
def test_options_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        BinaryTrainConfig(**fields)


@pytest.mark.slow
def test_recomputing_blocks_changes_nothing_but_memory():
    """The sum of a gradient is taken in another order: the first loss is the same, and the next ones nearly."""
    plain, light = (stage(changed(remat=remat, interval=0)) for remat in (False, True))
    losses = [made.run(made.init(start(), None), 4).losses for made in (plain, light)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"two_bases": 2.0}, {"lrm": 0.0}])
def test_parts_can_be_left_out(fields):
    state, report = run_stage(stage(changed(**fields)), start())
    assert ("transition" in report) == ("lrm" in fields)
    assert flatten_sites(state.quant)["a/conv"].rhs.bits == 1


@pytest.mark.slow
def test_the_loss_falls():
    """One basis from the start, so that no transition lies between."""
    config = changed(two_bases=2.0, steps=200, interval=0, schedule="cosine")
    _, report = run_stage(stage(config), start())
    assert report["last_loss"] < 0.7 * report["first_loss"]


@pytest.mark.slow
def test_weights_of_more_bits_are_trained_as_lsq():
    state, report = run_stage(stage(), start(4))
    assert "transition" not in report
    assert {entry.bits for entry in state.plan.quantized("weight")} == {4}
    before = flatten_sites(start(4).quant)["a/conv"].rhs
    after = flatten_sites(state.quant)["a/conv"].rhs
    assert after.bits == 4
    assert not np.array_equal(after.qparams.scale, before.scale)


@pytest.mark.slow
def test_images_are_noised_anew_and_resume_too(tmp_path):
    """On channels of its own: the chain predicts six, of which the first three are the noise."""
    noising = Noising(make_schedule("linear", 1000))
    # One image, and nothing learns: only another timestep and other noise can give another loss.
    still = changed(lr=0.0, weight_decay=0.0, two_bases=2.0, interval=0, batch_size=1)
    resting = train_binary(chain.model(), *(Images(data().x[:1] / 8, noising),) * 2, still)
    losses = resting.run(resting.init(start(), None), 3).losses
    assert len(set(losses)) == 3
    images = Images(data().x[:16] / 8, noising)
    made = train_binary(chain.model(), images, images, CONFIG)
    state, _ = run_stage(made, start(), chunk=4)
    carry = made.run(made.init(start(), tmp_path), 6)
    assert carry.step == 6
    seen = []
    told = train_binary(
        chain.model(),
        images,
        images,
        CONFIG,
        on_progress=lambda done, total, **shown: seen.append(done),
    )
    again, _ = run_stage(told, start(), tmp_path, chunk=4)
    assert seen[0] > 6
    assert chain.leaves_equal((state.quant, state.aux), (again.quant, again.aux))
