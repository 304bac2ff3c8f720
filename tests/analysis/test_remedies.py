"""Before and after: errors of known quantizers, a split that serves both maps, and the command's picture."""

import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import remedies as command
from qdiff_jax.analysis import remedies as module
from qdiff_jax.analysis.deviation import rollout_states
from qdiff_jax.analysis.figures_remedies import remedies_figure
from qdiff_jax.analysis.forced import forced_eps
from qdiff_jax.analysis.remedies import Remedies, activation_error, remedies, skip_error
from qdiff_jax.analysis.remedy_pairs import Held, choose_pairs
from qdiff_jax.analysis.subject import NotApplicable, make_subject
from qdiff_jax.diffusion.corrections import affine_table, hooks_of
from qdiff_jax.diffusion.quantized_tensors import quantize_tensors, tensor_ranges
from qdiff_jax.diffusion.samplers import ddim
from qdiff_jax.diffusion.timesteps import make_timesteps
from qdiff_jax.models.registry import load
from qdiff_jax.policy import ACTIVATION
from qdiff_jax.quant.qparams import from_range
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.quant.timed import from_ranges
from qdiff_jax.sites import SiteQuant, flatten_sites, nest_sites


@pytest.fixture(scope="module")
def subject():
    diffusion = load("random:miniature")
    plan = ddim(diffusion.schedule, make_timesteps("uniform", 1000, 2))
    return make_subject(diffusion, plan, samples=2, calibration=1, batch=3)


def variables(subject, make):
    """Every input of a layer under make(site name); nothing else quantized."""
    sites = {site.name: SiteQuant(lhs=make(site.name)) for site in subject.sites if site.has_weight}
    return {"params": subject.model.params, "quant": nest_sites(sites)}


def test_finer_grids_err_less_and_tables_are_read_at_their_step(subject):
    times = np.asarray(subject.trajectory.t)
    coarse = from_range(ACTIVATION, -8.0, 8.0, 0, 15)
    fine = from_range(ACTIVATION, -8.0, 8.0, 0, 255)
    ends = np.float32([8.0, 8.0])
    table = from_ranges(ACTIVATION, -ends, ends, 0, np.float32([15, 255]), times, rule="step")
    found = activation_error(
        subject,
        {
            name: variables(subject, lambda _, q=q: q)
            for name, q in (("c", coarse), ("f", fine), ("t", table))
        },
    )
    assert (found["f"] < 0.05 * found["c"]).all()
    np.testing.assert_allclose(found["t"], [found["c"][0], found["f"][1]], rtol=1e-5)


def test_factors_moved_into_the_weights_stand_around_the_quantizer(subject):
    grid = from_range(ACTIVATION, -8.0, 8.0, 0, 255)
    wide = from_range(ACTIVATION, -32.0, 32.0, 0, 255)
    plain, coarse = (variables(subject, lambda _, q=q: q) for q in (grid, wide))
    layers = [site for site in subject.sites if site.has_weight]
    params = dict(subject.model.params)
    for site in layers:
        block, _, layer = site.name.partition("/")
        own = {**params[block][layer], "divisor": np.full(site.rhs_shape[-2], 0.25, np.float32)}
        params[block] = {**params[block], layer: own}
    moved = {"params": params, "quant": coarse["quant"]}
    found = activation_error(subject, {"plain": plain, "moved": moved, "coarse": coarse})
    # Four times the input on four times the range: the same errors.
    np.testing.assert_allclose(found["moved"], found["plain"], rtol=1e-4)
    assert (found["coarse"] > 4 * found["plain"]).all()
    # A normalization that a variant changed takes its block out for all.
    norm = {
        **params["mid_block_1"],
        "norm1": {"scale": np.float32([2.0]), "bias": np.float32([0.0])},
    }
    assert module._renormed({**params, "mid_block_1": norm}, subject.model.params) == {
        "mid_block_1"
    }


