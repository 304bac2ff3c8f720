"""Where a block stands in its network: at which share of the input's side, and how deep.

Read off the block program and the shapes of what its blocks write, so that no name is spelt out. A block of
the time path counts with the one block that reads it (a residual block owns its projection).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax

from qdiff_jax.models.program import Node, Unit, apply_unit, make_unit, subtrees, temporal_nodes


def image_blocks(program: Sequence[Node]) -> tuple[str, ...]:
    """The blocks that the image passes through, in order; all but those of the time path."""
    temporal = set(temporal_nodes(program))
    return tuple(node.name for node in program if node.name not in temporal)


def tapped_program(program: Sequence[Node], taps: Sequence[str]) -> Unit:
    """The whole network as one unit whose outputs are the values of `taps`, in the program's order, and
    last the prediction. Raises ValueError for a tap that no block writes."""
    names = [node.name for node in program]
    unknown = sorted(set(taps) - set(names))
    if unknown:
        raise ValueError(f"taps {unknown} are no blocks of the program; there are {names}.")
    return make_unit("network", program, names, keep=taps)


def value_shapes(program: Sequence[Node], params: Mapping, inputs: Mapping) -> dict[str, tuple]:
    """{value: shape} of what every block writes, and of the inputs {"x", "t", "y"}; nothing is computed."""
    unit = tapped_program(program, [node.name for node in program])
    given = tuple(inputs[name] for name in unit.inputs)
    empty = tuple({} for _ in unit.nodes)
    outputs = jax.eval_shape(
        lambda weights, *values: apply_unit(unit.signature, weights, empty, values),
        subtrees(params, unit),
        *given,
    )
    shapes = {name: value.shape for name, value in zip(unit.outputs, outputs, strict=True)}
    return shapes | {name: v.shape for name, v in inputs.items() if v is not None}


def side_shares(program: Sequence[Node], shapes: Mapping[str, tuple]) -> dict[str, float]:
    """{image block: side of what it writes, as a share of the input's} (of tokens, sqrt of their share)."""
    whole = math.prod(shapes["x"][1:-1])
    return {
        name: math.sqrt(math.prod(shapes[name][1:-1]) / whole) for name in image_blocks(program)
    }


def with_temporal(program: Sequence[Node], blocks: Sequence[str]) -> tuple[str, ...]:
    """blocks, and the temporal ones that only they read, in the program's order."""
    temporal = set(temporal_nodes(program))
    readers: dict[str, set[str]] = {name: set() for name in temporal}
    for node in program:
        for read in set(node.reads) & temporal:
            readers[read].add(node.name)
    owned = {name for name, by in readers.items() if len(by) == 1 and by <= set(blocks)}
    return tuple(node.name for node in program if node.name in owned | set(blocks))


def head_and_tail(
    program: Sequence[Node], shapes: Mapping[str, tuple], share: float
) -> tuple[str, ...]:
    """Blocks that work at no less than `share` of the input's side: the first and the last of a U-Net.

    Those of the time path that several blocks read are not among them.
    """
    sides = side_shares(program, shapes)
    return with_temporal(program, [name for name, side in sides.items() if side >= share])


def depth_groups(
    program: Sequence[Node], shapes: Mapping[str, tuple]
) -> tuple[tuple[str, ...], ...]:
    """All blocks by depth, deepest first: the middle (between the last skip written and the first read),
    then by ascending side. What several blocks share of the time path joins the last group."""
    names = image_blocks(program)
    sides = side_shares(program, shapes)
    skips, readers = [], []
    for node in program:
        maps = [read for read in node.reads if read in sides]
        if len(maps) > 1:
            skips += [names.index(read) for read in maps[1:]]
            readers.append(names.index(node.name))
    middle = names[max(skips) + 1 : min(readers)] if skips else ()
    groups = [with_temporal(program, middle)] if middle else []
    for side in sorted(set(sides[name] for name in names if name not in middle)):
        group = [name for name in names if name not in middle and sides[name] == side]
        groups.append(with_temporal(program, group))
    placed = {name for group in groups for name in group}
    rest = [node.name for node in program if node.name not in placed]
    order = {node.name: i for i, node in enumerate(program)}
    groups[-1] = tuple(sorted((*groups[-1], *rest), key=order.get))
    return tuple(groups)
