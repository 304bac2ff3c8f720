"""How the layers of one unit act on its outputs, found by moving them and looking, never from names.

Closed-form rounding aims at the output of a block, but solves one layer at a time. For that it must know

- which layers *close* a branch: moving the layer's output by d moves an output of the unit by g * d,
  element by element (g = 1 behind a residual sum, the gate in a transformer block). Only for those does
  the error of the block translate into an exact target for the layer;
- which layers close an earlier branch: other layers read what they write, but with these silenced (their
  outputs zero) they close an output of what is left of the unit. For the projection of the attention in a
  transformer block that output is x + g * proj(h), the residual stream between attention and MLP;
- which layers (and inputs of the unit) are *summands* of one another: moving one by d does to the unit
  what moving the other by d does, as a time projection added to a convolution;
- which layers read what another writes, and so have to wait until it is rounded.

Each is decided by running the unit in full precision on two samples with offsets added to the outputs
of its layers, so that any module works whose operators go through `sites.op`.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.models.program import Signature, apply_unit
from qdiff_jax.observe.taps import Tap
from qdiff_jax.operators import Operator, plain
from qdiff_jax.sites import Replacement, SiteQuant, flatten_sites, kernel_of, nest_sites, operand

_TOLERANCE = (
    2e-3  # of the response: above rounding in float32, far below any curvature that matters
)


class Layer(NamedTuple):
    """A weight of a unit. node: index of its module; op: its path inside. Hashable, names no block.

    kernel, output: shapes, the latter without the batch axis. closes: index of the unit's output that
    it closes, or None. silenced: (node, op) of the layers that have to be silent for that, those that
    read what it writes. unit_gain: its g is 1. summands: earlier layers (indices into the plan) that it
    is summed with. input_summands: inputs of the unit that it is summed with.
    """

    node: int
    op: str
    operator: Operator
    kernel: tuple[int, ...]
    output: tuple[int, ...]
    closes: int | None = None
    silenced: tuple[tuple[int, str], ...] = ()
    unit_gain: bool = False
    summands: tuple[int, ...] = ()
    input_summands: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.node}:{self.op}"

    @property
    def rows(self) -> int:
        """Rows of the layer's input matrix in one sample."""
        return int(np.prod(self.output[:-1], dtype=int))


class UnitPlan(NamedTuple):
    """layers: in the order in which they are rounded. levels: the same as consecutive runs of indices;
    layers of one level read nothing that another of them writes, and share one pass over the data."""

    layers: tuple[Layer, ...]
    levels: tuple[tuple[int, ...], ...]


def unit_layers(signature: Signature, params, inputs) -> tuple[Layer, ...]:
    """The weights of a unit in order of execution, from shapes alone."""
    found: list[Layer] = []

    def record(params, inputs):
        empty = tuple({} for _ in signature.modules)
        _, written = apply_unit(signature, params, empty, inputs, mutable=["sites"])
        for node, state in enumerate(written):
            for name, site in flatten_sites(state.get("sites", {})).items():
                if site.operator.kind in ("conv", "dense"):
                    out = jax.eval_shape(
                        functools.partial(plain, site.operator, bias=None), site.lhs, site.rhs
                    )
                    shape = tuple(out.shape[1:])
                    found.append(Layer(node, name, site.operator, tuple(site.rhs.shape), shape))
        return ()

    jax.eval_shape(record, params, inputs)
    return tuple(found)


def with_offset(arrays, operator, lhs, kernel, bias, site):
    """A `Replacement`: the site as it is, or nothing where arrays[0] is False, plus arrays[1]."""
    heard, offset = arrays
    weight = kernel_of(site.rhs, kernel).astype(lhs.dtype)
    y = plain(operator, operand(site.lhs, lhs), weight, bias)
    return jnp.where(heard, y, jnp.zeros_like(y)) + offset.astype(lhs.dtype)


