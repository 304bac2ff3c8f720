"""Ranges: those of weights from their values, those of activations against NumPy over the whole set."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import linen as nn

from qdiff_jax.export.qtensor import QTensor
from qdiff_jax.models.program import Node
from qdiff_jax.policy import Entry, SitePlan
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.quant.ranges import weight_qparams
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.quant.timed import TimeIndexed, select
from qdiff_jax.sites import flatten_sites
from qdiff_jax.stages import calibrate
from qdiff_jax.stages.calibrate import (
    ActivationConfig,
    calibrate_activations,
    ranges_by_step,
    unseen_label_nodes,
)
from qdiff_jax.stages.stage import Model, fold_weights, initial_state, kernel_at, run_stage
from qdiff_jax.stages.weights import calibrate_weights, freeze_weights, round_to_nearest

from . import chain

CALIBRATION = chain.calibration(per_step=8)
BATCH = 8


def stage(calibration=CALIBRATION, **options):
    config = ActivationConfig(**{"observer": "minmax", "batch_size": BATCH, **options})
    return calibrate_activations(chain.model(), calibration, chain.TIMESTEPS, config)


def quantizer(quant, name: str):
    """The quantizer of "site:operand" in a calibrated tree."""
    site, operand = name.split(":")
    entry = flatten_sites(quant)[site]
    return entry.lhs if operand in ("input", "q") else entry.rhs


@pytest.fixture(scope="module")
def rounded():
    return run_stage(round_to_nearest(chain.model()), chain.state())[0]


@pytest.fixture(scope="module")
def values(rounded):
    """Every activation over the set, of the network that holds the rounded weights."""
    params, _ = fold_weights(chain.model().params, rounded.quant)
    return chain.site_values(params, CALIBRATION)


def expected_qparams(lo, hi, qmax):
    lo, hi = min(float(lo), 0.0), max(float(hi), 0.0)
    return (hi - lo) / qmax, round(-lo * qmax / (hi - lo))


def distance(q, x):
    """Mean |x - x_hat|^2.4, in NumPy."""
    code = np.clip(np.round(x / q.scale) + q.zero_point, q.qmin, q.qmax)
    return float(np.mean(np.abs((code - q.zero_point) * q.scale - x) ** 2.4))


class TestWeights:
    def test_minmax_is_the_range_of_each_output_channel(self):
        flat = flatten_sites(chain.state(method="minmax").quant)
        entries = chain.plan().quantized("weight")
        assert sorted(flat) == sorted(entry.site for entry in entries)
        for entry in entries:
            kernel = np.asarray(kernel_at(chain.model().params, entry.site))
            columns = kernel.reshape(-1, kernel.shape[-1])
            width = np.maximum(columns.max(0), 0) - np.minimum(columns.min(0), 0)
            np.testing.assert_allclose(flat[entry.site].rhs.scale, width / 15, rtol=1e-6)

    def test_searched_ranges_are_those_of_quant_ranges_at_the_planned_bits(self):
        plan = chain.plan(w_bits=3)
        begun = initial_state(plan, chain.KEY)
        state, report = run_stage(calibrate_weights(chain.model()), begun, chunk=2)
        flat = flatten_sites(state.quant)
        assert report["weights"] == len(plan.quantized("weight"))
        for entry in plan.quantized("weight"):
            kernel = kernel_at(chain.model().params, entry.site)
            wanted = weight_qparams(kernel, entry.spec, 3, method="mse")
            assert chain.leaves_equal(flat[entry.site].rhs, wanted)

    def test_rounding_leaves_no_range_without_codes(self, rounded):
        before, after = flatten_sites(chain.state().quant), flatten_sites(rounded.quant)
        for name, site in after.items():
            assert site.rhs.bits == 4
            assert chain.leaves_equal(site.rhs.qparams, before[name].rhs)

    def test_frozen_blocks_are_decided_and_others_are_not(self):
        """Whatever range they had: min-max and the nearest codes for the blocks named, the others stay."""
        before = chain.state()
        state, report = run_stage(freeze_weights(chain.model(), ("temb", "proj")), before)
        flat, wanted = flatten_sites(state.quant), flatten_sites(before.quant)
        frozen = {name for name, site in flat.items() if isinstance(site.rhs, QTensor)}
        assert frozen == {name for name in flat if name.startswith(("temb/", "proj/"))}
        assert report["weights"] == len(frozen) > 0
        plain = flatten_sites(chain.state(method="minmax").quant)
        for name, site in flat.items():
            if name in frozen:
                assert chain.leaves_equal(site.rhs.qparams, plain[name].rhs)
            else:
                assert chain.leaves_equal(site, wanted[name])


class Labelled(nn.Module):
    """A network with classes, as far as calibration looks."""

    config = SimpleNamespace(num_classes=3)


class TestLabels:
    PROGRAM = (
        Node("time", None, ("t",)),
        Node("classes", None, ("y",)),
        Node("condition", None, ("time", "classes")),
        Node("proj", None, ("condition",)),
        Node("first", None, ("x",)),
    )
    MODEL = Model(Labelled(), PROGRAM, {})

    @pytest.mark.parametrize("y", [None, np.int32([2, 0, 1, 1]), np.int32([0, 1, 2, 3])])
    def test_with_every_class_the_condition_is_known(self, y):
        assert unseen_label_nodes(self.MODEL, y) == ()

    @pytest.mark.parametrize("y", [np.int32([2, 0, 0, 3]), np.zeros((4, 5, 6), np.float32)])
    def test_without_it_is_known_of_the_step_alone(self, y):
        assert unseen_label_nodes(self.MODEL, y) == ("classes", "condition", "proj")


class TestActivations:
    def test_minmax_covers_the_whole_set_once(self, rounded, values):
        state, report = run_stage(stage(), rounded)
        assert report["network_passes"] == 1.0
        assert report["activations"] == len(values)
        for name, x in values.items():
            scale, zero = expected_qparams(x.min(), x.max(), 255)
            made = quantizer(state.quant, name)
            np.testing.assert_allclose(made.scale, scale, rtol=1e-5)
            assert abs(float(made.zero_point) - zero) <= 1

    def test_average_is_taken_over_batches_in_order(self, rounded, values):
        state, _ = run_stage(stage(observer="ema", momentum=0.8), rounded)
        for name, x in values.items():
            batches = x.reshape(len(CALIBRATION) // BATCH, -1)
            lo, hi = batches.min(1), batches.max(1)
            low, high = lo[0], hi[0]
            for i in range(1, len(lo)):
                low, high = 0.8 * low + 0.2 * lo[i], 0.8 * high + 0.2 * hi[i]
            scale, _ = expected_qparams(low, high, 255)
            np.testing.assert_allclose(quantizer(state.quant, name).scale, scale, rtol=1e-5)

    def test_percentiles_are_those_of_all_values(self, rounded, values):
        """The sites are small enough for the observer to keep every value."""
        state, _ = run_stage(stage(observer="percentile"), rounded)
        for name, x in values.items():
            lo, hi = np.quantile(x, [0.0004, 0.9996])
            scale, _ = expected_qparams(lo, hi, 255)
            np.testing.assert_allclose(quantizer(state.quant, name).scale, scale, rtol=1e-4)

    def test_searched_range_errs_less_than_the_full_one_at_few_bits(self):
        start = initial_state(chain.plan(w_bits=None, a_bits=3), chain.KEY)
        full = chain.site_values(chain.model().params, CALIBRATION)
        errors = []
        for observer in ("minmax", "mse"):
            quant = run_stage(stage(observer=observer), start)[0].quant
            made = [jax.device_get(quantizer(quant, name)) for name in full]
            errors.append([distance(q, x) for q, x in zip(made, full.values(), strict=True)])
        assert (np.array(errors[1]) <= np.array(errors[0]) * (1 + 1e-6)).all()
        assert np.mean(errors[1]) < 0.9 * np.mean(errors[0])

    def test_weights_stay_as_they_are(self, rounded):
        before = flatten_sites(rounded.quant)
        after = flatten_sites(run_stage(stage(), rounded)[0].quant)
        for name, site in before.items():
            assert chain.leaves_equal(after[name].rhs, site.rhs)

    def test_products_of_activations_are_marked(self, rounded):
        flat = flatten_sites(run_stage(stage(), rounded)[0].quant)
        assert {name for name, site in flat.items() if site.product} == {"a/qk", "b/qk", "c/qk"}


class TestStepTables:
    def test_rows_are_the_ranges_of_their_step(self, rounded, values):
        config = dict(per_step=("*",), exact=chain.TEMPORAL, margin=1.25)
        state, _ = run_stage(stage(**config), rounded)
        for name, x in values.items():
            made = quantizer(state.quant, name)
            assert isinstance(made, TimeIndexed)
            assert made.rule == "step"
            np.testing.assert_array_equal(made.timesteps, chain.TIMESTEPS)
            # The time block knows its values exactly; others meet values never seen here.
            margin = 1.0 if name.startswith(("temb", "proj")) else 1.25
            for step in range(4):
                rows = x[CALIBRATION.index == step]
                scale, _ = expected_qparams(rows.min(), rows.max(), 255)
                np.testing.assert_allclose(made.table.scale[step], margin * scale, rtol=1e-5)

    def test_exact_sites_get_the_margin_where_labels_are_missing(self, rounded, monkeypatch):
        """Temporal features of classes that calibration has not met lie outside of its ranges."""
        monkeypatch.setattr(calibrate, "unseen_label_nodes", lambda model, y: ("proj",))
        config = dict(per_step=chain.TEMPORAL, exact=chain.TEMPORAL, margin=1.25)
        widened = run_stage(stage(**config), rounded)[0].quant
        monkeypatch.undo()
        exact = run_stage(stage(**config), rounded)[0].quant
        for name, factor in (("proj/dense:input", 1.25), ("temb/dense_1:input", 1.0)):
            scales = [quantizer(quant, name).table.scale for quant in (widened, exact)]
            np.testing.assert_allclose(scales[0], factor * np.asarray(scales[1]), rtol=1e-5)

    def test_other_sites_keep_one_range_without_margin(self, rounded, values):
        state, _ = run_stage(stage(per_step=chain.TEMPORAL, margin=1.25), rounded)
        for name, x in values.items():
            made = quantizer(state.quant, name)
            if name.startswith(("temb", "proj")):
                assert isinstance(made, TimeIndexed)
            else:
                scale, _ = expected_qparams(x.min(), x.max(), 255)
                np.testing.assert_allclose(made.scale, scale, rtol=1e-5)

    def test_calibrated_steps_select_numbers_and_others_nan(self, rounded):
        quant = run_stage(stage(per_step=("proj/*",)), rounded)[0].quant
        known = select(quant, chain.context(CALIBRATION))
        assert np.isfinite(np.asarray(quantizer(known, "proj/dense:input").scale)).all()
        foreign = dataclasses.replace(CALIBRATION, t=CALIBRATION.t + 1)
        unknown = select(quant, chain.context(foreign))
        assert np.isnan(np.asarray(quantizer(unknown, "proj/dense:input").scale)).all()

    def test_step_never_calibrated_names_the_site_and_the_way_out(self, rounded):
        partial = chain.calibration(steps=(0, 1, 3))
        with pytest.raises(ValueError, match=r"temb/dense_0:input.*rows \[2\].*every_step"):
            run_stage(stage(partial, per_step=chain.TEMPORAL), rounded)

    def test_pattern_that_matches_nothing(self, rounded):
        with pytest.raises(ValueError, match=r"per_step patterns \['tmeb/\*'\] match no"):
            run_stage(stage(per_step=("proj/*", "tmeb/*")), rounded)

    def test_pattern_of_sites_that_the_policy_keeps(self, rounded):
        kept = tuple(
            dataclasses.replace(e, bits=None, spec=None) if e.site.startswith("temb/") else e
            for e in rounded.plan.entries
        )
        state = rounded.replace(plan=SitePlan(kept))
        made, _ = run_stage(stage(per_step=chain.TEMPORAL), state)
        flat = flatten_sites(made.quant)
        assert flat["temb/dense_0"].lhs is None
        assert any(isinstance(site.lhs, TimeIndexed) for site in flat.values())

    def test_ranges_by_step_needs_no_quantized_network(self):
        full = chain.site_values(chain.model().params, CALIBRATION)
        plan = chain.plan(w_bits=None)
        found = ranges_by_step(chain.model(), CALIBRATION, chain.TIMESTEPS, plan, BATCH)
        assert list(found) == [f"{e.site}:{e.operand}" for e in plan.quantized()]
        for name, (lo, hi) in found.items():
            rows = [full[name][CALIBRATION.index == step] for step in range(4)]
            np.testing.assert_allclose(lo, [r.min() for r in rows], rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(hi, [r.max() for r in rows], rtol=1e-6, atol=1e-7)


class TestWhatIsPlanned:
    @pytest.mark.parametrize("per_step", [(), chain.TEMPORAL])
    def test_weights_alone_need_no_pass(self, per_step):
        state = chain.state(a_bits=None)
        after, report = run_stage(stage(per_step=per_step), state)
        assert report["network_passes"] == 0.0
        assert chain.leaves_equal(after.quant, state.quant)

    def test_ranges_measured_at_run_time_need_no_pass(self):
        dynamic = QuantSpec(granularity="token", dynamic=True)
        entries = [
            dataclasses.replace(e, spec=dynamic) if e.operand == "input" else e
            for e in chain.plan().entries
            if e.operand in ("input", "weight")
        ]
        state = initial_state(SitePlan(tuple(entries)), chain.KEY)
        after, report = run_stage(stage(), state)
        assert report["network_passes"] == 0.0
        for name, site in flatten_sites(after.quant).items():
            assert isinstance(site.lhs, QParams), name
            assert (site.lhs.spec, float(site.lhs.qmax)) == (dynamic, 255.0)

    def test_static_range_per_channel_of_an_activation_is_refused(self):
        spec = QuantSpec(granularity="channel")
        entry = Entry("a/conv", "input", 8, spec, "by hand")
        with pytest.raises(ValueError, match="a/conv:input.*one range per tensor"):
            run_stage(stage(), initial_state(SitePlan((entry,)), chain.KEY))

    def test_unknown_observer(self):
        with pytest.raises(ValueError, match="'histogram' is unknown"):
            stage(observer="histogram")


@pytest.mark.parametrize(
    ("options", "after"),
    [({"per_step": chain.TEMPORAL}, 1), ({"observer": "ema"}, 3), ({"observer": "percentile"}, 2)],
)
def test_interrupted_and_resumed_equals_uninterrupted(rounded, tmp_path, options, after):
    whole, _ = run_stage(stage(**options), rounded)
    killed = stage(**options)
    carry = killed.init(rounded, tmp_path)
    for _ in range(after):
        carry = killed.run(carry, 1)
    again = stage(**options)
    carry = again.init(rounded, tmp_path)
    assert carry.position == after
    while not again.done(carry):
        carry = again.run(carry, 1)
    resumed, _ = again.finish(carry)
    assert chain.leaves_equal(resumed.quant, whole.quant)


def test_second_stage_of_the_same_kind_compiles_nothing(rounded):
    run_stage(stage(observer="ema"), rounded)
    assert run_stage(stage(observer="ema"), rounded)[1]["compiles"] == 0
