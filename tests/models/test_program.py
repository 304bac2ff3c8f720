"""Block programs: units cover the network, carry no names, and share compiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from qdiff_jax.models.program import (
    Node,
    apply_unit,
    check_order,
    last_reads,
    make_unit,
    merge_subtrees,
    run_program,
    subtrees,
    temporal_nodes,
    units_with_projections,
    units_with_time_block,
    validate,
)
from qdiff_jax.models.unet_ddpm import unet_program
from qdiff_jax.observe.taps import Tap
from qdiff_jax.sites import SiteQuant

from ..tiny_unet import QUICK, TINY, forward, inputs, network

GROUPINGS = [units_with_projections, units_with_time_block]


class Add(nn.Module):
    """Sums what it reads and adds its bias; None counts as nothing."""

    @nn.compact
    def __call__(self, *values):
        bias = self.param("bias", nn.initializers.ones, ())
        return sum((v for v in values if v is not None), bias)


class Whole(nn.Module):
    program: tuple

    @nn.compact
    def __call__(self, x, y=None):
        return run_program(self, self.program, {"x": x, "y": y})


def node(name, *reads):
    return Node(name, Add(parent=None), reads)


# a -> b -> c -> d, where d reads a again (a skip) and b may be given y.
CHAIN = (node("a", "x"), node("b", "a", "y"), node("c", "b"), node("d", "c", "a"))


@functools.cache
def _walker():
    """A jitted `apply_unit`, its traces, and the kinds of unit it was asked to run."""
    traced = []

    @functools.partial(jax.jit, static_argnames="signature", compiler_options=QUICK)
    def run(signature, params, inputs):
        traced.append(signature)
        return apply_unit(signature, params, [{}] * len(params), inputs)

    return run, traced, set()


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_walking_the_units_is_the_forward_pass_and_equal_blocks_compile_once(grouping):
    net = network(TINY)
    units = grouping(net.program)
    check_order(net.program, units, ("x", "t", "y"))
    run, traced, kinds = _walker()
    x, t = inputs(TINY, 2)
    env = {"x": x, "t": t, "y": None}
    for unit in units:
        params = subtrees(net.params, unit)
        given = tuple(env[name] for name in unit.inputs)
        shapes = jax.tree.map(jnp.shape, (params, given))
        kinds.add((unit.signature, str(shapes)))
        env.update(zip(unit.outputs, run(unit.signature, params, given)))
    expected = forward(TINY)({"params": net.params}, x, t)
    np.testing.assert_allclose(env["out"], expected, atol=2e-6)
    # One trace per signature and shapes, whatever the blocks are called and however many they are.
    assert len(traced) == len(kinds)
    middle = [unit for unit in units if unit.name in ("mid_block_1", "mid_block_2")]
    assert len({unit.signature for unit in middle}) == 1


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_names_stay_out_of_the_static_key(grouping):
    program = unet_program(TINY)
    renamed = tuple(
        Node(f"other_{n.name}", n.module, tuple(r if r in "xty" else f"other_{r}" for r in n.reads))
        for n in program
    )
    signatures = [unit.signature for unit in grouping(program)]
    assert signatures == [unit.signature for unit in grouping(renamed)]
    units = {unit.name: unit.signature for unit in grouping(program)}
    assert hash(units["mid_block_1"]) == hash(units["mid_block_2"])
    assert units["mid_block_1"] == units["mid_block_2"]
    assert units["mid_block_1"] != units["down_0_block_0"]  # other sizes


def test_projections_belong_to_their_block_or_to_the_time_unit():
    program = unet_program(TINY)
    by_block = {unit.name: unit for unit in units_with_projections(program)}
    assert by_block["temb"].nodes == ("temb",)
    block = by_block["up_1_block_0"]
    assert block.nodes == ("up_1_block_0_temb_proj", "up_1_block_0")
    assert block.inputs == ("temb", "mid_block_2", "down_1_block_0")
    assert block.outputs == ("up_1_block_0",)
    time, *rest = units_with_time_block(program)
    assert time.name == "time"
    assert time.nodes == temporal_nodes(program)
    assert time.inputs == ("t",)
    # Only what the image path reads leaves the unit: the projections, not the embedding itself.
    assert time.outputs == time.nodes[1:]
    assert [unit.nodes for unit in rest] == [
        (n.name,) for n in program if n.name not in set(time.nodes)
    ]


def test_temporal_nodes_depend_on_time_and_label_alone():
    program = unet_program(TINY)
    names = temporal_nodes(program)
    assert names[0] == "temb"
    assert set(names[1:]) == {n.name for n in program if n.name.endswith("_temb_proj")}
    # A block that also reads the image is not one, nor is anything behind it.
    mixed = (node("e", "t"), node("p", "e", "y"), node("m", "e", "x"), node("after", "m", "p"))
    assert temporal_nodes(mixed) == ("e", "p")


def test_a_unit_takes_in_and_gives_out_what_crosses_its_border():
    unit = make_unit("middle", CHAIN, ("c", "b"))
    assert unit.nodes == ("b", "c")  # in the program's order
    assert unit.inputs == ("a", "y")
    assert unit.outputs == ("c",)
    assert unit.signature.reads == ((0, 1), (2,))
    assert unit.signature.outputs == (3,)
    assert make_unit("middle", CHAIN, ("b", "c"), keep=("b",)).outputs == ("b", "c")
    assert make_unit("end", CHAIN, ("d",)).outputs == ("d",)  # the last value is nobody's input
    with pytest.raises(ValueError, match=r"'middle' names blocks \['e'\]"):
        make_unit("middle", CHAIN, ("b", "e"))


def test_optional_reads_may_be_absent():
    whole = Whole(CHAIN)
    params = whole.init(jax.random.key(0), 1.0)["params"]
    unit = make_unit("all", CHAIN, "abcd")
    for y in (None, 5.0):
        expected = whole.apply({"params": params}, 1.0, y)
        out = apply_unit(unit.signature, subtrees(params, unit), [{}] * 4, (1.0, y))
        assert out == (expected,)
    # a = 2, b = 3 (8 with y), c = b + 1, d = c + a + 1
    assert float(expected) == 12.0


def test_a_program_that_cannot_run_is_refused():
    validate(CHAIN, ("x", "y"))
    with pytest.raises(ValueError, match=r"'b' reads \['y'\], which no earlier block writes"):
        validate(CHAIN, ("x",))
    with pytest.raises(ValueError, match="'a' is used twice"):
        validate((*CHAIN, node("a", "d")), ("x", "y"))


def test_units_must_cover_the_program_once_and_in_order():
    a, b, c, d = (make_unit(name, CHAIN, (name,)) for name in "abcd")
    check_order(CHAIN, (a, b, c, d), ("x", "y"))
    with pytest.raises(ValueError, match=r"'c' needs \['b'\] before any unit has written it"):
        check_order(CHAIN, (a, c, b, d), ("x", "y"))
    with pytest.raises(ValueError, match=r"differ in \['d'\]"):
        check_order(CHAIN, (a, b, c), ("x", "y"))
    with pytest.raises(ValueError, match="one block twice"):
        check_order(CHAIN, (a, b, b, c, d), ("x", "y"))
    # A unit around a block that is not in it can be run neither before nor after that block.
    around = make_unit("around", CHAIN, ("a", "c"))
    with pytest.raises(ValueError, match=r"'around' needs \['b'\]"):
        check_order(CHAIN, (around, b, d), ("x", "y"))


def test_last_reads_say_when_a_value_may_be_freed():
    units = [make_unit(name, CHAIN, (name,)) for name in "abcd"]
    assert last_reads(units) == {"x": 0, "a": 3, "y": 1, "b": 2, "c": 3}


def test_subtrees_and_what_a_unit_writes_come_back_under_its_blocks():
    net = network(TINY)
    unit = {u.name: u for u in units_with_projections(net.program)}["down_0_block_0"]
    parts = subtrees(net.params, unit)
    assert set(parts[0]) == {"dense"}
    assert subtrees({}, unit) == ({}, {})
    changed = merge_subtrees(net.params, unit, ({"dense": 1}, {}))
    assert changed["down_0_block_0_temb_proj"] == {"dense": 1}
    assert changed["down_0_block_0"] is net.params["down_0_block_0"]
    assert merge_subtrees({}, unit, ({}, {})) == {}

    tap = SiteQuant(tap=Tap())
    quant = ({"dense": tap}, {})
    temb, h = jnp.zeros((2, 32)), jnp.zeros((2, 8, 8, 8))

    def observe(params, temb, h):
        return apply_unit(unit.signature, params, quant, (temb, h), mutable=["observed"])

    (out,), written = jax.eval_shape(observe, parts, temb, h)
    assert out.shape == h.shape
    assert written[0]["observed"]["dense"]["input"]["lo"].shape == (2,)
    assert written[1] == {}
