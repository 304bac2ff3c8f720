"""PTQ4DiT beside the common suite: its stages and switches, what it refuses, and its integers."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from experiments.quantize import quantize
from experiments.quantize_config import read_config
from experiments.quantize_job import prepare
from experiments.quantize_settings import method_settings
from qdiff_jax.config import load_config
from qdiff_jax.export.bundle import load_bundle
from qdiff_jax.export.integer import (
    check_executable,
    integer_accumulators,
    lowered_int_dots,
)
from qdiff_jax.export.qtensor import codes as held_codes
from qdiff_jax.methods.ptq4dit import PTQ4DiTConfig, ptq4dit
from qdiff_jax.methods.registry import check_network
from qdiff_jax.methods.run import check_comparable, is_modulation_folded, load_for_sampling
from qdiff_jax.models.program import subtrees, units_with_projections
from qdiff_jax.observe.capture import run_unit
from qdiff_jax.observe.taps import Tap
from qdiff_jax.operators import DENSE
from qdiff_jax.quant.quantizer import codes
from qdiff_jax.quant.timed import step_context
from qdiff_jax.sites import SiteQuant, flatten_sites, nest_sites
from qdiff_jax.stages.layer_rounding import ClosedFormConfig
from qdiff_jax.stages.reconstruct import ReconstructConfig
from qdiff_jax.stages.stage import fold_weights
from qdiff_jax.stages.time_scales import tapped

from .. import tiny_dit
from ..main_job import ROOT
from .cases import (
    TIMESTEPS,
    begin,
    calibration,
    case_plan,
    finish,
    forward,
    method,
    model,
    outcome,
    parameters,
    settings,
)

CONFIG = f"{ROOT}/configs/methods/ptq4dit.py"
BALANCE = "calibrate_channel_balance"


def made(**options):
    """The stages of the method on the small DiT."""
    config = {f.name for f in dataclasses.fields(PTQ4DiTConfig)}
    own = PTQ4DiTConfig(**{k: options.pop(k) for k in list(options) if k in config})
    found = ptq4dit(model("dit"), calibration(), TIMESTEPS, config=own, **options)
    return [stage.name for stage in found.stages]


def test_parts_can_be_left_out():
    ranges = ["calibrate_weights", "calibrate_activations"]
    assert made() == [BALANCE, *ranges, "ptq4dit_blocks"]
    assert made(csb=False) == [*ranges, "ptq4dit_blocks"]
    assert made(variant="faithful", ssc=False) == made()
    assert made(reconstruction=False) == [BALANCE, ranges[0], "round_to_nearest", ranges[1]]
    solved = made(rounding="closed_form", closed_form=ClosedFormConfig(walk_batch=8))
    assert solved == [BALANCE, *ranges[::-1], "ptq4dit_weights", "ptq4dit_activation_steps"]


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="PixArt .* not supported: take a DiT, or tcaq"):
        ptq4dit(model("unet"), calibration(), TIMESTEPS)
    with pytest.raises(ValueError, match="has none of them"):
        check_network("ptq4dit", model("unet"))
    check_network("ptq4dit", model("dit"))
    check_network("tcaq", model("unet"))
    with pytest.raises(ValueError, match="variant 'code' is unknown"):
        PTQ4DiTConfig(variant="code")
    for idle in ({"ssc": False}, {"variant": "faithful"}):
        with pytest.raises(ValueError, match="csb=False makes none; leave it out"):
            PTQ4DiTConfig(csb=False, **idle)
    with pytest.raises(ValueError, match="rounding 'nearest' is unknown"):
        made(rounding="nearest")
    with pytest.raises(ValueError, match="leave out rounding='closed_form'"):
        made(rounding="closed_form", reconstruction=False)


def test_the_job_refuses_a_unet_before_anything_is_recorded():
    config = load_config(f"{CONFIG}:smoke", {"model": "random:miniature"})
    with pytest.raises(ValueError, match="has none of them"):
        prepare(config)


def test_the_job_refuses_the_closed_form_of_nothing_before_anything_is_recorded():
    config = load_config(f"{CONFIG}:smoke,no_reconstruction,rounding=closed_form")
    with pytest.raises(
        ValueError, match="ptq4dit without ptq4dit.reconstruction rounds to nearest; leave it out"
    ):
        prepare(config)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("w4a8", {}),
        ("w8a8,laptop,variant=faithful", {"variant": "faithful"}),
        ("w2a4,smoke,no_ssc", {"ssc": False}),
        ("laptop,no_csb", {"csb": False}),
        ("smoke,no_reconstruction,model=dit", {"reconstruction": False}),
    ],
)
def test_every_word_of_the_config_is_read(words, expected):
    config = read_config(load_config(f"{CONFIG}:{words}"))
    made_of = method_settings(config)
    assert config.policy == "official:ptq4dit"
    assert made_of.ptq4dit == dataclasses.replace(PTQ4DiTConfig(), **expected)
    assert made_of.activations.observer == "percentile_search"
    assert {v.method for v in config.variants.values()} == {"ptq4dit"}
    if words == "w4a8":  # the paper's sizes
        assert (made_of.weights.steps, made_of.weights.lr) == (20_000, 1e-3)
        assert made_of.activation_lr == 4e-5
        assert config.sampler.guidance_scale == 1.5
        assert config.calibration.weight_steps == 25


def test_the_config_serves_transformers_alone():
    with pytest.raises(ValueError, match="model"):
        load_config(f"{CONFIG}:model=unet")


def test_every_layer_of_both_blocks_is_balanced_with_steps_that_weigh_differently():
    layers = outcome("ptq4dit").reports[BALANCE]["layers"]
    assert len(layers) == 6
    for layer in layers.values():
        assert len(layer["eta"]) == len(TIMESTEPS)
        assert np.ptp(layer["eta"]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("words", ["w4a8", "w8a8,variant=faithful,rounding=closed_form"])
def test_the_whole_method_runs_to_a_bundle_and_a_report(words, tmp_path):
    quantize(load_config(f"{CONFIG}:{words},smoke"), tmp_path)
    (_, variant) = json.loads((tmp_path / "report.json").read_text())["variants"]
    assert 0 < variant["eps_rel_mse"] < 1
    # Factors are folded into the modulation: its outputs are others than full precision's by design.
    assert variant["temporal_cosine"] is variant["temporal_mismatch"] is None
    bundle = tmp_path / "variants" / variant["name"] / "bundle"
    manifest = load_bundle(bundle).manifest
    assert is_modulation_folded(manifest)
    with pytest.raises(ValueError, match="ptq4dit_w.a8 has factors .* only its images compare"):
        check_comparable(manifest, variant["name"])
    executed = load_for_sampling(bundle, execute=True)
    assert any(site.execute for site in flatten_sites(executed.variables["quant"]).values())


def errors_by_unit(state) -> dict[str, float]:
    """Mean squared error of every unit's outputs, each after its own quantized predecessors."""
    d, dit = calibration(), model("dit")
    streams = [{"x": d.x, "t": d.t, "y": d.y} for _ in range(2)]
    networks = ((dit.params, {}), fold_weights(parameters(state), state.quant))
    ctx, errors = step_context(d.t, d.index, d.branch), {}
    for unit in units_with_projections(dit.program):
        for env, (params, quant) in zip(streams, networks):
            inputs = tuple(env[name] for name in unit.inputs)
            trees = subtrees(params, unit), subtrees(quant, unit)
            env.update(zip(unit.outputs, run_unit(unit.signature, *trees, inputs, ctx)))
        full, made = (np.asarray(env[unit.outputs[-1]]) for env in streams)
        errors[unit.name] = np.square(full - made).mean()
    return errors