def offset_trees(
    layers: Sequence[Layer], offsets: Sequence[Any], nodes: int, heard: Sequence[Any] | None = None
) -> list[dict]:
    """One quant tree per module that taps every layer's input and adds its offset to its output.

    heard: a bool for each layer; the output of one that is not is the offset alone.
    """
    flat: list[dict] = [{} for _ in range(nodes)]
    heard = [True] * len(layers) if heard is None else heard
    for layer, offset, own in zip(layers, offsets, heard, strict=True):
        substitute = Replacement((own, offset), with_offset)
        flat[layer.node][layer.op] = SiteQuant(tap=Tap("value"), substitute=substitute)
    return [nest_sites(tree) for tree in flat]


# Run on two samples, a few times: compiling it is all it costs.
@functools.partial(
    jax.jit,
    static_argnames=("signature", "layers"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def _respond(signature, layers, params, inputs, offsets, heard, input_offsets):
    """(outputs of the unit, inputs of its layers) with offsets added to layers and to float inputs, and
    layers that are not heard silent."""
    inputs = tuple(v if o is None else v + o for v, o in zip(inputs, input_offsets, strict=True))
    quant = offset_trees(layers, offsets, len(signature.modules), heard)
    outputs, written = apply_unit(signature, params, quant, inputs, mutable=["observed"])
    return outputs, tapped_inputs(layers, written)


def tapped_inputs(layers: Sequence[Layer], written: Sequence[Mapping]) -> list[jax.Array]:
    """The operand that the value tap of each layer reported."""
    flat = [flatten_sites(state.get("observed", {})) for state in written]
    return [flat[layer.node][f"{layer.op}/input/value"] for layer in layers]


def plan_unit(signature: Signature, params, inputs, chosen: Sequence[str]) -> UnitPlan:
    """The layers of a unit that are to be rounded, in order, with what each is summed with and closes.

    params: one tree per module, full precision. inputs: the unit's inputs, two samples or more. chosen:
    keys of the layers that have no codes yet.
    """
    layers = unit_layers(signature, params, inputs)
    if not set(chosen) & {layer.key for layer in layers}:
        return UnitPlan((), ())
    batch = len(jax.tree.leaves(inputs)[0])
    rng = np.random.default_rng(0)
    zeros = [np.zeros((batch, *layer.output), np.float32) for layer in layers]
    # A condition that is a pytree (a caption and its mask) is summed with no layer's output.
    floats = [i for i, v in enumerate(inputs) if getattr(v, "dtype", None) == np.float32]
    none = [np.zeros_like(v) if i in floats else None for i, v in enumerate(inputs)]

    def respond(
        moved: Mapping[int, np.ndarray],
        moved_inputs: Mapping[int, np.ndarray] = {},
        silent: Collection[int] = (),
    ):
        offsets = [moved.get(i, z) for i, z in enumerate(zeros)]
        heard = [np.bool_(i not in silent) for i in range(len(layers))]
        more = tuple(moved_inputs.get(i, z) for i, z in enumerate(none))
        return jax.device_get(_respond(signature, layers, params, inputs, offsets, heard, more))

    still, seen = respond({})
    noise = [rng.standard_normal(z.shape).astype(np.float32) for z in zeros]
    reads: list[set[int]] = [set() for _ in layers]  # layers whose inputs move with this one
    moved = []
    for i, z in enumerate(noise):
        outputs, taps = respond({i: z})
        reads[i] = {j for j, (a, b) in enumerate(zip(taps, seen)) if not np.array_equal(a, b)}
        moved.append([a - b for a, b in zip(outputs, still)])

    def closing(i: int) -> Layer:
        """The layer with the output that it closes, those that read it being silent."""
        base, by_noise, by_ones = (
            respond(offset, silent=reads[i])[0]
            for offset in ({}, {i: noise[i]}, {i: np.ones_like(zeros[i])})
        )
        followed = [a - b for a, b in zip(by_noise, base)]
        touched = [j for j, v in enumerate(followed) if np.abs(v).max() > 0]
        if len(touched) != 1 or followed[touched[0]].size != zeros[i].size:
            return layers[i]
        (j,) = touched
        gain = (by_ones[j] - base[j]).reshape(zeros[i].shape)
        wanted = gain * noise[i]
        off, size = np.abs(followed[j].reshape(wanted.shape) - wanted).max(), np.abs(wanted).max()
        if not (size > 1e-6 and off < _TOLERANCE * size):
            return layers[i]
        exact = bool(np.abs(gain - 1.0).max() < _TOLERANCE)
        silenced = tuple((layers[k].node, layers[k].op) for k in sorted(reads[i]))
        return layers[i]._replace(closes=j, silenced=silenced, unit_gain=exact)

    described = [closing(i) for i in range(len(layers))]

    def same(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
        size = max(np.abs(v).max() for v in a)
        off = max(np.abs(v - w).max() for v, w in zip(a, b))
        return size > 1e-6 and off < _TOLERANCE * size

    sums: list[set[int]] = [set() for _ in layers]
    input_sums: list[list[int]] = [[] for _ in layers]
    for i, big in enumerate(described):
        if big.closes is not None:
            continue
        for j, small in enumerate(described):
            wide = _spread(noise[j], big.output)
            if i == j or small.closes is not None or wide is None or j in reads[i] or i in reads[j]:
                continue
            if small.output == big.output and j > i:
                continue
            outputs, _ = respond({i: wide})
            if same(moved[j], [a - b for a, b in zip(outputs, still)]):
                sums[i].add(j)
                sums[j].add(i)
        for k in floats:
            d = rng.standard_normal(np.shape(inputs[k])).astype(np.float32)
            wide = _spread(d, big.output)
            if wide is None:
                continue
            as_input, as_output = respond({}, {k: d})[0], respond({i: wide})[0]
            pair = ([a - b for a, b in zip(v, still)] for v in (as_input, as_output))
            if same(*pair):
                input_sums[i].append(k)
    affects = [{j for j, v in enumerate(m) if np.abs(v).max() > 0} for m in moved]
    return _ordered(described, reads, sums, input_sums, affects, chosen)


def _spread(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """x [B, ..., N] over the positions of `shape` (without batch), or None where it does not fit."""
    if x.shape[1:] == shape:
        return x
    if x.ndim != 2 or x.shape[-1] != shape[-1]:
        return None
    middle = (1,) * (len(shape) - 1)
    return np.broadcast_to(x.reshape(len(x), *middle, -1), (len(x), *shape)).copy()


def _ordered(layers, reads, sums, input_sums, affects, chosen) -> UnitPlan:
    """Layers in order of execution, but a broadcast summand after what it is added to, and those that
    close an output of the whole unit last, the one with the most inputs (hence the most to correct with)
    last of all. Of those that close the same output only the last one keeps it as its target."""
    order = [i for i, layer in enumerate(layers) if layer.key in set(chosen)]
    for i in list(order):
        wider = [order.index(j) for j in sums[i] & set(order) if layers[j].rows > layers[i].rows]
        read_by = [order.index(r) for r in reads[i] & set(order)]
        if wider and order.index(i) < max(wider) < min(read_by, default=len(order)):
            order.remove(i)
            order.insert(max(wider), i)
    closing = [i for i in order if layers[i].closes is not None and not layers[i].silenced]
    closing.sort(key=lambda i: int(np.prod(layers[i].kernel[:-1])))
    order = [i for i in order if i not in closing] + closing
    last_of = {(layers[i].closes, layers[i].silenced): i for i in order}
    place = {i: p for p, i in enumerate(order)}
    planned: list[Layer] = []
    levels: list[list[int]] = []
    for p, i in enumerate(order):
        own = layers[i]
        if own.closes is None or last_of[own.closes, own.silenced] != i:
            own = own._replace(closes=None, silenced=(), unit_gain=False)
        planned.append(
            own._replace(
                summands=tuple(sorted(place[j] for j in sums[i] & set(order) if place[j] < p)),
                input_summands=tuple(input_sums[i]),
            )
        )
        together = bool(levels) and not any(
            i in reads[j] or j in sums[i] or (own.closes is not None and own.closes in affects[j])
            for j in (order[q] for q in levels[-1])
        )
        if together:
            levels[-1].append(p)
        else:
            levels.append([p])
    return UnitPlan(tuple(planned), tuple(tuple(level) for level in levels))