def test_what_a_variant_renormed_or_rotated_is_left_out(subject):
    """Of two layers the coarse one; the other decides alone."""
    coarse, fine = (from_range(ACTIVATION, -8.0, 8.0, 0, top) for top in (3, 255))
    held = {"mid_block_1/conv1": SiteQuant(lhs=coarse), "conv_in/conv": SiteQuant(lhs=fine)}
    full = subject.model.params
    block = full["mid_block_1"]
    scale = np.asarray(block["norm1"]["scale"])
    renormed = {**block, "norm1": {**block["norm1"], "scale": 2 * scale}}
    channels = block["conv1"]["kernel"].shape[-2]
    turned = {**block, "conv1": {**block["conv1"], "rotation": np.ones((1, channels), np.float32)}}

    def median(params, sites):
        other = {"params": full, "quant": nest_sites(sites)}
        return activation_error(subject, {"one": {**other, "params": params}, "other": other})[
            "other"
        ]

    both, alone = median(full, held), median(full, {"conv_in/conv": held["conv_in/conv"]})
    assert (both > 4 * alone).all()
    for params in ({**full, "mid_block_1": renormed}, {**full, "mid_block_1": turned}):
        np.testing.assert_array_equal(median(params, held), alone)
    up = full["up_0_block_0"]
    shortcut = {**up["nin_shortcut"], "rotation": np.ones((1, 1), np.float32)}
    rotated = {**full, "up_0_block_0": {**up, "nin_shortcut": shortcut}}
    one = variables(subject, lambda _: fine)
    layers, error = skip_error(subject, {"one": one, "turned": {**one, "params": rotated}})
    assert layers
    assert "up_0_block_0/nin_shortcut" not in layers
    assert error["one"].shape == (len(layers),)


def test_a_range_for_each_map_serves_the_smaller_one(subject):
    width = subject.model.params["up_0_block_0"]["nin_shortcut"]["kernel"].shape[-2] // 2
    split = QuantSpec(granularity="split", axis=-1, boundary=width)
    one = variables(subject, lambda _: from_range(ACTIVATION, -400.0, 400.0, 0, 255))
    found = {"one": one}
    for name, ends in (("both", [40.0, 40.0]), ("h", [40.0, 400.0]), ("skip", [400.0, 40.0])):
        ends = np.float32(ends)
        found[name] = variables(subject, lambda _, e=ends: from_range(split, -e, e, 0, 255))
    layers, error = skip_error(subject, found)
    assert "up_0_block_0/nin_shortcut" in layers
    assert (error["both"] < 0.1 * error["one"]).all()
    # Whichever map is the smaller one, a finer range of its own serves it, and one of the other does not.
    for k in range(len(layers)):
        own = [error[name][k] < 0.1 * error["one"][k] for name in ("h", "skip")]
        assert sorted(own) == [False, True]


def test_the_picture_has_a_line_for_every_variant():
    steps = np.float32([0.0, 300.0, 800.0])
    lines = {"rtn": np.array([1e-2, 2e-2, 3e-2]), "tfmq": np.array([1e-3, 2e-3, 0.0])}
    result = Remedies(
        {},
        steps,
        lines,
        lines,
        lines,
        ("up_0_block_0/nin_shortcut",),
        {"rtn": np.array([0.1]), "tfmq": np.array([0.01])},
    )
    figure = remedies_figure(result)
    assert len(figure.axes) == 4
    assert {text.get_text() for text in figure.axes[0].get_legend().get_texts()} == set(lines)
    assert len(remedies_figure(result._replace(layers=(), skips={})).axes) == 3
    # A panel for each measure that was made, with the names of its own pair.
    pair = remedies_figure(result._replace(activations={}, temporal={"tfmq": lines["tfmq"]}))
    assert len(pair.axes) == 3
    named = [text.get_text() for text in pair.axes[1].get_legend().get_texts()]
    assert named == ["tfmq"]


def shifted(subject, by):
    """A network whose estimate is full precision's plus `by`, everywhere."""
    params = jax.tree.map(lambda leaf: leaf, subject.model.params)
    params["out"]["conv_out"]["bias"] = params["out"]["conv_out"]["bias"] + by
    return {"params": params, "quant": {}}


def test_a_correction_is_part_of_what_is_measured(subject):
    """A constant error and the correction that takes it out again."""
    steps = np.asarray(subject.sampler.timesteps)
    ones = np.ones((len(steps), 1))
    table = affine_table(ones, -0.1 * ones, np.zeros(len(steps)), steps)
    hooks = hooks_of(table, subject.sampler)
    wrong, full = shifted(subject, 0.1), forced_eps(subject, subject.full)
    np.testing.assert_allclose(forced_eps(subject, wrong), full + 0.1, atol=1e-5)
    np.testing.assert_allclose(forced_eps(subject, wrong, hooks=hooks), full, atol=1e-5)
    variants = {"base": wrong, "ptqd": wrong}
    measures = {"rollout": ("base", "ptqd")}
    found = remedies(subject, variants, measures=measures, hooks={"ptqd": hooks})
    assert (found.accumulated["base"] > 1e-4).all()
    assert (found.accumulated["ptqd"] < 1e-9).all()
    assert set(found.verdict) == {"base/rollout", "ptqd/rollout"}
    assert not found.activations
    assert not found.temporal


@pytest.mark.slow
def test_skips_alone_of_a_model_without_any_are_refused(dit):
    with pytest.raises(NotApplicable, match="no block of this model concatenates a skip"):
        remedies(dit, {"one": dit.full}, measures={"skips": ("one",)})


