"""One suite that every method passes: from plan to bundle on a small network."""

import functools
import json
from typing import NamedTuple

import jax
import numpy as np
import pytest

from qdiff_jax.export.bundle import load_bundle, save_bundle
from qdiff_jax.export.qtensor import QTensor, codes
from qdiff_jax.methods.brecq import brecq, paper_activation_steps
from qdiff_jax.methods.ptqd import PTQDConfig
from qdiff_jax.methods.registry import CalibrationSets, MethodSettings, build
from qdiff_jax.methods.tfmq import tfmq
from qdiff_jax.models.unet_ddpm import UNetConfig
from qdiff_jax.observe.selectors import CalibrationSet
from qdiff_jax.policy import Rule, make_plan, policy
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.quant.timed import TimeIndexed, select, step_context
from qdiff_jax.sites import flatten_sites, list_sites
from qdiff_jax.stages.calibrate import ActivationConfig
from qdiff_jax.stages.layer_rounding import ClosedFormConfig
from qdiff_jax.stages.reconstruct import ReconstructConfig
from qdiff_jax.stages.stage import (
    Model,
    QuantState,
    decide_codes,
    fold_weights,
    initial_state,
    kernel_at,
    run_stage,
)

from .. import tiny_unet
from ..stages.chain import leaves_equal

# Residual blocks, skips, attention and time projections, conditional on a class; one resolution.
CONFIG = UNetConfig(
    channels=8,
    multipliers=(1,),
    res_blocks=1,
    attention_resolutions=(),
    resolution=4,
    groups=4,
    num_classes=3,
)
TIMESTEPS = np.float32([100.0, 500.0, 900.0])
KEPT_WEIGHT, KEPT_INPUT = "mid_block_1/conv2", "up_0_block_1/conv1"
VARIANTS = {
    "rtn": ("rtn", "fixed"),
    "brecq": ("brecq", "fixed"),
    "tfmq": ("tfmq", "fixed"),
    "tfmq faithful": ("tfmq", "faithful"),
    "closed_form": ("closed_form", "fixed"),
}
# Closed-form rounding compiles a program for each shape of a layer, which takes minutes.
EVERY = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "closed_form" else name
        for name in VARIANTS
    ],
)
STEPS = 8


class Outcome(NamedTuple):
    state: QuantState
    reports: dict


@functools.cache
def model() -> Model:
    net = tiny_unet.network(CONFIG)
    return Model(net.module, net.program, net.params)


@functools.cache
def calibration() -> CalibrationSet:
    """8 samples of every step, shuffled."""
    rng = np.random.default_rng(3)
    index = rng.permutation(np.repeat(np.arange(3, dtype=np.int32), 8))
    x = rng.standard_normal((24, 4, 4, 3)).astype(np.float32) * (1 + index[:, None, None, None])
    y = rng.integers(0, 4, 24).astype(np.int32)
    return CalibrationSet(x, TIMESTEPS[index], index, np.zeros(24, np.int32), y, np.zeros_like(x))


@functools.cache
def plan(a_bits: int | None = 8):
    """The common policy, but for one weight and one activation that stay in full precision."""
    x, t = tiny_unet.inputs(CONFIG, 1)
    sites = list_sites(model().module, x, t, np.zeros(1, np.int32))
    kept = [Rule("kept weight", KEPT_WEIGHT, ("weight",), None, None)]
    if a_bits is not None:
        kept.append(Rule("kept input", KEPT_INPUT, ("input",), None, None))
    return make_plan(sites, (*kept, *policy("common", sites, 4, a_bits)))


def method(name: str, on_progress=None, save_seconds: float = 60.0):
    which, variant = VARIANTS[name]
    settings = MethodSettings(
        weights=ReconstructConfig(
            steps=STEPS,
            batch_size=8,
            lr=5e-2,
            schedule="cosine",
            walk_batch=12,
            save_seconds=save_seconds,
        ),
        activations=ActivationConfig(batch_size=6, margin=1.5),
        variant=variant,
        closed_form=ClosedFormConfig(walk_batch=12, check_samples=12),
    )
    sets = CalibrationSets(calibration(), calibration(), TIMESTEPS)
    return build(which, model(), sets, settings, on_progress)


def finish(made, state, store=None, chunk=3) -> Outcome:
    reports = {}
    for i, stage in enumerate(made.stages):
        folder = None if store is None else store / f"{i}_{stage.name}"
        state, reports[stage.name] = run_stage(stage, state, folder, chunk=chunk)
    return Outcome(state, reports)


def begin(a_bits: int | None = 8, seed: int = 5) -> QuantState:
    return initial_state(plan(a_bits), jax.random.key(seed), "a" * 64)


@functools.cache
def outcome(name: str) -> Outcome:
    return finish(method(name), begin())


def operand_of(site, operand: str):
    return site.lhs if operand in ("input", "q", "softmax") else site.rhs


