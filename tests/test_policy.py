"""Rules -> plan: who is quantized under every named policy, and which rules are refused."""

import json

import pytest

from qdiff_jax.named_policies import POLICIES, last_weight_site, policy
from qdiff_jax.operators import DENSE, PV, QK, same_conv
from qdiff_jax.policy import (
    ACTIVATION,
    ALWAYS_ZERO,
    BINARY_WEIGHT,
    WEIGHT,
    Rule,
    make_plan,
    plan_from_json,
)
from qdiff_jax.sites import Site

from .tiny_unet import TINY, network, plan_of

# W4A6 on the tiny U-Net: {what a site's operands get: the sites}; "*" is every site not named.
# c: one scale per channel; z: always-zero; fp: full precision.
ATTENTION = {
    "q 6, k 6": ["mid_attn_1/qk"],
    "softmax 8z, v 6": ["mid_attn_1/pv"],
}
PRODUCTS_KEPT = {
    "q fp, k fp": ["mid_attn_1/qk"],
    "softmax fp, v fp": ["mid_attn_1/pv"],
}
EVERYTHING = {"input 6, weight 4c": "*", **ATTENTION}
SNAPSHOT = {
    "common": {
        "input 6, weight 4c": "*",
        "input 8, weight 8c": ["conv_in/conv", "out/conv_out"],
        **ATTENTION,
    },
    "official:qdiffusion": EVERYTHING,
    "official:brecq": EVERYTHING,
    "official:tfmq": {
        "input 6, weight 4c": "*",
        "input fp, weight 4c": ["down_0_block_0/conv1", "down_0_block_0/conv2"],
        "input fp, weight fp": [
            "temb/dense_0",
            "conv_in/conv",
            "down_0_downsample/conv",
            "down_1_block_0/nin_shortcut",
            "up_1_block_0/nin_shortcut",
            "up_1_block_1/nin_shortcut",
            "up_1_upsample/conv",
            "up_0_block_0/nin_shortcut",
            "up_0_block_1/nin_shortcut",
            "out/conv_out",
        ],
        **PRODUCTS_KEPT,
    },
    "official:ptq4dm": {
        "input 6, weight 4c": "*",
        "input 8, weight 8c": ["conv_in/conv", "out/conv_out"],
        **PRODUCTS_KEPT,
    },
    "official:tdq": {
        "input 6, weight 4c": "*",
        "input fp, weight fp": ["temb/dense_0", "temb/dense_1"],
        "input 8, weight 8c": ["conv_in/conv", "out/conv_out"],
        **PRODUCTS_KEPT,
    },
    "official:tcaq": {
        "input 6, weight 4c": "*",
        "q 6, k 6": ["mid_attn_1/qk"],
        "softmax 6z, v 6": ["mid_attn_1/pv"],
    },
    "official:ptq4dit": {
        "input 6, weight 4c": "*",
        "q 8, k 8": ["mid_attn_1/qk"],
        "softmax 8z, v 8": ["mid_attn_1/pv"],
    },
    "official:svdquant": {
        "input 6, weight 4c": "*",
        "input fp, weight fp": ["temb/dense_0", "temb/dense_1", "conv_in/conv", "out/conv_out"],
        "input fp, weight 4c": [
            site.name for site in network(TINY).sites if "_temb_proj/" in site.name
        ],
        **PRODUCTS_KEPT,
    },
    "official:efficientdm": {
        "input 6, weight 4c": "*",
        "input 8, weight 8c": [
            "temb/dense_0",
            "temb/dense_1",
            "conv_in/conv",
            "out/conv_out",
        ],
        "input fp, weight fp": [
            "down_0_downsample/conv",
            "down_1_block_0/nin_shortcut",
            "up_1_block_0/nin_shortcut",
            "up_1_block_1/nin_shortcut",
            "up_0_block_0/nin_shortcut",
            "up_0_block_1/nin_shortcut",
        ],
        **PRODUCTS_KEPT,
    },
    "official:binarydm": {
        "input 6, weight 4c": "*",
        "input fp, weight fp": ["temb/dense_0", "temb/dense_1", "conv_in/conv", "out/conv_out"],
        "q 6, k 6": ["mid_attn_1/qk"],
        "softmax 6z, v 6": ["mid_attn_1/pv"],
    },
    "official:ptqd": {
        "input 6, weight 4c": "*",
        "input 8, weight 8c": ["temb/dense_0", "conv_in/conv", "out/conv_out"],
        "input fp, weight fp": [
            "down_0_downsample/conv",
            "down_1_block_0/nin_shortcut",
            "up_1_block_0/nin_shortcut",
            "up_1_block_1/nin_shortcut",
            "up_0_block_0/nin_shortcut",
            "up_0_block_1/nin_shortcut",
        ],
        **ATTENTION,
    },
}
KINDS = {ACTIVATION: "", WEIGHT: "c", ALWAYS_ZERO: "z", BINARY_WEIGHT: "b"}
ALL = Rule("all", "*", ("weight", "input", "q", "k", "v", "softmax"), 8, ACTIVATION)


