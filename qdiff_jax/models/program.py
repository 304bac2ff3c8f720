"""Block programs: a model as a static list of (module, what it reads, what it writes) in execution order.

Running the list is the forward pass; walking it with two streams is calibration and reconstruction;
keeping its writes is feature caching. Names never enter a static argument of a compiled function:
a unit is compiled by its `Signature`, in which values are numbered, so identical blocks share one
compile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import linen as nn


class Node(NamedTuple):
    """One block: an unnamed, unbound Linen module, the values it reads, the one it writes.

    The node's parameters and quantizers live under `params[name]` and `quant[name]`; the value it
    writes carries the node's name. `optional` reads may be absent from the environment (None).
    """

    name: str
    module: nn.Module
    reads: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Signature:
    """A unit without names: modules, and for each the indices of the values it reads.

    Values are numbered: the unit's inputs first, then one per node. `outputs` are the indices
    returned. Hashable; the static argument of every compiled function over units.
    """

    modules: tuple[nn.Module, ...]
    reads: tuple[tuple[int, ...], ...]
    outputs: tuple[int, ...]


class Unit(NamedTuple):
    """Consecutive or grouped nodes treated as one: the unit of reconstruction and of resuming."""

    name: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    signature: Signature


def node_at(params: Mapping, path: str) -> Mapping:
    """The parameters of the layer at "block/.../layer". Raises KeyError for a part that is not there."""
    for part in path.split("/"):
        params = params[part]
    return params


def validate(program: Sequence[Node], inputs: Sequence[str]) -> None:
    """Raise if a node reads a value that nothing wrote before it, or a name is written twice."""
    known = set(inputs)
    for node in program:
        missing = [name for name in node.reads if name not in known]
        if missing:
            raise ValueError(f"Block {node.name!r} reads {missing}, which no earlier block writes.")
        if node.name in known:
            raise ValueError(f"Block name {node.name!r} is used twice in the program.")
        known.add(node.name)


def run_program(parent: nn.Module, program: Sequence[Node], env: dict[str, Any], **kwargs):
    """Run all nodes as children of a compact Linen `parent`; returns the last node's output."""
    env = dict(env)
    for node in program:
        block = node.module.clone(parent=parent, name=node.name)
        env[node.name] = block(*(env[name] for name in node.reads), **kwargs)
    return env[program[-1].name]


def make_unit(
    name: str, program: Sequence[Node], members: Sequence[str], keep: Sequence[str] = ()
) -> Unit:
    """Group nodes of a program into a unit.

    members: node names; they run in the program's order. The outputs are the members' values read by
    any node outside the unit, those in `keep`, and the program's last value.
    Raises ValueError for an unknown member.
    """
    names = [node.name for node in program]
    unknown = [member for member in members if member not in names]
    if unknown:
        raise ValueError(f"Unit {name!r} names blocks {unknown} that the program does not have.")
    chosen = [node for node in program if node.name in set(members)]
    inside = {node.name for node in chosen}
    inputs: list[str] = []
    for node in chosen:
        for read in node.reads:
            if read not in inside and read not in inputs:
                inputs.append(read)
    read_outside = {r for node in program if node.name not in inside for r in node.reads}
    wanted = read_outside | set(keep) | {names[-1]}
    outputs = [node.name for node in chosen if node.name in wanted]
    index = {value: i for i, value in enumerate([*inputs, *(node.name for node in chosen)])}
    signature = Signature(
        modules=tuple(node.module for node in chosen),
        reads=tuple(tuple(index[r] for r in node.reads) for node in chosen),
        outputs=tuple(index[o] for o in outputs),
    )
    return Unit(name, tuple(node.name for node in chosen), tuple(inputs), tuple(outputs), signature)


def check_order(program: Sequence[Node], units: Sequence[Unit], inputs: Sequence[str]) -> None:
    """Raise unless running the units in order runs every node once, after all that it reads."""
    known = set(inputs)
    seen: list[str] = []
    for unit in units:
        missing = [name for name in unit.inputs if name not in known]
        if missing:
            raise ValueError(f"Unit {unit.name!r} needs {missing} before any unit has written it.")
        seen.extend(unit.nodes)
        known.update(unit.nodes)
    expected = sorted(node.name for node in program)
    if sorted(seen) != expected:
        odd = sorted(set(expected).symmetric_difference(seen)) or "one block twice"
        raise ValueError(f"The units must cover every block exactly once; they differ in {odd}.")