@pytest.mark.slow
def test_a_quantized_sampler_is_part_of_what_is_measured(subject):
    ranges = tensor_ranges(subject.sampler, subject.calibration, None)
    plan = quantize_tensors(subject.sampler, 4, ranges)
    states = rollout_states(subject, subject.full)
    own = rollout_states(subject, subject.full, sampler=plan)
    assert np.abs(own - states).max() > 1e-3


def test_each_trouble_has_its_remedy_and_what_that_stands_on():
    w4a4 = (4, 4, "common")
    held = {
        "rtn": Held("rtn", "", w4a4),
        "rtn8": Held("rtn", "", (8, 8, "common")),
        "brecq": Held("brecq", "", w4a4),
        "solved": Held("brecq", "rounding=closed_form", w4a4),
        "tdq_solved": Held("tdq", "mode=ptq, rounding=closed_form", w4a4),
        "tdq": Held("tdq", "mode=ptq, rounding=adaround", w4a4),
        "ptqd": Held("ptqd", "base=rtn; variant=fixed", w4a4),
        "tfmq_solved": Held("tfmq", "variant=fixed, rounding=closed_form", w4a4),
        "qdiffusion": Held("qdiffusion", "split=both", (4, 4, "official:qdiffusion")),
    }
    wanted = {
        "activations": ("brecq", "tdq"),
        "rollout": ("rtn", "ptqd"),
        "temporal": ("solved", "tfmq_solved"),
    }
    assert choose_pairs(held) == wanted
    held["rtn_own"] = Held("rtn", "", (4, 4, "official:qdiffusion"))
    assert choose_pairs(held) == {**wanted, "skips": ("rtn_own", "qdiffusion")}
    recipe = {"brecq": held["brecq"], "r": Held("tcr+brecq+par", "", w4a4)}
    assert choose_pairs(recipe) == {"rollout": ("brecq", "r")}
    with pytest.raises(ValueError, match="rollout: no brecq or rtn at the bits and policy of r;"):
        choose_pairs({"rtn8": held["rtn8"], "r": recipe["r"]})


@pytest.mark.slow
def test_the_command_on_a_run(smoke_run, tmp_path):
    names = ["rtn_w4a8", "tfmq_w4a8"]
    folders = command.variant_folders(names, smoke_run)
    verdict = command.measure(folders, 2, 2, tmp_path, every=True)
    record = json.loads((tmp_path / "remedies.json").read_text())
    assert record["verdict"] == verdict
    assert set(record["temporal"]) == set(record["activations"]) == set(names)
    with Image.open(tmp_path / "remedies.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5
    with pytest.raises(ValueError, match="tfmq_w4a4 is no finished variant; beside it there are"):
        command.variant_folders(["tfmq_w4a4"], smoke_run)


def test_labels_are_as_short_as_tells_variants_apart(monkeypatch):
    monkeypatch.setattr(command, "held_in", lambda folder: Held("", "", (folder.parent.name,)))

    def labels(*paths):
        return list(command.short_labels({path: pathlib.Path(path) for path in paths}).values())

    assert labels("a/common/rtn", "a/common/tdq") == ["rtn", "tdq"]
    own = labels("a/common/rtn", "a/official:tdq/rtn", "a/common/tdq")
    assert own == ["rtn (common)", "rtn (tdq)", "tdq"]
    assert labels("a/common/rtn", "b/common/rtn") == ["a/common/rtn", "b/common/rtn"]


@pytest.mark.slow
def test_the_command_finds_pairs_on_a_board(smoke_run, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "main").symlink_to(smoke_run)
    folders = command.board_folders(tmp_path, "random:miniature", "w4a8")
    assert "rtn_w8a8" not in folders
    command.measure(folders, 2, 2, tmp_path, command="the command")
    record = json.loads((tmp_path / "remedies.json").read_text())
    assert record["pairs"] == {"temporal": ["brecq_w4a8", "tfmq_w4a8"]}
    assert set(record["temporal"]) == {"brecq_w4a8", "tfmq_w4a8"}
    assert record["activations"] == {}
    assert record["made_with"]["command"] == "the command"
    assert record["made_with"]["commit"]
    with pytest.raises(ValueError, match="no variant of random:miniature at w4a4; there are"):
        command.board_folders(tmp_path, "random:miniature", "w4a4")


def test_kinds_that_have_no_static_range_are_left_out(subject):
    held = variables(subject, lambda _: None)
    assert module._quantizer(flatten_sites(held["quant"]), "conv_in/conv:input") is None
    assert jax.tree.leaves(held["quant"]) == []
