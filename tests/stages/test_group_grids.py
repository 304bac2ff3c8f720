"""Grids of groups: who gets which, what is refused by name, and the plan of everything else."""

import pytest

from qdiff_jax.operators import DENSE, QK, Operator, same_conv
from qdiff_jax.policy import ACTIVATION, WEIGHT, Rule, make_plan
from qdiff_jax.sites import Site
from qdiff_jax.stages.group_grids import activation_spec, group_plan, weight_spec

SITES = (
    Site("in/conv", same_conv(3), (1, 4, 4, 8), (3, 3, 8, 12)),
    Site("a/fc1", DENSE, (1, 5, 12), (12, 24)),
    Site("a/fc2", DENSE, (1, 5, 24), (24, 12)),
    Site("a/point", Operator("conv"), (1, 4, 4, 24), (1, 1, 24, 12)),
    Site("a/qk", QK, (1, 5, 12), (1, 5, 12)),
)
RULES = (
    Rule("kept", "in/conv", ("input",), None, None),
    Rule("weights", "*", ("weight",), 4, WEIGHT),
    Rule("activations", "*", ("input", "q", "k"), 4, ACTIVATION),
)
PLAN = make_plan(SITES, RULES)


def specs(plan):
    return {(e.site, e.operand): e.spec for e in plan.entries}


def test_both_operands_of_a_layer_share_a_group_and_products_keep_their_plan():
    made, report = group_plan(PLAN, SITES, 4, unsigned=("*/fc2",))
    found = specs(made)
    assert found["in/conv", "weight"] == weight_spec(4)
    assert found["in/conv", "input"] is None
    assert found["a/fc1", "input"] == activation_spec(4)
    assert found["a/fc2", "input"] == activation_spec(4, unsigned=True)
    assert found["a/qk", "q"] == ACTIVATION
    assert report == {"group": 4, "adapted": {}, "unsigned": ["a/fc2"]}
    entry = made.of("a/fc1")
    assert entry["weight"].codes == entry["input"].codes == (-7, 7)
    assert made.of("a/fc2")["input"].codes == (0, 15)
    assert [e.bits for e in made.entries] == [e.bits for e in PLAN.entries]


def test_a_group_that_does_not_divide_is_refused_with_the_site():
    with pytest.raises(
        ValueError, match=r"in/conv has 8 input channels, .* 12 do not divide.*adapt"
    ):
        group_plan(PLAN, SITES, 12)
    with pytest.raises(ValueError, match="misfit 'shrink' is unknown"):
        group_plan(PLAN, SITES, 4, misfit="shrink")


def test_adapted_groups_are_the_largest_divisors_and_are_reported():
    made, report = group_plan(PLAN, SITES, 16, misfit="adapt")
    assert report["adapted"] == {"in/conv": 8, "a/fc1": 12, "a/fc2": 12, "a/point": 12}
    for entry in made.quantized("weight", "input"):
        assert entry.spec.group == report["adapted"][entry.site]


def test_without_groups_there_is_one_scale_per_channel_and_token():
    made, _ = group_plan(PLAN, SITES, 0)
    found = specs(made)
    assert found["a/fc1", "weight"].granularity == "channel"
    assert found["a/fc1", "input"].granularity == "token"


def test_a_padded_input_is_not_shifted():
    plan = make_plan(SITES, RULES[1:])
    with pytest.raises(ValueError, match="in/conv pads its input with zeros"):
        group_plan(plan, SITES, 4, unsigned=("in/*",))
    made, _ = group_plan(plan, SITES, 4, unsigned=("a/point",))
    assert not made.of("a/point")["input"].spec.signed
