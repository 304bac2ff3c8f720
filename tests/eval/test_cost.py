"""Multiply-accumulates against the compiler's own count, and BitOps of mixed widths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.eval.cost import network_cost, operand_bits, planned_cost, site_macs
from qdiff_jax.export.qtensor import from_codes
from qdiff_jax.models.families import example_inputs
from qdiff_jax.models.registry import miniature
from qdiff_jax.named_policies import policy
from qdiff_jax.operators import DENSE, PV, QK, plain, same_conv
from qdiff_jax.policy import ACTIVATION, BINARY_WEIGHT, make_plan
from qdiff_jax.quant.binary import BinaryWeight, second_basis, single_basis
from qdiff_jax.quant.either import LOG2, UNIFORM
from qdiff_jax.quant.qparams import dynamic_qparams, from_range
from qdiff_jax.quant.quantizer import codes
from qdiff_jax.quant.softmax_grid import grid_rows
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.quant.timed import TimeIndexed, from_ranges
from qdiff_jax.sites import Site, SiteQuant, list_sites, nest_sites

SITES = {
    "conv": Site("a/conv", same_conv(3), (2, 8, 6, 4), (3, 3, 4, 5)),
    "strided": Site("a/down", same_conv(3, stride=2), (2, 8, 6, 4), (3, 3, 4, 5)),
    "dense": Site("a/dense", DENSE, (2, 7, 4), (4, 6)),
    "qk": Site("a/qk", QK, (2, 3, 7, 4), (2, 3, 9, 4)),
    "pv": Site("a/pv", PV, (2, 3, 7, 9), (2, 3, 9, 4)),
}
COUNTED = {
    "conv": 8 * 6 * 9 * 4 * 5,
    "strided": 4 * 3 * 9 * 4 * 5,
    "dense": 7 * 4 * 6,
    "qk": 3 * 7 * 9 * 4,
    "pv": 3 * 7 * 9 * 4,
}


@pytest.mark.parametrize("kind", SITES)
def test_macs_of_one_sample_from_shapes(kind):
    """The output's size, which the operator itself says, times the length of its sums."""
    site = SITES[kind]
    lhs, rhs = jnp.zeros(site.lhs_shape), jnp.zeros(site.rhs_shape)
    out = jax.eval_shape(lambda lhs, rhs: plain(site.operator, lhs, rhs, None), lhs, rhs).shape
    if "conv" in kind or kind == "strided":
        length = np.prod(site.rhs_shape[:3])
    else:
        length = site.lhs_shape[-1]
    assert site_macs(site) == COUNTED[kind] == np.prod(out[1:]) * length


@pytest.mark.parametrize("model", ["random:miniature", "random:dit", "random:ldm"])
def test_macs_of_a_network_are_most_of_what_the_compiler_counts(model):
    module = miniature(model).model.module
    inputs = example_inputs(module.config)
    macs = network_cost(list_sites(module, *inputs), {}).macs
    variables = {"params": miniature(model).model.params}
    counted = jax.jit(module.apply).lower(variables, *inputs).cost_analysis()["flops"] / 2
    # It counts norms and activation functions, too, but no products with padding, which at these sizes is
    # up to a third of a convolution.
    assert 0.6 * counted < macs < 1.5 * counted


def test_bitops_weigh_macs_with_both_widths():
    at4, at8 = (from_range(ACTIVATION, -1.0, 1.0, 0, 2**bits - 1) for bits in (4, 8))
    quant = nest_sites({"a/qk": SiteQuant(at4, at8), "a/dense": SiteQuant(lhs=at8)})
    cost = network_cost([SITES["qk"], SITES["dense"], SITES["conv"]], quant)
    wanted = {"qk": 4 * 8, "dense": 8 * 32, "conv": 32 * 32}
    assert cost.bitops == sum(COUNTED[kind] * bits for kind, bits in wanted.items())
    assert cost.by_site["a/dense"] == (COUNTED["dense"], 8, 32)


def test_a_plan_costs_what_its_quantizers_will():
    sites = tuple(SITES.values())
    plan = make_plan(sites, policy("common", sites, 4, 6))

    def held(entry):
        return from_range(entry.spec, 0.0, 1.0, *entry.codes)

    quant = nest_sites(
        {
            site.name: SiteQuant(*(held(plan.of(site.name)[o]) for o in site.operands))
            for site in sites
        }
    )
    planned, made = planned_cost(sites, plan), network_cost(sites, quant)
    assert planned == made
    assert planned.by_site["a/pv"] == (COUNTED["pv"], 8, 6)
    free = planned_cost(sites, make_plan(sites, policy("common", sites, None, None)))
    assert free == network_cost(sites, {})