def by_treatment(plan):
    """{"input 6, weight 4c": [sites in order of execution], ...}"""
    treatment: dict = {}
    for entry in plan.entries:
        got = "fp" if entry.bits is None else f"{entry.bits}{KINDS[entry.spec]}"
        treatment.setdefault(entry.site, []).append(f"{entry.operand} {got}")
    table: dict = {}
    for site, operands in treatment.items():
        table.setdefault(", ".join(operands), []).append(site)
    return table


def test_every_policy_has_a_snapshot():
    assert set(SNAPSHOT) == set(POLICIES)


@pytest.mark.parametrize("name", SNAPSHOT)
def test_which_sites_get_which_bits(name):
    table = by_treatment(plan_of(TINY, name, 4, 6))
    named = {site for sites in SNAPSHOT[name].values() if sites != "*" for site in sites}
    rest = [site.name for site in network(TINY).sites if site.name not in named]
    expected = {got: rest if sites == "*" else sites for got, sites in SNAPSHOT[name].items()}
    assert table == expected


@pytest.mark.parametrize("name", SNAPSHOT)
@pytest.mark.parametrize(("w_bits", "a_bits"), [(4, None), (None, 8), (None, None)])
def test_weights_or_activations_alone(name, w_bits, a_bits):
    plan = plan_of(TINY, name, w_bits, a_bits)
    weights, quantized = set(plan.quantized("weight")), set(plan.quantized())
    assert bool(weights) == (w_bits is not None)
    assert bool(quantized - weights) == (a_bits is not None)
    assert len(plan.entries) == 2 * len(network(TINY).sites)


@pytest.mark.parametrize("name", SNAPSHOT)
def test_one_bit_is_binary_and_what_has_eight_keeps_them(name):
    """The same sites as with four bits, on the grid of +-scale."""
    four, one = (by_treatment(plan_of(TINY, name, bits, 6)) for bits in (4, 1))
    assert one == {got.replace("4c", "1b"): sites for got, sites in four.items()}
    entry = plan_of(TINY, name, 1, 6).of("mid_block_1/conv1")["weight"]
    assert (entry.bits, entry.codes) == (1, (0, 1))


def test_entries_say_their_rule_and_their_codes():
    plan = plan_of(TINY, "common", 4, 6)
    first = plan.of("conv_in/conv")
    assert first["weight"].rule == "first layer at 8 bits"
    assert first["weight"].codes == (0, 255)
    assert plan.of("temb/dense_0")["weight"].codes == (0, 15)
    assert plan_of(TINY, "official:tfmq").of("conv_in/conv") == {}
    assert last_weight_site(network(TINY).sites).name == "out/conv_out"


def test_a_plan_survives_json():
    plan = plan_of(TINY, "official:tfmq", 4, 6)
    assert plan_from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_first_rule_that_takes_an_operand_wins():
    sites = network(TINY).sites
    keep = Rule("attention kept", "*attn*", ("weight",), None, None)
    plan = make_plan(sites, (keep, ALL))
    assert "weight" not in plan.of("mid_attn_1/q")
    assert plan.of("mid_attn_1/q")["input"].bits == 8
    with pytest.raises(ValueError, match="'attention kept'.* matches no site that an earlier rule"):
        make_plan(sites, (ALL, keep))


def test_a_rule_that_takes_nothing_names_the_nearest_site():
    misspelt = Rule("head", "out/conv_uot", ("weight",), 8, WEIGHT)
    with pytest.raises(ValueError, match="'out/conv_uot'.*nearest site name is 'out/conv_out'"):
        make_plan(network(TINY).sites, (misspelt, ALL))


def test_an_operand_that_no_rule_speaks_of_is_named():
    weights = Rule("weights", "*", ("weight",), 4, WEIGHT)
    with pytest.raises(
        ValueError, match="No rule speaks of temb/dense_0:input; end the rules with"
    ):
        make_plan(network(TINY).sites, (weights,))


def test_rules_that_cannot_mean_anything_are_refused():
    with pytest.raises(ValueError, match=r"'typo' names operands \['inputs'\]"):
        Rule("typo", "*", ("inputs",), 8, ACTIVATION)
    with pytest.raises(ValueError, match="asks for 8 bits without saying on which grid"):
        Rule("no grid", "*", ("input",), 8, None)


def test_an_unknown_policy_suggests_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'official:brecq'"):
        policy("oficial:brecq", network(TINY).sites, 4, 8)


def test_presets_leave_out_what_a_model_does_not_have():
    one = (Site("layer", DENSE, (1, 4), (4, 4)),)
    plan = make_plan(one, policy("common", one, 4, 6))
    assert by_treatment(plan) == {"input 8, weight 8c": ["layer"]}  # both the first and the last
    attention = (Site("qk", QK, (1, 4, 2), (1, 4, 2)), Site("pv", PV, (1, 4, 4), (1, 4, 2)))
    both = (*one, *attention)
    plan = make_plan(both, policy("official:qdiffusion", both, 4, 6))
    assert list(by_treatment(plan)) == ["input 6, weight 4c", "q 6, k 6", "softmax 8z, v 6"]
    convs = (Site("a", same_conv(3), (1, 4, 4, 2), (3, 3, 2, 2)),)
    with pytest.raises(ValueError, match="first three convolutions and the model has 1"):
        policy("official:tfmq", convs, 4, 6)
