"""SVDQuant as a method: its stages, what it leaves at each site, what it refuses, whole runs on both models."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.quantize import quantize
from experiments.quantize_config import read_config
from experiments.quantize_job import prepare
from experiments.quantize_settings import method_settings
from experiments.sample import sample_bundle
from qdiff_jax.branch import low_rank
from qdiff_jax.config import load_config
from qdiff_jax.eval.samples import Samples
from qdiff_jax.export.bundle import load_bundle
from qdiff_jax.methods.registry import CalibrationSets, MethodSettings, build
from qdiff_jax.methods.svdquant import UNSIGNED, VARIANTS, SvdQuantConfig
from qdiff_jax.models.program import temporal_nodes
from qdiff_jax.observe.archive import load_arrays
from qdiff_jax.sites import flatten_sites
from qdiff_jax.stages.low_rank_branches import BranchConfig, _path
from qdiff_jax.stages.stage import run_stage

from ..main_job import ROOT
from .cases import (
    NETWORKS,
    SVDQUANT,
    TIMESTEPS,
    begin,
    calibration,
    method,
    model,
    outcome,
    plan,
)
from .contracts import simulated_and_executed

CONFIGS = ROOT / "configs" / "methods" / "svdquant.py"


def made(config, policy="official:svdquant", data=None):
    sets = CalibrationSets(data or calibration(), calibration(), TIMESTEPS)
    return build("svdquant", model(), sets, MethodSettings(svdquant=config)), begin(plan(policy))


def test_stages_in_order():
    assert [stage.name for stage in method("svdquant", 0).stages] == [
        "group_grids",
        "calibrate_activations",
        "calibrate_weights",
        "low_rank_branches",
        "round_to_nearest",
    ]


def test_layers_of_the_blocks_have_branches_and_time_projections_codes_alone():
    state, reports = outcome("svdquant")
    flat = flatten_sites(state.quant)
    figures = reports["low_rank_branches"]["sites"]
    temporal = temporal_nodes(model().program)
    for entry in state.plan.quantized("weight"):
        site, held = entry.site, flat[entry.site]
        branched = site.split("/")[0] not in temporal
        assert (site in figures) == branched
        assert (held.substitute is not None) == branched
        assert (held.lhs is None) == (not branched or site == NETWORKS["unet"].kept_input)
        if branched:
            arrays = held.substitute.arrays
            assert held.substitute.apply is low_rank
            assert arrays.down.shape == (*held.rhs.shape[:-1], 2)
            assert (arrays.down.dtype, arrays.shift) == (np.float16, None)
    assert reports["group_grids"]["adapted"] == {}
    for site, seen in figures.items():
        assert seen["error"] <= seen["one_shot"] * 1.02, site
        assert seen["error"] < seen["plain"], site
        assert (seen["rank"], seen["branch_bits"] > 0) == (2, True)


def test_groups_and_ranks_that_do_not_fit_name_their_site():
    strict = dataclasses.replace(SVDQUANT, misfit="error", group=32)
    stages, state = made(strict)
    # The time projections have 32 channels.
    with pytest.raises(
        ValueError, match=r"down_0_block_0/conv1 has 8 .* groups of 32 do not divide"
    ):
        run_stage(stages.stages[0], state)
    whole = BranchConfig(rank=9, rows=8)
    stages, state = made(dataclasses.replace(SVDQUANT, misfit="error", branch=whole))
    state, _ = run_stage(stages.stages[0], state)
    with pytest.raises(ValueError, match="rank 8, and a branch of rank 9.*misfit='adapt'"):
        stages.stages[3].init(state, None)
    with pytest.raises(ValueError, match="put stages.group_grids first"):
        method("svdquant", 0).stages[3].init(begin(plan("common")), None)


def test_an_input_that_is_not_bounded_below_is_not_taken_as_unsigned():
    config = dataclasses.replace(SVDQUANT, unsigned=("mid_attn_1/proj_out",))
    stages, state = made(config)
    state, report = run_stage(stages.stages[0], state)
    assert report["unsigned"] == ["mid_attn_1/proj_out"]
    with pytest.raises(ValueError, match="mid_attn_1/proj_out: inputs reach -"):
        run_stage(stages.stages[3], state)


def test_inputs_that_are_not_finite_are_refused_before_a_decomposition():
    broken = calibration().replace(x=calibration().x * np.float32(np.nan))
    stages, state = made(SVDQUANT, data=broken)
    state, _ = run_stage(stages.stages[0], state)
    with pytest.raises(ValueError, match="down_0_block_0/conv1: its input holds NaN"):
        run_stage(stages.stages[3], state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ties_and_sums_are_those_of_the_variant_and_no_keys_of_a_config(variant, monkeypatch):
    seen = {}

    def stage(*_, **own):
        seen.update(own)

    monkeypatch.setattr("qdiff_jax.methods.svdquant.low_rank_branches", stage)
    made(dataclasses.replace(SVDQUANT, variant=variant))
    faithful = variant == "faithful"
    assert (seen["later_ties"], seen["stored_sums"]) == (faithful, not faithful)
    assert not {"later_ties", "stored_sums"} & vars(BranchConfig()).keys()


def test_what_a_config_cannot_say_is_refused():
    with pytest.raises(ValueError, match="variant 'paper' is unknown"):
        SvdQuantConfig(variant="paper")
    with pytest.raises(ValueError, match="misfit 'adjust' is unknown"):
        SvdQuantConfig(misfit="adjust")
    with pytest.raises(ValueError, match="group is -1"):
        SvdQuantConfig(group=-1)
    for wrong, message in (
        ({"judge": "block"}, "judge is 'block'"),
        ({"smoothing": "all"}, "smoothing 'all' is unknown"),
        ({"rank": -1}, "rank is -1"),
        ({"alpha": 0.5}, "alpha and beta both"),
        ({"alpha": float("nan"), "beta": float("nan")}, "alpha is nan, beta nan"),
        ({"alpha": 0.5, "beta": 0.5, "smoothing": "none"}, "leave one of the two out"),
        ({"oversample": -1}, "oversample is -1"),
        ({"power": -2}, "power -2"),
        ({"shift": 0.0}, "the shift is positive"),
    ):
        with pytest.raises(ValueError, match=message):
            BranchConfig(**wrong)


@pytest.mark.parametrize(
    ("words", "model_name", "bits", "misfit", "sizes"),
    [
        ("", "dit_fashion", "w4a4", "error", (64, 32, 128, 4096)),
        ("w8a8,laptop", "dit_fashion", "w8a8", "error", (64, 4, 64, 2048)),
        ("w4a8,model=unet,smoke", "random:miniature", "w4a8", "adapt", (4, 2, 128, 4096)),
        ("smoke", "random:dit", "w4a4", "error", (4, 2, 128, 4096)),
    ],
)
def test_words_of_bits_model_and_size_are_read(words, model_name, bits, misfit, sizes):
    config = read_config(load_config(f"{CONFIGS}:{words}"))
    settings = method_settings(config).svdquant
    w_bits, a_bits = int(bits[1]), int(bits[3])
    for method_name in ("rtn", "svdquant"):
        asked = config.variants[f"{method_name}_{bits}"]
        assert (asked.method, asked.w_bits, asked.a_bits) == (method_name, w_bits, a_bits)
    assert (len(config.variants), config.policy) == (2, "official:svdquant")
    assert (config.model, settings.misfit) == (model_name, misfit)
    branch = settings.branch
    assert (settings.group, branch.rank, branch.samples, branch.rows) == sizes
    assert settings.unsigned == (() if "unet" in words else UNSIGNED)
    if not words:
        assert settings == SvdQuantConfig()


def test_words_of_the_method_are_read_and_others_refused():
    given = "w2a4,rank=0,group=0,smoothing=fast,iterations=1,signed,gptq,faithful"
    settings = method_settings(read_config(load_config(f"{CONFIGS}:{given}"))).svdquant
    assert (settings.group, settings.unsigned, settings.variant) == (0, (), "faithful")
    branch = settings.branch
    assert (branch.rank, branch.smoothing, branch.iterations, branch.gptq) == (0, "fast", 1, True)
    pair = read_config(load_config(f"{CONFIGS}:alpha=0.5,beta=0.25")).svdquant
    assert (pair.branch.alpha, pair.branch.beta) == (0.5, 0.25)
    assert read_config(load_config(f"{CONFIGS}:model=unet")).svdquant.unsigned == ()
    for wrong, message in (
        ("w4a32", "w4a32"),
        ("model=pixart", "model"),
        ("later_ties", "later_ties"),
        ("smoothing=none,alpha=0.5,beta=0.5", "write one of the two"),
        ("smoothing=full,beta=0.5", "write one of the two"),
        ("model=unet,signed", "no meaning for model=unet"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(f"{CONFIGS}:{wrong}")


def test_the_notes_say_the_pair_or_the_search():
    notes = method("svdquant", 0).notes
    assert "alpha=0.5, beta=0.5" in notes
    assert "smoothing" not in notes
    searched = dataclasses.replace(SVDQUANT, branch=BranchConfig(rank=2, smoothing="fast"))
    assert made(searched)[0].notes == "variant=fixed, group=4, rank=2, smoothing=fast"


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        ("group=5", {}, r"adaLN/dense has 16 input channels, which groups of 5 do not divide"),
        ("rank=17", {}, "at most rank 16, and a branch of rank 17 was asked for"),
        # The embedder of the common policy reads the image.
        ("group=8", {"policy": "common"}, r"x_embedder/proj has 1 input channels, .* groups of 8"),
        ("", {"svdquant": {"misfit": "adjust"}}, "misfit 'adjust' is unknown"),
        ("", {"svdquant": {"unsigned": ("*/fc3",)}}, r"unsigned: no layer .* matches '\*/fc3'"),
        (
            "",
            {"svdquant": {"branch": {"attention": ("q",)}}},
            "branch.attention: no layer .* matches 'q'",
        ),
        ("", {"svdquant": {"branch": {"alpha": float("nan")}}}, "alpha is nan"),
    ],
)
def test_the_job_finds_what_does_not_fit_before_anything_is_recorded(words, changes, message):
    config = load_config(f"{CONFIGS}:smoke,{words}")
    with config.unlocked():  # some of the keys have their defaults in no config
        config.update(changes)
    with pytest.raises(ValueError, match=message):
        prepare(config)


def test_two_sites_never_share_a_file(tmp_path):
    names = ("a_b/c", "a/b_c", "a/b/c")
    assert len({_path(tmp_path, 0, name) for name in names}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["svdquant", "svdquant closed form"])
def test_packed_codes_execute_in_integers_on_convolutions_too(name):
    state = outcome(name).state
    simulated, integers = simulated_and_executed(state)
    # Codes next to a rounding tie may fall either way; a wrong scale would be far off.
    assert np.square(integers - simulated).mean() < 1e-3 * np.square(simulated).mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", ["smoke", "model=unet,smoke", "faithful,gptq,smoke", "rounding=closed_form,smoke"]
)
def test_a_whole_run_samples_the_same_from_its_bundle_and_close_to_it_in_integers(words, tmp_path):
    config = load_config(f"{CONFIGS}:{words}")
    with config.unlocked():
        del config.variants["rtn_w4a4"]
    quantize(config, tmp_path)
    (_, variant) = json.loads((tmp_path / "report.json").read_text())["variants"]
    assert variant["name"] == "svdquant_w4a4"
    assert np.isfinite(variant["eps_rel_mse"])
    folder = tmp_path / "variants" / "svdquant_w4a4"
    bundle = load_bundle(folder / "bundle")
    flat = flatten_sites(bundle.quant)
    shifted = {n for n, s in flat.items() if s.lhs is not None and not s.lhs.spec.signed}
    wanted = set() if "unet" in words else {f"blocks_{i}/mlp_fc2" for i in range(2)}
    assert shifted == wanted
    biased = {n for n, s in flat.items() if s.bias is not None}
    solved = "closed_form" in words  # which refits every bias
    assert biased == ({n for n, s in flat.items() if s.rhs is not None} if solved else wanted)
    assert all(flat[n].substitute.arrays.shift is not None for n in wanted)
    drawn = load_arrays(folder / "samples.npz", Samples).x
    np.testing.assert_array_equal(sample_bundle(folder / "bundle", tmp_path / "again"), drawn)
    executed = sample_bundle(folder / "bundle", tmp_path / "executed", execute=True)
    assert np.square(executed - drawn).mean() < 0.05 * np.square(drawn).mean()


@pytest.mark.slow
@pytest.mark.parametrize("judge", ["layer", "module"])
def test_the_smoothing_is_searched_by_the_output_of_the_layer_or_of_its_block(judge):
    """With everything on, the search beats a fixed smoothing; what is no attention has one judge."""
    branch = dataclasses.replace(SVDQUANT.branch, alpha=-1.0, beta=-1.0, smoothing="fast")
    config = dataclasses.replace(SVDQUANT, branch=dataclasses.replace(branch, judge=judge))
    stages, state = made(config)
    for stage in stages.stages:
        state, report = run_stage(stage, state)
        if stage.name == "low_rank_branches":
            figures = report["sites"]
    fixed = outcome("svdquant").reports["low_rank_branches"]["sites"]
    for site, seen in figures.items():
        if judge == "layer" or site.rpartition("/")[2] not in ("q", "k", "v"):
            assert seen["error"] < 1.1 * fixed[site]["error"], site
    ratios = [seen["error"] / fixed[site]["error"] for site, seen in figures.items()]
    assert np.mean(np.log(ratios)) < 0
