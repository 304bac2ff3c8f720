"""Methods on a transformer whose condition is a pytree (caption, mask, sizes): nothing but the model is new."""

import functools

import jax
import numpy as np
import pytest

from qdiff_jax.methods.registry import CalibrationSets, MethodSettings, build, check_network
from qdiff_jax.models.families import example_inputs, make_module, parameter_shapes, program_of
from qdiff_jax.models.pixart import PixArtConfig
from qdiff_jax.named_policies import POLICIES, policy
from qdiff_jax.observe.selectors import CalibrationSet
from qdiff_jax.policy import make_plan
from qdiff_jax.quant.timed import select, step_context
from qdiff_jax.sites import flatten_sites, list_sites
from qdiff_jax.stages.calibrate import ActivationConfig
from qdiff_jax.stages.layer_rounding import ClosedFormConfig
from qdiff_jax.stages.low_rank_branches import PROJECTIONS, matches
from qdiff_jax.stages.reconstruct import ReconstructConfig
from qdiff_jax.stages.stage import Model, fold_weights, initial_state, run_stage

from ..tiny_unet import QUICK, random_params

CONFIG = PixArtConfig(
    width=12,
    depth=1,
    heads=2,
    resolution=4,
    interpolation=1.0,
    caption_dim=6,
    caption_length=3,
    micro_conditions=True,
    learn_sigma=False,
)
TIMESTEPS = np.float32([100.0, 500.0, 900.0])


@functools.cache
def calibration():
    rng = np.random.default_rng(3)
    index = rng.permutation(np.repeat(np.arange(3, dtype=np.int32), 8))
    x = rng.standard_normal((24, 4, 4, 4)).astype(np.float32)
    y = {
        "context": rng.standard_normal((24, 3, 6)).astype(np.float32),
        "mask": np.tile(np.float32([1, 1, 0]), (24, 1)),
        "resolution": np.tile(np.float32([16, 8]), (24, 1)),
        "aspect_ratio": np.full((24, 1), 2.0, np.float32),
    }
    return CalibrationSet(x, TIMESTEPS[index], index, np.zeros(24, np.int32), y, x)


@functools.cache
def model():
    params = random_params(parameter_shapes(CONFIG))
    return Model(make_module(CONFIG), program_of(CONFIG), params)


def estimates(params, quant):
    c = calibration()
    quant = select(quant, step_context(TIMESTEPS[1], 1))
    forward = jax.jit(make_module(CONFIG).apply, compiler_options=QUICK)
    y = jax.tree.map(lambda leaf: leaf[:6], c.y)
    variables = {"params": params, "quant": quant}
    return np.asarray(forward(variables, c.x[:6], np.full(6, TIMESTEPS[1]), y))


@pytest.mark.parametrize(
    "name",
    [
        "rtn",
        pytest.param("brecq", marks=pytest.mark.slow),
        pytest.param("closed_form", marks=pytest.mark.slow),
    ],
)
def test_a_method_quantizes_every_operator(name):
    sites = list_sites(make_module(CONFIG), *example_inputs(CONFIG))
    plan = make_plan(sites, policy("common", sites, 4, 8))
    settings = MethodSettings(
        weights=ReconstructConfig(steps=60, batch_size=8, lr=5e-2, walk_batch=12),
        activations=ActivationConfig(batch_size=6),
        closed_form=ClosedFormConfig(walk_batch=12, check_samples=12),
    )
    state = initial_state(plan, jax.random.key(5), "a" * 64)
    for stage in build(
        name, model(), CalibrationSets(calibration(), calibration(), TIMESTEPS), settings
    ).stages:
        state, _ = run_stage(stage, state)
    assert set(flatten_sites(state.quant)) == {site.name for site in sites}
    full = estimates(model().params, {})
    made = estimates(*fold_weights(model().params, state.quant))
    assert 1e-3 < np.abs(made - full).mean() / full.std() < 0.3


FULL, EIGHT, TARGET = (None, None), (8, 8), (4, 8)
ENDS = {"x_embedder/proj": EIGHT, "final_layer/linear": EIGHT}
TIME = ("t_embedder/mlp_0", "t_embedder/csize_mlp_2")
# W4A8: bits of weight and input where a preset speaks of this family's own layers.
PRESETS = {
    "official:ptqd": {"t_embedder/mlp_0": EIGHT, "t_embedder/mlp_2": TARGET, **ENDS},
    "official:ptq4dm": {"t_embedder/mlp_0": TARGET, **ENDS},
    "official:tdq": {**dict.fromkeys(TIME, FULL), "t_block/dense": TARGET, **ENDS},
    "official:svdquant": {
        **dict.fromkeys((*TIME, "y_embedder/fc1", *ENDS), FULL),
        "t_block/dense": (4, None),
    },
    "official:efficientdm": {**dict.fromkeys(TIME, EIGHT), "t_block/dense": TARGET, **ENDS},
    "official:binarydm": {**dict.fromkeys((*TIME, *ENDS), FULL), "y_embedder/fc1": TARGET},
}


# TFMQ's speaks of three convolutions, and refuses a transformer.
@pytest.mark.parametrize(
    "name", [n for n in POLICIES if n.startswith("official:") and n != "official:tfmq"]
)
def test_presets_of_papers_know_this_familys_names(name):
    sites = list_sites(make_module(CONFIG), *example_inputs(CONFIG))
    made = make_plan(sites, policy(name, sites, 4, 8))
    bits = {(e.site, e.operand): e.bits for e in made.entries}
    everything = dict.fromkeys((*TIME, "t_block/dense", "y_embedder/fc1", *ENDS), TARGET)
    wanted = PRESETS.get(name, everything)
    for site, pair in {"blocks_0/cross_attn_kv_linear": TARGET, **wanted}.items():
        assert (bits[site, "weight"], bits[site, "input"]) == pair, site


def test_svdquant_judges_projections_by_their_block():
    taken = [s.name for s in list_sites(make_module(CONFIG), *example_inputs(CONFIG))]
    taken = [name.split("/")[1] for name in taken if matches(name, PROJECTIONS)]
    assert taken == ["attn_qkv", "cross_attn_q_linear", "cross_attn_kv_linear"]


def test_ptq4dit_says_that_it_does_not_know_these_blocks():
    with pytest.raises(ValueError, match="DiT blocks .*PixArt and of latent diffusion are not"):
        check_network("ptq4dit", model())