@pytest.mark.slow
def test_reconstruction_lowers_the_error_of_every_unit():
    """Against nearest codes and calibrated activation steps, on the set it has seen."""
    weights = ReconstructConfig(
        steps=150, batch_size=24, lr=2e-2, scale_lr=1e-3, schedule="cosine", walk_batch=12
    )
    activations = settings("ptq4dit", 0).activations
    learning = ptq4dit(
        model("dit"), calibration(), TIMESTEPS, weights=weights, activations=activations
    )
    learned = errors_by_unit(finish(learning, begin(case_plan("ptq4dit"))).state)
    nearest = errors_by_unit(outcome("ptq4dit").state)
    assert set(nearest) == {"t_embedder", "x_embedder", "blocks_0", "blocks_1", "final_layer"}
    for unit, error in nearest.items():
        assert learned[unit] < error, unit


@functools.cache
def at_bits(bits: int):
    """(state, {site: executed}) at 4 or 8 weight bits."""
    state = outcome("ptq4dit").state
    if bits == 8:
        state = finish(method("ptq4dit", 0), begin(case_plan("ptq4dit", None, 8, 8))).state
    ready = {
        name: site.replace(execute=site.lhs is not None and site.rhs is not None)
        for name, site in flatten_sites(state.quant).items()
    }
    check_executable(nest_sites(ready))
    return state, ready


