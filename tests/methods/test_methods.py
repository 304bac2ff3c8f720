"""One suite that every method of the registry passes, from plan to bundle, on a small network.

By default with zero steps of optimization, where weights must come out as round-to-nearest makes them;
the slow tier repeats every check with steps and runs the cases that compile for long.
"""

import contextlib
import json

import jax
import numpy as np
import pytest

from qdiff_jax.export.bundle import load_bundle, save_bundle
from qdiff_jax.methods.registry import METHODS
from qdiff_jax.named_policies import POLICIES
from qdiff_jax.quant.timed import select, step_context
from qdiff_jax.sites import flatten_sites
from qdiff_jax.stages.correct import CORRECTION
from qdiff_jax.stages.stage import fold_weights, run_stage
from qdiff_jax.stages.weights import calibrate_weights, round_to_nearest

from ..stages.chain import leaves_equal
from . import contracts
from .cases import (
    CASES,
    LEARNING,
    NETWORKS,
    STEPS,
    TIMESTEPS,
    begin,
    calibration,
    case_plan,
    finish,
    forward,
    kill,
    method,
    model,
    outcome,
    parameters,
    resume,
)

SLOW = pytest.mark.slow
# Quantizers of distinct structure: what else there is compiles to one of these programs, or is slow.
DISTINCT = ("rtn", "brecq", "tfmq", "qdiffusion", "ptqd", "tdq", "ptq4dit")
# Widths of codes decide how many bytes they take; every other program must take them as data.
PACKING = {"_nearest_tensors", "from_codes", "_folded"}
BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"


def runs(default=tuple(CASES)):
    """(name, steps) of every case, without steps by default, with them in the slow tier."""
    made = [
        pytest.param(
            name, steps, marks=SLOW if steps or CASES[name].slow or name not in default else ()
        )
        for steps, names in ((0, CASES), (STEPS, LEARNING))
        for name in names
    ]
    return pytest.mark.parametrize(("name", "steps"), made)


EVERY = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=SLOW) if case.slow else n for n, case in CASES.items()]
)


def test_every_method_of_the_registry_has_a_case():
    assert {case.entry for case in CASES.values()} == set(METHODS)


@runs()
def test_every_planned_weight_holds_codes_of_its_bits(name, steps):
    contracts.codes_are_in_range(outcome(name, steps).state)


@runs()
def test_every_planned_activation_has_its_quantizer(name, steps):
    contracts.activations_have_quantizers(name, outcome(name, steps).state)


@runs()
def test_what_the_plan_keeps_is_left_alone_and_nothing_is_left_over(name, steps):
    state = outcome(name, steps).state
    contracts.nothing_else_is_left(state)
    flat = flatten_sites(state.quant)
    net = NETWORKS[CASES[name].network]
    assert flat[net.kept_weight].rhs is None
    assert flat[net.kept_input].lhs is None


@runs()
def test_untouched_leaves_are_bit_identical(name, steps):
    contracts.untouched_leaves_are_untouched(name, outcome(name, steps).state)


@pytest.mark.parametrize(
    "name", [n for n, c in CASES.items() if not c.slow and c.entry != "svdquant"]
)
def test_zero_steps_are_round_to_nearest(name):
    """The ranges and the codes of round-to-nearest under the same plan, bit for bit. (SVDQuant's codes are
    of what its branch leaves, see test_svdquant.)"""
    state = outcome(name).state
    own = model(CASES[name].network)._replace(params=parameters(state))
    search = {"ptq4dm": "mse2d", "ptq4dit": "percentile_search"}.get(CASES[name].entry, "mse")
    nearest = begin(state.plan)
    for stage in (calibrate_weights(own, method=search), round_to_nearest(own)):
        nearest, _ = run_stage(stage, nearest)
    flat = flatten_sites(state.quant)
    for site, held in flatten_sites(nearest.quant).items():
        assert leaves_equal(flat[site].rhs, held.rhs), site


@runs()
def test_folding_writes_what_the_codes_say_and_is_final(name, steps):
    contracts.folding_writes_what_the_codes_say(outcome(name, steps).state)


@runs(default=DISTINCT)
def test_folded_network_is_the_packed_network_bit_for_bit(name, steps):
    state = outcome(name, steps).state
    whole = parameters(state)
    params, quant = fold_weights(whole, state.quant)
    x, y = calibration().x[:2], calibration().y[:2]
    ctx = step_context(TIMESTEPS[1], 1)
    t = np.full(2, TIMESTEPS[1])
    packed, folded = (
        forward(CASES[name].network)({"params": p, "quant": select(q, ctx)}, x, t, y)
        for p, q in ((whole, state.quant), (params, quant))
    )
    assert np.isfinite(np.asarray(packed)).all()
    np.testing.assert_array_equal(np.asarray(folded), np.asarray(packed))


