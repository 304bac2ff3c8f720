"""Block reconstruction of weights: what it starts from, what it moves, what it costs."""

import dataclasses

import jax
import numpy as np
import pytest

from qdiff_jax.export.qtensor import codes
from qdiff_jax.models.program import make_unit
from qdiff_jax.runtime.cache import compile_account
from qdiff_jax.sites import flatten_sites
from qdiff_jax.stages.objective import sum_of_outputs
from qdiff_jax.stages.reconstruct import ReconstructConfig, reconstruct
from qdiff_jax.stages.stage import decide_codes, kernel_at, run_stage

from . import chain

CALIBRATION = chain.calibration(per_step=16)
HELD_OUT = chain.calibration(per_step=16, seed=1)
CONFIG = ReconstructConfig(steps=100, batch_size=16, lr=4e-2, schedule="cosine", walk_batch=32)


def stage(config=CONFIG, units=chain.UNITS, **options):
    return reconstruct(chain.model(), units, CALIBRATION, config, **options)


@pytest.fixture(scope="module")
def start():
    return chain.state()


@pytest.fixture(scope="module")
def nearest(start):
    return decide_codes(start.quant, chain.model().params)


@pytest.fixture(scope="module")
def trained(start):
    """(state, report) of all units, and the parameters as they were before."""
    before = jax.tree.map(np.array, chain.model().params)
    state, report = run_stage(stage(), start)
    return state, report, before


def tensors(quant):
    """The weights of a tree, on the host, where unpacking them compiles nothing."""
    return {name: jax.device_get(site.rhs) for name, site in flatten_sites(quant).items()}


class TestResult:
    def test_without_steps_the_codes_are_the_nearest(self, start, nearest):
        state, report = run_stage(stage(dataclasses.replace(CONFIG, steps=0)), start)
        assert chain.leaves_equal(state.quant, nearest)
        assert report["units"][0]["first_loss"] is None

    def test_network_is_closer_than_with_nearest_codes(self, trained, nearest):
        ours = chain.output_error(trained[0].quant, HELD_OUT)
        assert ours < 0.5 * chain.output_error(nearest, HELD_OUT)

    def test_loss_falls_where_nothing_pushes_to_integers(self, start):
        config = dataclasses.replace(CONFIG, rounding_weight=0.0)
        report = run_stage(stage(config), start)[1]
        # The first unit that sees quantized inputs; before it the soft weights are exact.
        unit = report["units"][1]
        assert unit["unit"] == "mix"
        assert unit["last_loss"] < 0.8 * unit["first_loss"]

    def test_no_weight_moves_further_than_one_step_of_its_grid(self, trained):
        for name, tensor in tensors(trained[0].quant).items():
            scale, zero = tensor.qparams.scale, tensor.qparams.zero_point
            moved = np.abs((codes(tensor) - zero) * scale - kernel_at(trained[2], name))
            # Min-max ranges: every weight lies inside.
            assert (moved <= scale * (1 + 1e-5)).all(), name

    def test_some_code_differs_from_the_nearest(self, trained, nearest):
        changed = sum(
            int((codes(a) != codes(b)).sum())
            for a, b in zip(tensors(trained[0].quant).values(), tensors(nearest).values())
        )
        assert changed > 50

    def test_ranges_and_parameters_stay_bit_for_bit(self, trained, start):
        state, _, before = trained
        assert chain.leaves_equal(chain.model().params, before)
        ranges = {name: tensor.qparams for name, tensor in tensors(state.quant).items()}
        assert chain.leaves_equal(ranges, tensors(start.quant))
        assert not state.aux

    def test_report_names_every_unit_once(self, trained):
        report = trained[1]
        assert [unit["unit"] for unit in report["units"]] == ["time", "mix", "a", "b", "c"]
        assert all(0.35 < unit["binarised_fraction"] <= 1.0 for unit in report["units"])
        assert all(unit["steps_per_second"] > 0 for unit in report["units"])


class TestFrozen:
    def test_decided_units_keep_their_codes(self, start, nearest, trained):
        """The temporal block once decided, no later pass changes it."""
        quant = {**start.quant, **{name: nearest[name] for name in ("temb", "proj")}}
        begun = start.replace(quant=quant)
        state, report = run_stage(stage(frozen_units=("time",)), begun)
        for name in ("temb", "proj"):
            assert chain.leaves_equal(state.quant[name], nearest[name])
        assert [unit["trained"] for unit in report["units"]] == [False, True, True, True, True]

    def test_first_unit_is_final_before_the_second_begins(self, start, trained):
        work = stage()
        carry = chain.run_until(work, work.init(start, None), 1)
        for name in ("temb", "proj"):
            assert chain.leaves_equal(carry.state.quant[name], trained[0].quant[name])

    def test_frozen_unit_without_codes_runs_with_nearest_and_stays_open(self, start):
        """Its inputs to later units are those of the nearest codes, its entry is untouched."""
        config = dataclasses.replace(CONFIG, steps=4)
        state, _ = run_stage(stage(config, frozen_units=("mix",)), start)
        assert chain.leaves_equal(state.quant["mix"], start.quant["mix"])