# One program for all sites of equal shapes and grids.
@jax.jit
def _sums(lhs, xq, wq):
    return codes(xq, lhs), integer_accumulators(DENSE, lhs, xq, wq)[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_of_folded_layers_are_those_of_the_simulation(bits):
    """On what the folded network in full precision feeds every dense layer: sums of products of codes in
    unbounded integers, and the accumulators behind `op`."""
    state, ready = at_bits(bits)
    batch = {"x": calibration().x[:2], "t": calibration().t[:2], "y": calibration().y[:2]}
    names = [n for n, site in ready.items() if site.execute and not site.product]
    taps = nest_sites({name: SiteQuant(tap=Tap("value")) for name in names})
    seen = tapped(model("dit").module, {"params": parameters(state), "quant": taps}, batch)
    seen = {n.removesuffix("/input/value"): v for n, v in flatten_sites(seen).items()}
    checked = 0
    for name in names:
        site = ready[name]
        if site.rhs.shape[:-2]:
            continue  # the patch embedder, a convolution
        q, sums = jax.device_get(_sums(seen[name], site.lhs, site.rhs))
        left = q.astype(np.int64) - np.int64(site.lhs.zero_point)
        right = held_codes(jax.device_get(site.rhs)).astype(np.int64)
        right = right - np.asarray(site.rhs.qparams.zero_point, np.int64)
        assert sums.dtype == np.int32
        np.testing.assert_array_equal(sums[0], left @ right, err_msg=name)
        checked += 1
    assert checked == 2 + 2 * 5 + 2 - 2  # embedder, two blocks, last layer; two operands are kept


def test_the_network_in_integers_is_the_simulated_one():
    state, ready = at_bits(4)
    x, y, t = calibration().x[:2], calibration().y[:2], np.full(2, TIMESTEPS[1])
    simulated, integers = (
        np.asarray(forward("dit")({"params": parameters(state), "quant": quant}, x, t, y))
        for quant in (state.quant, nest_sites(ready))
    )
    # Codes next to a rounding tie may fall either way; a wrong scale would be far off.
    assert np.abs(integers - simulated).max() < 0.05 * np.abs(simulated).max()
    assert np.square(integers - simulated).mean() < 1e-4 * np.square(simulated).mean()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_integers_lower_for_accelerators(platform, bits):
    state, ready = at_bits(bits)
    x, t = tiny_dit.inputs(tiny_dit.CONFIG, 2)
    variables = {"params": parameters(state), "quant": nest_sites(ready)}
    y = np.zeros(2, np.int32)
    apply = model("dit").module.apply
    executing = sum(site.execute for site in ready.values())
    assert executing == len(ready) - 2  # of two sites one operand is kept
    assert lowered_int_dots(apply, variables, x, t, y, platforms=[platform]) == executing
    simulated = {"params": parameters(state), "quant": state.quant}
    assert lowered_int_dots(apply, simulated, x, t, y, platforms=[platform]) == 0