@EVERY
def test_every_planned_weight_holds_codes_of_its_bits(name):
    flat = flatten_sites(outcome(name).state.quant)
    for entry in plan().quantized("weight"):
        tensor = jax.device_get(flat[entry.site].rhs)
        assert isinstance(tensor, QTensor), entry.site
        assert tensor.bits == entry.bits
        assert tensor.shape == kernel_at(model().params, entry.site).shape
        held = codes(tensor)
        assert (held.min() >= entry.codes[0]) & (held.max() <= entry.codes[1])


@EVERY
def test_every_planned_activation_has_its_quantizer(name):
    flat = flatten_sites(outcome(name).state.quant)
    temporal = ("temb/", *(f"{node.name}/" for node in model().program if "proj" in node.name))
    for entry in plan().quantized("input", "q", "k", "softmax", "v"):
        made = operand_of(flat[entry.site], entry.operand)
        table = name == "tfmq faithful" or (name == "tfmq" and entry.site.startswith(temporal))
        assert isinstance(made, TimeIndexed if table else QParams), entry
        rows = made.table if table else made
        assert rows.spec == entry.spec
        assert rows.scale.shape == ((3,) if table else ())
        assert (np.asarray(rows.qmin) == entry.codes[0]).all()
        assert (np.asarray(rows.qmax) == entry.codes[1]).all()
        assert (np.asarray(rows.scale) > 0).all()


@EVERY
def test_what_the_plan_keeps_is_left_alone_and_nothing_is_left_over(name):
    flat = flatten_sites(outcome(name).state.quant)
    assert flat[KEPT_WEIGHT].rhs is None
    assert flat[KEPT_INPUT].lhs is None
    assert set(flat) == {entry.site for entry in plan().quantized()}
    for site, held in flat.items():
        assert held.tap is None, site
        assert held.substitute is None, site
        assert not held.execute
        assert held.product == site.endswith(("/qk", "/pv"))


@EVERY
def test_same_key_same_result(name):
    assert leaves_equal(finish(method(name), begin()).state.quant, outcome(name).state.quant)


@pytest.mark.parametrize("name", ["brecq", "tfmq"])
def test_key_decides_the_minibatches(name):
    other = finish(method(name), begin(seed=6)).state.quant
    assert not leaves_equal(other, outcome(name).state.quant)


@EVERY
@pytest.mark.parametrize("calls", [2, 11])
def test_interrupted_and_resumed_equals_uninterrupted(name, calls, tmp_path):
    """Killed at a progress report, wherever that is, and run again from the start of the method."""
    left = iter(range(calls))

    def kill(done, total, **shown):
        if next(left, None) is None:
            raise KeyboardInterrupt

    try:
        made = method(name, kill, save_seconds=0.0)
        finish(made, begin(), tmp_path, chunk=1 if name == "rtn" else 3)
        assert calls == 11  # nearest rounding reports its four batches only
        assert name == "rtn"
    except KeyboardInterrupt:
        pass
    resumed = finish(method(name), begin(), tmp_path)
    assert leaves_equal(resumed.state.quant, outcome(name).state.quant)


@EVERY
def test_folding_writes_what_the_codes_say_and_is_final(name):
    state = outcome(name).state
    assert leaves_equal(decide_codes(state.quant, model().params), state.quant)
    params, quant = fold_weights(model().params, state.quant)
    assert jax.tree.structure(params) == jax.tree.structure(model().params)
    for site, held in flatten_sites(state.quant).items():
        if not isinstance(held.rhs, QTensor):
            continue
        tensor = jax.device_get(held.rhs)
        grid = tensor.qparams
        wanted = (codes(tensor).astype(np.float32) - grid.zero_point) * grid.scale
        np.testing.assert_array_equal(kernel_at(params, site), wanted)
    kept = kernel_at(model().params, KEPT_WEIGHT)
    np.testing.assert_array_equal(kernel_at(params, KEPT_WEIGHT), kept)
    assert not [n for n, s in flatten_sites(quant).items() if s.rhs is not None and not s.product]
    again = fold_weights(params, quant)
    assert leaves_equal(again[0], params)
    assert leaves_equal(again[1], quant)


@EVERY
def test_folded_network_is_the_packed_network_bit_for_bit(name):
    state = outcome(name).state
    params, quant = fold_weights(model().params, state.quant)
    x, y = calibration().x[:2], calibration().y[:2]
    ctx = step_context(TIMESTEPS[1], 1)
    t = np.full(2, TIMESTEPS[1])
    packed, folded = (
        tiny_unet.forward(CONFIG)({"params": p, "quant": select(q, ctx)}, x, t, y)
        for p, q in ((model().params, state.quant), (params, quant))
    )
    assert np.isfinite(np.asarray(packed)).all()
    np.testing.assert_array_equal(np.asarray(folded), np.asarray(packed))