@runs()
def test_bundle_gives_back_the_same_trees(name, steps, tmp_path):
    state, reports = outcome(name, steps)
    shown = {
        stage: {k: v for k, v in report.items() if k != "ranges"}
        for stage, report in reports.items()
    }
    correction = state.aux.get(CORRECTION)
    assert (correction is not None) == (CASES[name].entry == "ptqd")
    save_bundle(
        tmp_path / "bundle",
        params=parameters(state),
        quant=state.quant,
        plan_json=state.plan.to_json(),
        model_config={"family": "unet_ddpm"},
        schedule_config={"schedule": "linear", "timesteps": 1000},
        sampler_config={"name": "ddim"},
        source={"sha256": state.source},
        extra={"reports": shown},
        correction=correction,
    )
    bundle = load_bundle(tmp_path / "bundle")
    assert leaves_equal(bundle.quant, state.quant)
    assert leaves_equal(bundle.correction, correction)
    assert json.loads(json.dumps(shown)) == bundle.manifest["extra"]["reports"]
    loaded = fold_weights(bundle.params, bundle.quant)
    original = fold_weights(parameters(state), state.quant)
    assert leaves_equal(loaded[0], original[0])
    assert leaves_equal(loaded[1], original[1])


@EVERY
def test_interrupted_in_its_calibration_and_resumed_equals_uninterrupted(name, tmp_path):
    """Which is also: the same key gives the same result. What the stages learn is interrupted in the slow
    tier (`test_steps`)."""
    kill(name, 0, tmp_path, CASES[name].reports)
    resumed = resume(name, 0, tmp_path).state
    whole = outcome(name).state
    assert leaves_equal(resumed.quant, whole.quant)
    assert leaves_equal(resumed.aux, whole.aux)


# Every layer's shape compiles again for SVDQuant without activations.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=SLOW if case.slow or case.entry == "svdquant" else ())
        for n, case in CASES.items()
    ],
)
def test_weights_alone_can_be_quantized_under_another_policy(name):
    """W4A32, where papers compare roundings, under the policy that keeps most in full precision."""
    net = NETWORKS[CASES[name].network]
    state = outcome(name, 0, net.other_policy, None).state
    contracts.codes_are_in_range(state)
    contracts.nothing_else_is_left(state)
    contracts.untouched_leaves_are_untouched(name, state)
    flat = flatten_sites(state.quant)
    assert not net.kept_sites & set(flat)
    assert all(site.lhs is None for site in flat.values())


@pytest.mark.parametrize(
    ("name", "policy_name"),
    [
        pytest.param(n, p, marks=() if (n, p) == ("rtn", "official:tfmq") else SLOW)
        for n, case in CASES.items()
        for p in POLICIES
        # TFMQ-DM's speaks of a U-Net's convolutions.
        if (case.network, p) != ("dit", "official:tfmq")
    ],
)
def test_the_site_policy_can_be_swapped(name, policy_name):
    state = outcome(name, 0, policy_name).state
    contracts.codes_are_in_range(state)
    contracts.activations_have_quantizers(name, state)
    contracts.nothing_else_is_left(state)
    contracts.untouched_leaves_are_untouched(name, state)
    contracts.folding_writes_what_the_codes_say(state)


@contextlib.contextmanager
def compiled():
    """The names of the programs that are asked of the backend inside the block."""
    names: list[str] = []

    def listen(event, seconds, **about):
        if event == BACKEND_COMPILE:
            names.append(
                str(about.get("fun_name")).removeprefix("jit_").removeprefix("jit(").rstrip(")")
            )

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_compiled_programs_are_seen_by_name():
    def fresh(x):
        return x + 1

    with compiled() as names:
        jax.jit(fresh)(np.float32(0))
    assert names == ["fresh"]


@runs()
def test_one_compile_serves_other_bits_and_another_key(name, steps):
    """Bits, ranges and keys are data: a second run asks for nothing but the packing of narrower codes. (One
    bit is a grid of its own.)"""
    assert outcome(name, steps).reports
    fewer = min(3, CASES[name].w_bits)
    with compiled() as names:
        again = finish(method(name, steps), begin(case_plan(name, None, 6, fewer), seed=6)).state
    assert set(names) <= PACKING, sorted(set(names) - PACKING)
    contracts.codes_are_in_range(again)
