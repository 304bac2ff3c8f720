"""Balanced channels on a small DiT: the same function, equal saliences after all folds, in the right order."""

import functools

import jax
import numpy as np
import pytest

from qdiff_jax.export.bundle import load_bundle
from qdiff_jax.methods.run import is_modulation_folded, run_method
from qdiff_jax.models import registry
from qdiff_jax.models.families import example_inputs
from qdiff_jax.models.folds import folds_of
from qdiff_jax.named_policies import policy
from qdiff_jax.observe.selectors import CalibrationSet
from qdiff_jax.policy import ACTIVATION, WEIGHT, Rule, make_plan
from qdiff_jax.quant.smoothing import weight_magnitude
from qdiff_jax.sites import list_sites
from qdiff_jax.stages.balance import FOLDED, BalanceConfig, balance_channels
from qdiff_jax.stages.channel_tops import channel_tops
from qdiff_jax.stages.stage import (
    Method,
    Model,
    Stage,
    initial_state,
    kernel_at,
    run_stage,
    tuned_params,
)

from .. import tiny_dit

NET = tiny_dit.network(tiny_dit.CONFIG)
MODEL = Model(NET.module, NET.program, NET.params)
LAYERS = [f"blocks_{i}/{name}" for i in (0, 1) for name in ("attn_qkv", "attn_proj", "mlp_fc1")]


@functools.cache
def data(steps=3):
    """4 samples of each step, whose size grows with the step."""
    index = np.random.default_rng(0).permutation(np.repeat(np.arange(steps, dtype=np.int32), 4))
    x, _ = tiny_dit.inputs(tiny_dit.CONFIG, 4 * steps)
    x = x * (1 + index[:, None, None, None]).astype(np.float32)
    t = np.float32([100, 500, 900])[index]
    y = np.arange(4 * steps, dtype=np.int32) % 4
    return CalibrationSet(x, t, index, 0 * index, y, x)


def plan():
    return make_plan(NET.sites, policy("official:ptq4dit", NET.sites, 4, 8))


def balanced(calibration, planned=None, **options):
    # Batches of 4, so that saliences join over them.
    stage = balance_channels(
        MODEL, calibration, folds_of(NET.program), BalanceConfig(**options), batch_size=4
    )
    return run_stage(stage, initial_state(planned or plan(), jax.random.key(0)), chunk=1)


def tops(params, calibration):
    """{site: [N, C]} of the balanced layers."""
    return channel_tops(MODEL, params, LAYERS, calibration, 0, len(calibration))


def output(params):
    d = data()
    variables = {"params": params, "quant": {}}
    return np.asarray(tiny_dit.forward(tiny_dit.CONFIG)(variables, d.x, d.t, d.y))


def test_full_precision_is_unchanged_and_no_operator_is_added():
    state, report = balanced(data())
    params = tuned_params(NET.params, state.aux)
    before = output(NET.params)
    np.testing.assert_allclose(output(params), before, rtol=0, atol=1e-5 * np.abs(before).max())
    assert jax.tree.structure(params) == jax.tree.structure(NET.params)
    changed = {path.rpartition("/")[0] for path in state.aux["params"]}
    assert changed == {*LAYERS, *(f"blocks_{i}_adaLN/dense" for i in (0, 1))}
    assert set(report["layers"]) == set(LAYERS)
    assert state.aux[FOLDED]
    assert all(layer["largest"] > 1.5 * layer["smallest"] for layer in report["layers"].values())


