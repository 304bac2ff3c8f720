"""Before and after: errors of known quantizers, a split that serves both maps, and the command's picture."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import remedies as command
from qdiff_jax.analysis import remedies as module
from qdiff_jax.analysis.figures_remedies import remedies_figure
from qdiff_jax.analysis.remedies import Remedies, activation_error, skip_error
from qdiff_jax.analysis.subject import make_subject
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
        {"rtn": [0.1], "tfmq": [0.01]},
    )
    figure = remedies_figure(
        result._replace(skips={k: np.array(v) for k, v in result.skips.items()})
    )
    assert len(figure.axes) == 4
    assert {text.get_text() for text in figure.axes[0].get_legend().get_texts()} == set(lines)
    assert len(remedies_figure(result._replace(layers=(), skips={})).axes) == 3


@pytest.mark.slow
def test_the_command_on_a_run(smoke_run, tmp_path):
    names = ["rtn_w4a8", "tfmq_w4a8"]
    verdict = command.measure(smoke_run, names, 2, 2, tmp_path)
    record = json.loads((tmp_path / "remedies.json").read_text())
    assert record["verdict"] == verdict
    assert set(record["temporal"]) == set(names)
    with Image.open(tmp_path / "remedies.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5
    with pytest.raises(ValueError, match="no finished variant 'tfmq_w4a4'; there are"):
        command.measure(smoke_run, ["tfmq_w4a4"], 2, 2, tmp_path)


def test_kinds_that_have_no_static_range_are_left_out(subject):
    held = variables(subject, lambda _: None)
    assert module._quantizer(flatten_sites(held["quant"]), "conv_in/conv:input") is None
    assert jax.tree.leaves(held["quant"]) == []
