"""Methods on a U-Net with cross-attention, whose condition is a context: nothing but the model is new."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from qdiff_jax.export.bundle import load_bundle, save_bundle
from qdiff_jax.export.qtensor import QTensor
from qdiff_jax.methods.registry import CalibrationSets, MethodSettings, build, check_network
from qdiff_jax.models.families import example_inputs, make_module, model_json, parameter_shapes
from qdiff_jax.models.registry import from_config
from qdiff_jax.models.unet_ldm import UNetLDMConfig, unet_ldm_program
from qdiff_jax.named_policies import POLICIES, policy
from qdiff_jax.observe.selectors import CalibrationSet
from qdiff_jax.policy import make_plan
from qdiff_jax.quant.timed import TimeIndexed, select, step_context
from qdiff_jax.sites import flatten_sites, list_sites
from qdiff_jax.stages.calibrate import ActivationConfig
from qdiff_jax.stages.layer_branch import Solved
from qdiff_jax.stages.layer_rounding import ClosedFormConfig
from qdiff_jax.stages.low_rank_branches import (
    PROJECTIONS,
    BranchConfig,
    Carry,
    low_rank_branches,
    matches,
)
from qdiff_jax.stages.reconstruct import ReconstructConfig
from qdiff_jax.stages.stage import Model, fold_weights, initial_state, run_stage

from ..stages.chain import leaves_equal
from ..tiny_unet import QUICK, random_params

# One transformer, in the middle; residual blocks, skips and time projections around it.
CONFIG = UNetLDMConfig(
    channels=8,
    multipliers=(1,),
    res_blocks=1,
    attention_downsampling=(),
    resolution=4,
    heads=2,
    head_channels=None,
    context_dim=6,
    context_length=3,
    groups=4,
)
TIMESTEPS = np.float32([100.0, 500.0, 900.0])
BLOCK = "middle_block_1_transformer_blocks_0"


@functools.cache
def model() -> Model:
    params = random_params(parameter_shapes(CONFIG))
    return Model(make_module(CONFIG), unet_ldm_program(CONFIG), params)


@functools.cache
def calibration() -> CalibrationSet:
    rng = np.random.default_rng(3)
    index = rng.permutation(np.repeat(np.arange(3, dtype=np.int32), 8))
    x = rng.standard_normal((24, 4, 4, 3)).astype(np.float32)
    y = rng.standard_normal((24, 3, 6)).astype(np.float32)
    return CalibrationSet(x, TIMESTEPS[index], index, np.zeros(24, np.int32), y, x)


@functools.cache
def plan(name="common"):
    sites = list_sites(make_module(CONFIG), *example_inputs(CONFIG))
    return make_plan(sites, policy(name, sites, 4, 8))


def run_method(name, steps, policy_name="common", **options):
    settings = MethodSettings(
        weights=ReconstructConfig(steps=steps, batch_size=8, lr=5e-2, walk_batch=12),
        activations=ActivationConfig(batch_size=6),
        closed_form=ClosedFormConfig(walk_batch=12, check_samples=12),
        **options,
    )
    sets = CalibrationSets(calibration(), calibration(), TIMESTEPS)
    state, reports = initial_state(plan(policy_name), jax.random.key(5), "a" * 64), {}
    for stage in build(name, model(), sets, settings).stages:
        state, reports[stage.name] = run_stage(stage, state)
    return state, reports


@functools.cache
def forward():
    return jax.jit(make_module(CONFIG).apply, compiler_options=QUICK)


def estimates(params, quant, y=None, rows=slice(0, 6)):
    c = calibration()
    quant = select(quant, step_context(TIMESTEPS[1], 1))
    t = np.full(len(c.x[rows]), TIMESTEPS[1])
    y = c.y[rows] if y is None else y
    return np.asarray(forward()({"params": params, "quant": quant}, c.x[rows], t, y))


def error(state) -> float:
    """Of the quantized network relative to the spread of the full-precision one."""
    full = estimates(model().params, {})
    made = estimates(*fold_weights(model().params, state.quant))
    return float(np.abs(made - full).mean() / full.std())


def test_round_to_nearest_quantizes_every_site_and_goes_through_a_bundle(tmp_path):
    state, _ = run_method("rtn", 0)
    flat = flatten_sites(state.quant)
    for part in ("q", "k", "v", "out_0"):
        held = flat[f"{BLOCK}/attn2_to_{part}"]
        assert isinstance(held.rhs, QTensor)
        assert held.rhs.bits == 4
        assert held.lhs is not None
    assert set(flat) == {entry.site for entry in state.plan.entries}
    assert 1e-3 < error(state) < 0.5

    save_bundle(
        tmp_path / "bundle",
        params=model().params,
        quant=state.quant,
        plan_json=state.plan.to_json(),
        model_config=model_json(CONFIG),
        schedule_config={"schedule": "linear", "timesteps": 1000},
        sampler_config={"name": "ddim"},
        source={"sha256": state.source},
    )
    bundle = load_bundle(tmp_path / "bundle")
    assert from_config(bundle.manifest["model"]) is make_module(CONFIG)
    # Of a packed layer without a bias nothing is left among the parameters.
    assert not bundle.params[BLOCK].get("attn2_to_k")
    folded, original = (
        estimates(*fold_weights(p, q))
        for p, q in ((bundle.params, bundle.quant), (model().params, state.quant))
    )
    np.testing.assert_array_equal(folded, original)


def test_the_context_is_read():
    y = calibration().y[:6]
    same, other = (estimates(model().params, {}, c) for c in (y, y[::-1]))
    assert np.abs(same - other).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["brecq", "qdiffusion", "tfmq", "closed_form"])
def test_learned_rounding_runs_through_cross_attention(name):
    state, _ = run_method(name, 8)
    assert all(
        isinstance(flatten_sites(state.quant)[e.site].rhs, QTensor)
        for e in plan().quantized("weight")
    )
    nearest, _ = run_method("rtn", 0)
    wrong, plain = error(state), error(nearest)
    assert np.isfinite(wrong)
    if name == "closed_form":  # eight steps of descent prove nothing; a solution must
        assert wrong < plain, (wrong, plain)
    if name == "tfmq":
        held = flatten_sites(state.quant)
        assert isinstance(held["middle_block_0_emb_layers_1/dense"].lhs, TimeIndexed)
        assert not isinstance(held[f"{BLOCK}/attn2_to_k"].lhs, TimeIndexed)


@pytest.mark.slow
def test_reconstruction_with_zero_steps_is_round_to_nearest():
    nearest, walked = (flatten_sites(run_method(n, 0)[0].quant) for n in ("rtn", "brecq"))
    for site, held in nearest.items():
        assert leaves_equal(held.rhs, walked[site].rhs), site


TIME = ("time_embed/dense_0", "time_embed/dense_2")
FIRST, LAST = "input_blocks_0_0/conv", "out/out_2"
SHORTCUT, PROJECTION = "output_blocks_0_0/skip_connection", "middle_block_0_emb_layers_1/dense"
PRODUCT, INNER = f"{BLOCK}/attn1_qk", f"{BLOCK}/ff_net_2"
# W4A8: bits of weight and input (q and k for the product), None for full precision.
FULL, EIGHT, TARGET = (None, None), (8, 8), (4, 8)
ENDS = {FIRST: EIGHT, LAST: EIGHT}
EVERYTHING = {TIME[0]: TARGET, FIRST: TARGET, LAST: TARGET, SHORTCUT: TARGET, PRODUCT: EIGHT}
PRESETS = {
    "official:qdiffusion": EVERYTHING,
    "official:brecq": EVERYTHING,
    "official:tcaq": EVERYTHING,
    "official:ptq4dit": EVERYTHING,
    "official:tfmq": {TIME[0]: FULL, SHORTCUT: FULL, FIRST: FULL, LAST: FULL, PRODUCT: FULL},
    "official:ptqd": {TIME[0]: EIGHT, TIME[1]: TARGET, SHORTCUT: FULL, **ENDS, PRODUCT: EIGHT},
    "official:ptq4dm": {**ENDS, TIME[0]: TARGET, SHORTCUT: TARGET, PRODUCT: FULL},
    "official:tdq": {**dict.fromkeys(TIME, FULL), **ENDS, PRODUCT: FULL},
    "official:svdquant": {
        **dict.fromkeys((*TIME, FIRST, LAST, PRODUCT), FULL),
        PROJECTION: (4, None),
        SHORTCUT: TARGET,
    },
    "official:efficientdm": {
        **dict.fromkeys(TIME, EIGHT),
        **ENDS,
        SHORTCUT: FULL,
        PROJECTION: TARGET,
        PRODUCT: FULL,
    },
    "official:binarydm": {**dict.fromkeys((*TIME, FIRST, LAST), FULL), PRODUCT: EIGHT},
}


@pytest.mark.parametrize("name", [name for name in POLICIES if name.startswith("official:")])
def test_presets_of_papers_know_this_familys_names(name):
    entries = {(e.site, e.operand): e.bits for e in plan(name).entries}
    for site, bits in {INNER: TARGET, **PRESETS[name]}.items():
        operands = ("q", "k") if site == PRODUCT else ("weight", "input")
        assert tuple(entries[site, operand] for operand in operands) == bits, site


def test_downsampling_and_upsampling_between_resolutions_are_known_too():
    config = dataclasses.replace(CONFIG, multipliers=(1, 1))
    sites = list_sites(make_module(config), *example_inputs(config))
    bits = {}
    for name in ("official:efficientdm", "official:tfmq"):
        made = make_plan(sites, policy(name, sites, 4, 8))
        bits[name] = {e.site: e.bits for e in made.entries if e.operand == "weight"}
    assert bits["official:efficientdm"]["input_blocks_2_0/op"] is None
    assert bits["official:efficientdm"]["output_blocks_1_1/conv"] == 4
    assert bits["official:tfmq"]["output_blocks_1_1/conv"] is None


def test_svdquant_judges_projections_by_their_block():
    for part in ("attn1_to_q", "attn2_to_k", "attn2_to_v"):
        assert matches(f"{BLOCK}/{part}", PROJECTIONS)
    for part in ("attn1_to_out_0", "ff_net_2"):
        assert not matches(f"{BLOCK}/{part}", PROJECTIONS)


@pytest.mark.parametrize("sums", [None, np.float32(np.arange(8))])
def test_svdquant_finishes_layers_without_a_bias(sums):
    """Of a layer without a bias that of the shift alone is left."""
    name = f"{BLOCK}/attn1_to_q"
    made = Solved(
        codes=np.ones((8, 8), np.int8),
        scale=np.ones(8, np.float32),
        exponents=np.zeros(2, np.float32),
        errors=np.float32([1, np.nan, 1]),
        iterations=np.int32(0),
        sums=sums,
    )
    stage = low_rank_branches(model(), (), calibration(), BranchConfig(shift=0.5))
    state = initial_state(plan("official:svdquant"), jax.random.key(0))
    state, _ = stage.finish(Carry(state, 0, {}, {name: made}, None))
    bias = flatten_sites(state.quant)[name].bias
    if sums is None:
        assert bias is None
    else:
        np.testing.assert_array_equal(bias, -0.5 * sums)


def test_ptq4dit_says_that_it_does_not_know_these_blocks():
    with pytest.raises(ValueError, match="DiT blocks .*PixArt and of latent diffusion are not"):
        check_network("ptq4dit", model())