@EVERY
def test_bundle_gives_back_the_same_trees(name, tmp_path):
    state, reports = outcome(name)
    shown = {
        stage: {k: v for k, v in report.items() if k != "ranges"}
        for stage, report in reports.items()
    }
    save_bundle(
        tmp_path / "bundle",
        params=model().params,
        quant=state.quant,
        plan_json=plan().to_json(),
        model_config={"family": "unet_ddpm"},
        schedule_config={"schedule": "linear", "timesteps": 1000},
        sampler_config={"name": "ddim"},
        source={"sha256": state.source},
        extra={"reports": shown},
    )
    bundle = load_bundle(tmp_path / "bundle")
    assert leaves_equal(bundle.quant, state.quant)
    assert json.loads(json.dumps(shown)) == bundle.manifest["extra"]["reports"]
    loaded, original = (
        fold_weights(bundle.params, bundle.quant),
        fold_weights(model().params, state.quant),
    )
    assert leaves_equal(loaded[0], original[0])
    assert leaves_equal(loaded[1], original[1])


@EVERY
def test_weights_alone_can_be_quantized(name):
    """W4A32, where papers compare roundings: no activation is planned, so none is calibrated."""
    state, reports = finish(method(name), begin(a_bits=None))
    flat = flatten_sites(state.quant)
    assert all(isinstance(s.rhs, QTensor) and s.lhs is None for s in flat.values())
    assert reports["calibrate_activations"]["network_passes"] == 0.0


def test_stages_of_each_method_in_order():
    sets = (calibration(), calibration(), TIMESTEPS)
    full = brecq(model(), *sets, activation_steps=paper_activation_steps(steps=10))
    assert [stage.name for stage in full.stages] == [
        "calibrate_weights",
        "brecq_weights",
        "calibrate_activations",
        "brecq_activation_steps",
    ]
    assert [stage.name for stage in method("brecq").stages] == [
        stage.name for stage in full.stages[:3]
    ]
    assert [stage.name for stage in method("tfmq").stages] == [
        "calibrate_weights",
        "tfmq_weights",
        "calibrate_activations",
    ]
    assert [stage.name for stage in method("rtn").stages] == [
        "calibrate_weights",
        "round_to_nearest",
        "calibrate_activations",
    ]


def test_paper_activation_steps_are_those_of_the_specification():
    config = paper_activation_steps()
    assert (config.steps, config.scale_lr, config.p) == (5000, 4e-4, 2.4)
    assert (config.trains, config.inputs) == ("scales", "full_precision")


def test_inputs_and_targets_of_both_phases_cost_at_most_three_passes():
    # The second phase reads full precision alone: one pass, see the tests of the stage.
    assert outcome("brecq").reports["brecq_weights"]["network_passes"] + 1.0 <= 3.0


class TestTemporalBlock:
    def test_is_the_first_unit_and_its_codes_are_final(self):
        """What later units see of it never changes: stopped after one unit, the codes are the same."""
        stages = method("tfmq").stages
        state, _ = run_stage(stages[0], begin())
        carry = stages[1].init(state, None)
        while carry.position < 1:
            carry = stages[1].run(carry, STEPS)
        assert carry.reports[0]["unit"] == "time"
        done = outcome("tfmq").state.quant
        for node in model().program:
            if node.name == "temb" or node.name.endswith("_temb_proj"):
                for op, site in carry.state.quant[node.name].items():
                    assert leaves_equal(site.rhs, done[node.name][op].rhs)

    def test_margin_widens_every_table_but_its_own(self):
        flat = flatten_sites(outcome("tfmq faithful").state.quant)
        ranges = outcome("tfmq faithful").reports["calibrate_activations"]["ranges"]
        for name, margin in (("temb/dense_1:input", 1.0), ("mid_block_2/conv1:input", 1.5)):
            lo, hi = ranges[name]
            scale = margin * (np.maximum(hi, 0) - np.minimum(lo, 0)) / 255
            table = flat[name.split(":")[0]].lhs.table
            np.testing.assert_allclose(table.scale, scale, rtol=1e-5)

    def test_variants_share_their_weights(self):
        """Paper and code differ in activations alone here."""
        fixed, faithful = (outcome(n).state.quant for n in ("tfmq", "tfmq faithful"))
        for site, held in flatten_sites(fixed).items():
            if isinstance(held.rhs, QTensor):
                assert leaves_equal(held.rhs, flatten_sites(faithful)[site].rhs)


def test_unknown_names_are_refused():
    sets = (calibration(), calibration(), TIMESTEPS)
    with pytest.raises(ValueError, match="variant 'code' is unknown.*faithful"):
        tfmq(model(), *sets, variant="code")
    with pytest.raises(ValueError, match="'breqc' is unknown.*Did you mean 'brecq'"):
        build("breqc", model(), CalibrationSets(*sets), MethodSettings())
    with pytest.raises(ValueError, match="step tables at every site, which fsc=False switches off"):
        tfmq(model(), *sets, variant="faithful", fsc=False)
    settings = MethodSettings(ptqd=PTQDConfig(base="ptqd"))
    with pytest.raises(ValueError, match="PTQD goes on top of another method, not of 'ptqd'"):
        build("ptqd", model(), CalibrationSets(*sets, paired=object()), settings)