def test_widths_by_step_are_averaged_over_steps():
    codes = np.float32([2**4 - 1, 2**8 - 1])
    table = from_ranges(ACTIVATION, -np.ones(2), np.ones(2), 0, codes, [0.0, 5.0], rule="step")
    np.testing.assert_array_equal(operand_bits(table), [4, 8])
    cost = network_cost([SITES["qk"]], nest_sites({"a/qk": SiteQuant(table, table)}))
    assert cost.bitops == COUNTED["qk"] * (4 * 4 + 8 * 8) / 2
    with pytest.raises(TypeError, match="dict is no operand"):
        operand_bits({})


def bitops(site, lhs=None, rhs=None):
    """Of one site that holds these."""
    return network_cost([SITES[site]], nest_sites({f"a/{site}": SiteQuant(lhs, rhs)})).bitops


def test_a_grid_whose_kind_follows_the_step_costs_its_codes_at_every_step():
    """DAQ: log2 at one step and uniform at the next, in 4 bits either way."""
    kinds, steps = np.float32([LOG2, UNIFORM]), np.float32([0.0, 5.0])
    table = TimeIndexed(grid_rows(kinds, np.ones(2), 15.0), jnp.asarray(steps), "step")
    assert table.table.spec.grid == "affine_or_log2"
    np.testing.assert_array_equal(operand_bits(table), [4, 4])
    at8 = from_range(ACTIVATION, -1.0, 1.0, 0, 255)
    assert bitops("pv", table, at8) == COUNTED["pv"] * 4 * 8


def test_groups_cost_the_bits_of_their_codes_and_none_for_their_many_scales():
    """SVDQuant: activations in groups measured at run time, weights in groups that are calibrated."""
    dynamic = dynamic_qparams(
        QuantSpec(signed=True, symmetric=True, granularity="group", group=2, dynamic=True), -8, 7
    )
    spec = QuantSpec(granularity="group", axis=-2, group=2)
    ends = np.ones((2, 6), np.float32)
    weight = from_range(spec, -ends, ends, 0, 15)
    stored = from_codes(codes(weight, jnp.zeros((4, 6))), weight, 4)
    for rhs in (weight, stored):
        assert bitops("dense", dynamic, rhs) == COUNTED["dense"] * 4 * 4


def test_a_split_costs_as_much_as_one_range():
    """Q-Diffusion: two ranges of an activation and of a weight, of as many bits as one."""
    lhs = from_range(QuantSpec(granularity="split", boundary=3), -np.ones(2), np.ones(2), 0, 255)
    spec = QuantSpec(granularity="split", axis=-2, boundary=3)
    ends = np.ones((2, 5), np.float32)
    assert bitops("conv", lhs, from_range(spec, -ends, ends, 0, 15)) == COUNTED["conv"] * 8 * 4
    table = from_ranges(
        QuantSpec(granularity="split", boundary=3),
        -np.ones((2, 2)),
        np.ones((2, 2)),
        0,
        np.float32([15, 255]),
        [0.0, 5.0],
        rule="step",
    )
    np.testing.assert_array_equal(operand_bits(table), [4, 8])


def test_binary_weights_cost_one_bit_for_each_basis():
    kernel = np.linspace(-1.0, 1.0, 24, dtype=np.float32).reshape(4, 6)
    grid = single_basis(kernel, BINARY_WEIGHT)
    at4 = from_range(ACTIVATION, -1.0, 1.0, 0, 15)
    stored = from_codes(codes(grid, kernel), grid, 1)
    assert bitops("dense", at4, grid) == bitops("dense", at4, stored) == COUNTED["dense"] * 4
    second = second_basis(kernel, grid)
    for on, gate, bits in ((True, 1.0, 2), (True, 0.0, 1), (False, 1.0, 32)):
        learned = BinaryWeight(grid.scale, second, jnp.float32(gate), jnp.asarray(on))
        assert operand_bits(learned) == bits
    assert operand_bits(BinaryWeight(grid.scale, None, jnp.float32(1), jnp.asarray(True))) == 1