def apply_unit(
    signature: Signature,
    params: Sequence[Mapping],
    quant: Sequence[Mapping],
    inputs: Sequence[jax.Array | None],
    mutable: Sequence[str] | bool = False,
):
    """Run a unit: one params and one quant tree per module, in order.

    Returns the tuple of outputs; with `mutable`, also one dict of the written collections per module.
    """
    values = list(inputs)
    written = []
    for module, reads, weights, quantizers in zip(
        signature.modules, signature.reads, params, quant, strict=True
    ):
        variables = {"params": weights, "quant": quantizers}
        result = module.apply(variables, *(values[i] for i in reads), mutable=mutable)
        if mutable:
            result, state = result
            written.append(state)
        values.append(result)
    outputs = tuple(values[i] for i in signature.outputs)
    return (outputs, written) if mutable else outputs


def subtrees(tree: Mapping, unit: Unit) -> tuple[Mapping, ...]:
    """The unit's part of a {node: ...} tree, one entry per node ({} where there is none)."""
    return tuple(tree.get(name, {}) for name in unit.nodes)


def merge_subtrees(tree: Mapping, unit: Unit, parts: Sequence[Mapping]) -> dict:
    """`tree` with the unit's entries replaced; empty parts are left out."""
    merged = dict(tree)
    for name, part in zip(unit.nodes, parts, strict=True):
        if part:
            merged[name] = part
    return merged


def last_reads(units: Sequence[Unit]) -> dict[str, int]:
    """For each value, the index of the last unit that reads it: after it the value may be freed."""
    last: dict[str, int] = {}
    for i, unit in enumerate(units):
        for name in unit.inputs:
            last[name] = i
    return last


def condition_nodes(program: Sequence[Node]) -> tuple[str, ...]:
    """Nodes that depend on the timestep and the condition y alone, not on the image."""
    known = {"t", "y"}
    for node in program:
        if set(node.reads) <= known:
            known.add(node.name)
    return tuple(node.name for node in program if node.name in known)


def temporal_nodes(program: Sequence[Node]) -> tuple[str, ...]:
    """Nodes that depend on the timestep and perhaps the label, but nothing else: their outputs are
    temporal features. What depends on the label alone (an embedding of classes as a context) is none."""
    known = {"t"}
    conditions = set(condition_nodes(program))
    for node in program:
        if node.name in conditions and known & set(node.reads):
            known.add(node.name)
    return tuple(node.name for node in program if node.name in known)


def units_with_projections(program: Sequence[Node]) -> tuple[Unit, ...]:
    """One unit per block, each block together with the temporal projections only it reads.

    BRECQ's grouping: a residual block owns its time-embedding layer.
    """
    temporal = set(temporal_nodes(program))
    readers: dict[str, list[str]] = {name: [] for name in temporal}
    for node in program:
        for read in node.reads:
            if read in readers:
                readers[read].append(node.name)
    owner = {name: by[0] for name, by in readers.items() if len(by) == 1 and by[0] not in temporal}
    units = []
    for node in program:
        if node.name not in owner:
            owned = [name for name, by in owner.items() if by == node.name]
            units.append(make_unit(node.name, program, (*owned, node.name)))
    return tuple(units)


def units_with_time_block(program: Sequence[Node]) -> tuple[Unit, ...]:
    """All temporal nodes as the first unit, "time", then one unit per block.

    TFMQ-DM's grouping: the time embedding and every projection are reconstructed together, apart
    from the image (temporal information block, Huang et al. 2024, section 4.2).
    """
    temporal = temporal_nodes(program)
    time = make_unit("time", program, temporal)
    rest = (node.name for node in program if node.name not in set(temporal))
    return (time, *(make_unit(name, program, (name,)) for name in rest))