class TestCost:
    def test_all_inputs_and_targets_are_one_pass_of_each_stream(self, trained):
        assert trained[1]["network_passes"] == 2.0

    def test_equal_blocks_are_compiled_once(self, start):
        traced = []

        def counting(outputs, targets, p):
            traced.append(len(outputs))
            return sum_of_outputs(outputs, targets, p)

        config = dataclasses.replace(CONFIG, steps=2)
        work = stage(config, loss=counting)
        carry = chain.run_until(work, work.init(start, None), 3)
        with compile_account() as account:
            carry = chain.run_until(work, carry, 5)
        assert len(traced) == 3  # time, mix, and one for a, b and c
        assert account.backend_compiles == 0  # nor anything else for b and c

    def test_new_numbers_reuse_what_is_compiled(self, start, trained):
        """Bits, rates, weights of the loss and data are arguments."""
        other = dataclasses.replace(CONFIG, steps=3, lr=1e-3, rounding_weight=0.1, warmup=0.0)
        eight = chain.state(w_bits=3)
        run_stage(stage(other), start)  # other lengths of the schedule, computed on the host
        work = stage(other)
        carry = work.init(eight, None)
        with compile_account() as account:
            carry = work.run(carry, 2)
        assert carry.step == 2
        assert account.backend_compiles == 0


def test_several_outputs_are_fitted_together(start):
    """A unit with two outputs, as a time block of many projections: the loss sees all of them."""
    time = make_unit("time", chain.PROGRAM, ("temb", "proj"), keep=("temb",))
    seen = []

    def watching(outputs, targets, p):
        seen.append(([o.shape for o in outputs], [t.shape for t in targets]))
        return sum_of_outputs(outputs, targets, p)

    work = stage(units=(time, *chain.UNITS[1:]), loss=watching)
    carry = work.run(work.init(start, None), 3)
    shapes = [(16, 16), (16, chain.WIDTH)]
    assert seen == [(shapes, shapes)]
    assert carry.unit["losses"][2] > 0  # both started exact


def test_temporal_units_may_take_more_steps(start):
    """And nothing else changes: their own schedule runs to its end."""
    config = dataclasses.replace(CONFIG, steps=3, temporal_steps=7)
    work = stage(config)
    carry = work.run(work.init(start, None), 50)
    assert (carry.position, carry.reports[0]["unit"]) == (1, "time")
    longer = stage(dataclasses.replace(CONFIG, steps=7))
    alone = longer.run(longer.init(start, None), 50)
    assert chain.leaves_equal(carry.state.quant, alone.state.quant)
    carry = work.run(carry, 2)
    assert (carry.position, carry.step) == (1, 2)
    assert work.run(carry, 50).position == 2


def test_devices_agree(start):
    """The minibatch split over eight devices: the same codes, the same losses."""
    config = dataclasses.replace(CONFIG, steps=20, rounding_weight=0.05)
    units, losses = [], []
    for devices in (1, 8):
        work = stage(dataclasses.replace(config, devices=devices))
        carry = chain.run_until(work, work.init(start, None), 4)
        carry = work.run(carry, config.steps - 1)
        losses.append(carry.unit["losses"])
        while not work.done(carry):
            carry = work.run(carry, 50)
        units.append(tensors(work.finish(carry)[0].quant))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5, atol=1e-8)
    pairs = [(codes(units[0][name]), codes(units[1][name])) for name in units[0]]
    equal = sum(int((a == b).sum()) for a, b in pairs) / sum(a.size for a, _ in pairs)
    assert equal >= 0.999


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trains": "biases"}, "trains='biases'"),
        ({"inputs": "both"}, "inputs='both'"),
        ({"schedule": "linear"}, "schedule='linear'"),
        ({"batch_size": 10, "devices": 4}, "batch_size=10 cannot be split over devices=4"),
    ],
)
def test_configuration_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ReconstructConfig(**options)


def test_what_does_not_fit_the_machine_or_the_model_is_refused():
    config = dataclasses.replace(CONFIG, batch_size=16, devices=16)
    with pytest.raises(ValueError, match="devices=16 were asked for, but JAX sees 8"):
        stage(config)
    with pytest.raises(ValueError, match=r"frozen_units \['tmie'\]"):
        stage(frozen_units=("tmie",))
    with pytest.raises(ValueError, match="cover every block exactly once"):
        stage(units=chain.UNITS[:-1])
    with pytest.raises(ValueError, match="48 must divide the 64 samples"):
        run_stage(stage(dataclasses.replace(CONFIG, walk_batch=48)), chain.state())
