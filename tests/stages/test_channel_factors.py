"""Channel factors and softmax grids on a small U-Net: exact in full precision, chosen by the data."""

import functools

import jax
import numpy as np
import pytest

from qdiff_jax.methods.tcaq import attention_norms
from qdiff_jax.models.program import temporal_nodes
from qdiff_jax.observe.selectors import CalibrationSet
from qdiff_jax.policy import ACTIVATION, ALWAYS_ZERO, WEIGHT, Rule, make_plan
from qdiff_jax.quant.softmax_grid import kind_of
from qdiff_jax.quant.timed import TimeIndexed
from qdiff_jax.sites import flatten_sites
from qdiff_jax.stages.channel_factors import FactorConfig, move_channel_factors
from qdiff_jax.stages.softmax_grids import SoftmaxGridConfig, choose_softmax_grids
from qdiff_jax.stages.stage import Model, initial_state, run_stage, tuned_params

from .. import tiny_unet

NET = tiny_unet.network(tiny_unet.SMALL)
MODEL = Model(NET.module, NET.program, NET.params)
ATTENTION = tuple(f"mid_attn_1/{op}" for op in ("q", "k", "v"))
LAYERS = ("conv_in/conv", "down_0_block_0/conv1", *ATTENTION)
TIMES = np.float32([100.0, 500.0, 900.0])


@functools.cache
def data():
    rng = np.random.default_rng(0)
    index = rng.permutation(np.repeat(np.arange(3, dtype=np.int32), 4))
    x = rng.standard_normal((12, 4, 4, 3)) * (1.0 + index[:, None, None, None]) * [1.0, 4.0, 0.2]
    none = np.zeros(12, np.int32)
    x = x.astype(np.float32)
    return CalibrationSet(x, TIMES[index], index, none, None, np.zeros_like(x))


@functools.cache
def plan():
    both = ("input", "weight", "q", "k", "v")
    rules = [Rule("time", "temb/dense_1", ("input",), 4, ACTIVATION)]
    for name in LAYERS:
        rules += [
            Rule(name, name, ("input",), 4, ACTIVATION),
            Rule(name, name, ("weight",), 4, WEIGHT),
        ]
    rules.append(Rule("softmax", "*", ("softmax",), 4, ALWAYS_ZERO))
    return make_plan(NET.sites, (*rules, Rule("rest", "*", both, None, None)))


@functools.cache
def moved(exponent="search"):
    stage = move_channel_factors(
        MODEL,
        data(),
        3,
        FactorConfig(groups=3, exponent=exponent, search_samples=6),
        operators={site.name: site.operator for site in NET.sites},
        shared=attention_norms(MODEL),
        skip=temporal_nodes(MODEL.program),
        batch_size=6,
    )
    return run_stage(stage, initial_state(plan(), jax.random.key(0)))


def test_full_precision_is_unchanged_folded_or_not():
    state, _ = moved(0.5)
    params = tuned_params(MODEL.params, state.aux)
    forward = tiny_unet.forward(tiny_unet.SMALL)
    x, t = data().x[:4], data().t[:4]
    before, after = (
        np.asarray(forward({"params": p, "quant": {}}, x, t)) for p in (MODEL.params, params)
    )
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
    changed = set(state.aux["params"])
    assert changed == {
        *(f"{name}/kernel" for name in LAYERS),
        "conv_in/conv/divisor",
        "down_0_block_0/conv1/divisor",
        "mid_attn_1/norm/scale",
        "mid_attn_1/norm/bias",
    }
    assert not np.allclose(
        params["mid_attn_1"]["norm"]["scale"], MODEL.params["mid_attn_1"]["norm"]["scale"]
    )


def test_search_never_takes_factors_that_hurt_and_says_where_the_papers_would():
    state, report = moved()
    assert set(report["exponents"]) == {"conv_in/conv", "down_0_block_0/conv1", "mid_attn_1/q"}
    # Three input channels of very different size: factors help the first layer.
    assert report["exponents"]["conv_in/conv"] is not None
    for name, exponent in report["exponents"].items():
        assert (f"{name}/kernel" in state.aux["params"]) == (exponent is not None)
    for error in report["errors"].values():
        assert error["taken"] <= error["without"]


def test_the_papers_exponent_says_where_it_hurts(caplog):
    """Two weight bits and a wide input: moving its range into the weights costs more than it saves."""
    caplog.set_level("WARNING")
    _, report = moved(1.0)
    hurt = {name for name, e in report["errors"].items() if e["taken"] > e["without"]}
    assert set(report["worse_at_one"]) == hurt
    said = [
        r.getMessage() for r in caplog.records if "with exponent 1 than without" in r.getMessage()
    ]
    assert len(said) == bool(hurt)


def test_layers_that_share_a_normalization_share_their_factors():
    state, _ = moved(0.5)
    old = {name: MODEL.params["mid_attn_1"][name]["kernel"] for name in ("q", "k", "v")}
    factors = [
        np.asarray(state.aux["params"][f"mid_attn_1/{name}/kernel"] / old[name])[:, :1]
        for name in ("q", "k", "v")
    ]
    for other in factors[1:]:
        np.testing.assert_allclose(other, factors[0], rtol=1e-4)


def test_an_exponent_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="'search' or a number"):
        FactorConfig(exponent="paper")


def test_each_softmax_output_gets_a_table_over_steps():
    config = SoftmaxGridConfig(samples=64)
    stage = choose_softmax_grids(MODEL, data(), TIMES, config, batch_size=6)
    state, report = run_stage(stage, initial_state(plan(), jax.random.key(0)))
    (entry,) = plan().quantized("softmax")
    site = flatten_sites(state.quant)[entry.site]
    assert isinstance(site.lhs, TimeIndexed)
    assert site.product
    assert site.lhs.table.scale.shape == (3,)
    assert report["log2_steps"].keys() == {entry.site}
    carry = stage.init(initial_state(plan(), jax.random.key(0)), None)
    while not stage.done(carry):
        carry = stage.run(carry, 1)
    index, values, top = (
        np.concatenate(part) for part in zip(*carry.values[f"{entry.site}:softmax"])
    )
    expected = [kind_of(values[index == i], 1.0, 15.0) for i in range(3)]
    assert sum(expected) == report["log2_steps"][entry.site]
    assert (top <= 1.0).all()