def test_what_a_bundle_says_of_its_modulation_is_what_was_balanced(tmp_path):
    """Training changes the same parameters (TDQ, BinaryDM) and leaves what the modulation means."""
    state, _ = balanced(data(1), layers=("attn_proj",))
    assert FOLDED not in state.aux
    diffusion = registry.load("random:dit")
    sites = list_sites(diffusion.model.module, *example_inputs(diffusion.model.module.config))
    planned = make_plan(sites, policy("common", sites, 4, 8))
    leaves = {
        "blocks_0_adaLN/dense/bias": diffusion.model.params["blocks_0_adaLN"]["dense"]["bias"]
    }
    for folded in (False, True):
        aux = {"params": leaves, **({FOLDED: np.True_} if folded else {})}
        trained = Stage(
            "trained",
            lambda state, store: state,
            lambda state, n: state,
            lambda state, aux=aux: (state.replace(aux=aux), {}),
            lambda state: True,
        )
        folder = tmp_path / str(folded)
        run_method(
            Method("qat", (trained,)),
            diffusion,
            planned,
            jax.random.key(0),
            folder,
            sampler_config={"name": "ddim", "spacing": "uniform", "steps": 2},
            extra={},
        )
        assert is_modulation_folded(load_bundle(folder / "bundle").manifest) == folded


def test_with_one_step_both_saliences_of_every_layer_are_equal_in_the_end():
    """Of qkv too, whose V columns proj's factors have divided: had its weight been looked at before, it would
    be out of balance wherever V holds the largest weight of a row."""
    state, _ = balanced(data(1))
    params = tuned_params(NET.params, state.aux)
    for site, top in tops(params, data(1)).items():
        weight = np.asarray(weight_magnitude(kernel_at(params, site)))
        np.testing.assert_allclose(top.max(0), weight, rtol=1e-4, err_msg=site)
    before = tops(NET.params, data(1))["blocks_0/attn_qkv"].max(0)
    weight = np.asarray(weight_magnitude(kernel_at(NET.params, "blocks_0/attn_qkv")))
    assert np.abs(np.log(before / weight)).max() > 1.0


@pytest.mark.parametrize("rows", ["step", "sample"])
def test_rows_are_weighed_by_rho(rows):
    """fc1, whose weight no other fold touches: s from saliences read in one pass."""
    state, report = balanced(data(), rows=rows)
    site = "blocks_1/mlp_fc1"
    seen, w = tops(NET.params, data())[site], weight_magnitude(kernel_at(NET.params, site))
    if rows == "step":
        seen = np.stack([seen[data().index == i].max(0) for i in range(3)])
    layer = report["layers"][site]
    assert len(layer["eta"]) == len(seen)
    np.testing.assert_allclose(sum(layer["eta"]), 1.0, rtol=1e-5)
    ratios = np.array(layer["eta"]) / layer["eta"][0]
    np.testing.assert_allclose(ratios, np.exp(layer["rho"][0] - np.array(layer["rho"])), rtol=1e-4)
    s = np.sqrt(np.array(layer["eta"]) @ seen / w)
    made = state.aux["params"][f"{site}/kernel"] / NET.params["blocks_1"]["mlp_fc1"]["kernel"]
    np.testing.assert_allclose(made, np.broadcast_to(s[:, None], made.shape), rtol=1e-4)


def test_without_ssc_all_steps_weigh_alike():
    _, report = balanced(data(), ssc=False)
    for layer in report["layers"].values():
        np.testing.assert_allclose(layer["eta"], 1 / 3, rtol=1e-6)
        assert np.ptp(layer["rho"]) > 0


def test_layers_of_which_nothing_is_quantized_are_left_alone():
    one = "blocks_1/attn_proj"
    operands = ("input", "q", "k", "v", "softmax", "weight")
    rules = [Rule("one", one, ("weight",), 4, WEIGHT), Rule("rest", "*", operands, None, None)]
    state, report = balanced(data(), make_plan(NET.sites, rules))
    assert set(report["layers"]) == {one}
    assert {path.rpartition("/")[0] for path in state.aux["params"]} == {one, "blocks_1/attn_qkv"}
    none = Rule("embedder", "x_embedder/proj", ("input",), 4, ACTIVATION)
    state, report = balanced(data(), make_plan(NET.sites, (none, rules[1])))
    assert state.aux["params"] == report["layers"] == {}


def test_what_cannot_be_balanced_is_refused():
    with pytest.raises(ValueError, match="rows 'token' is unknown"):
        BalanceConfig(rows="token")
    broken = data().replace(x=data().x * np.float32(np.nan))
    with pytest.raises(ValueError, match="blocks_1/mlp_fc1: its input holds NaN"):
        balanced(broken)
