"""What a stage is, the one value that stages hand on, and how a stage survives being killed.

A stage is three functions: `init(state, store) -> carry` (which picks up from the store if it holds
something), `run(carry, n) -> carry` (at most n steps; saves to the store as it goes) and
`finish(carry) -> (state, report)`. A method is a tuple of stages.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct

from qdiff_jax.export.qtensor import QTensor, from_codes
from qdiff_jax.models.program import Node, node_at
from qdiff_jax.observe.archive import load_record, save_record
from qdiff_jax.policy import SitePlan
from qdiff_jax.quant.binary import BinaryWeight
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.quant.quantizer import codes
from qdiff_jax.runtime.seconds import Seconds, add_seconds, stopwatch
from qdiff_jax.sites import SiteQuant, flatten_sites, kernel_of, nest_sites

_SECONDS = "seconds.json"  # in a stage's store


@struct.dataclass
class QuantState:
    """The value passed from stage to stage and checkpointed.

    quant: {block: {op: SiteQuant}}. aux: what stages keep for later ones. key: PRNG key. plan: the site
    plan. source: hash of the checkpoint the full-precision parameters came from; they themselves are
    not part of the state.
    """

    quant: dict
    aux: dict
    key: jax.Array
    plan: SitePlan = struct.field(pytree_node=False)
    source: str = struct.field(pytree_node=False, default="")


class Model(NamedTuple):
    """A network as the stages see it: module, block program, full-precision parameters."""

    module: Any
    program: tuple[Node, ...]
    params: Mapping


# What a stage does to the state, in the order in which a method goes through them: other parameters of the
# same function; other grids; ranges; codes; codes once more, on other states; training of the whole network;
# what sampling corrects.
KINDS = ("transform", "plan", "ranges", "codes", "rounds", "training", "correction")


class Stage(NamedTuple):
    """name: of its folder and its report. done(carry): whether `run` has nothing left to do. kind: of KINDS,
    by which methods are taken apart and put together (`methods.recipes`)."""

    name: str
    init: Callable[[QuantState, pathlib.Path | None], Any]
    run: Callable[[Any, int], Any]
    finish: Callable[[Any], tuple[QuantState, dict]]
    done: Callable[[Any], bool]
    kind: str = "codes"


class Method(NamedTuple):
    """A paper: its stages in order, and the deviations from the official code that it chose.

    again(state, i) -> (stage, state): the stage that decides the weights once more, on the calibration set in
    `state.aux["calibration"]`, in round i from 1 on; None for a method that cannot."""

    name: str
    stages: Sequence[Stage]
    notes: str = ""
    again: Callable[[QuantState, int], tuple[Stage, QuantState]] | None = None


def initial_state(plan: SitePlan, key: jax.Array, source: str = "") -> QuantState:
    """A state in which nothing is quantized yet."""
    return QuantState(quant={}, aux={}, key=key, plan=plan, source=source)


def run_stage(
    stage: Stage, state: QuantState, store: pathlib.Path | None = None, chunk: int = 50
) -> tuple[QuantState, dict]:
    """Run a stage to its end from wherever its store says it was.

    Returns (state, report); the report gains the fields of `runtime.seconds.Seconds`. They are kept in the
    store after every chunk and cover all processes that worked on the stage, what a kill lost and was done
    again included, but not the time between two of them; of a chunk in which a kill falls they are lost.
    "resumed": whether an earlier process left something in the store. "uncounted": True if one of those kept
    no seconds. Raises ValueError for a damaged file of seconds.
    """
    place = None if store is None else store / _SECONDS
    resumed = store is not None and store.is_dir() and any(store.iterdir())
    before, uncounted = _kept_seconds(place) if resumed else (Seconds(), {})
    with stopwatch() as read:

        def spent() -> dict:
            total = {**add_seconds(before, read())._asdict(), **uncounted}
            if place is not None:
                save_record(place, total)
            return total

        carry = stage.init(state, store)
        while not stage.done(carry):
            carry = stage.run(carry, chunk)
            spent()
        state, report = stage.finish(carry)
        return state, {**report, **spent(), "resumed": resumed}


def _kept_seconds(place: pathlib.Path) -> tuple[Seconds, dict]:
    """What earlier processes spent, and {"uncounted": True} if not all of them said so."""
    if not place.exists():
        return Seconds(), {"uncounted": True}
    held = load_record(place)
    uncounted = {"uncounted": True} if held.pop("uncounted", False) else {}
    if set(held) != set(Seconds._fields):
        raise ValueError(
            f"{place} holds {sorted(held)} and not the seconds of a stage; delete it and run again: what was "
            "spent before is then not counted."
        )
    return Seconds(**held), uncounted


def decide_codes(quant: Mapping, params: Mapping) -> dict:
    """Every weight that still has only a range gets its nearest codes; returns a new quant tree."""
    flat = flatten_sites(quant)
    names = [n for n, s in flat.items() if isinstance(s.rhs, QParams) and has_kernel(params, n)]
    ranges = [flat[name].rhs for name in names]
    kernels = [kernel_at(params, name) for name in names]
    packed = _nearest_tensors(ranges, kernels, tuple(code_bits(r) for r in ranges))
    for name, qtensor in zip(names, packed):
        flat[name] = flat[name].replace(rhs=qtensor)
    return nest_sites(flat)


def code_bits(qparams: QParams) -> int:
    """The width that the range of codes needs, read off qparams on the host."""
    levels = float(np.max(np.asarray(qparams.qmax) - np.asarray(qparams.qmin))) + 1.0
    return int(np.ceil(np.log2(levels)))


def fold_weights(params: Mapping, quant: Mapping) -> tuple[dict, dict]:
    """Simulate without re-quantizing: kernels become their dequantized values, once, and biases what
    was refitted to them.

    Returns (params with the same names and shapes, quant without weight entries). The simulated forward
    pass then costs what full precision costs plus the activation quantizers.
    """
    flat = flatten_sites(quant)
    held = {
        name: site.rhs
        for name, site in flat.items()
        if isinstance(site.rhs, QTensor)
        or (isinstance(site.rhs, QParams | BinaryWeight) and has_kernel(params, name))
    }
    kernels = [None if isinstance(r, QTensor) else kernel_at(params, n) for n, r in held.items()]
    folded = replace_kernels(params, dict(zip(held, _folded(list(held.values()), kernels))))
    biases = {f"{n}/bias": s.bias for n, s in flat.items() if s.bias is not None}
    folded = replace_leaves(folded, biases)
    kept = {}
    for name, site in flat.items():
        site = site.replace(rhs=None, execute=False) if name in held else site
        site = site.replace(bias=None)
        if any(v is not None for v in (site.lhs, site.rhs, site.tap, site.substitute)):
            kept[name] = site
    return folded, nest_sites(kept)


# Lists, not dicts: a site's name in the treedef would compile equal blocks again.
@functools.partial(jax.jit, static_argnames="bits")
def _nearest_tensors(ranges, kernels, bits):
    return [from_codes(codes(r, k), r, b) for r, k, b in zip(ranges, kernels, bits)]


@jax.jit
def _folded(held, kernels):
    return [kernel_of(h, lambda k=k: k) for h, k in zip(held, kernels)]


def replace_kernels(params: Mapping, kernels: Mapping[str, jax.Array]) -> dict:
    """params with `name/kernel` replaced (or added, where a bundle left it out)."""
    return replace_leaves(params, {f"{name}/kernel": leaf for name, leaf in kernels.items()})


def replace_leaves(params: Mapping, leaves: Mapping[str, jax.Array]) -> dict:
    """params with leaves replaced (or added) at paths "block/.../leaf"."""
    tree = dict(params)
    for path, leaf in leaves.items():
        tree = _with_leaf(tree, tuple(path.split("/")), leaf)
    return tree


def leaves_by_path(params: Mapping) -> dict[str, jax.Array]:
    """{"block/.../leaf": array}, as `replace_leaves` takes them."""
    return {
        "/".join(entry.key for entry in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }


def tuned_params(params: Mapping, aux: Mapping) -> dict:
    """params with what a stage has tuned besides weights (norm affines), kept in `aux["params"]`."""
    return replace_leaves(params, aux.get("params", {}))


def set_site(quant: Mapping, name: str, **fields) -> dict:
    """A quant tree with fields of one site replaced, the site created where it is missing."""
    flat = flatten_sites(quant)
    flat[name] = flat.get(name, SiteQuant()).replace(**fields)
    return nest_sites(flat)


def _with_leaf(tree: Mapping, path: tuple[str, ...], leaf) -> dict:
    head, *rest = path
    child = leaf if not rest else _with_leaf(tree.get(head, {}), tuple(rest), leaf)
    return {**tree, head: child}


def kernel_at(params: Mapping, name: str) -> jax.Array:
    return node_at(params, name)["kernel"]


def has_kernel(params: Mapping, name: str) -> bool:
    try:
        return "kernel" in node_at(params, name)
    except KeyError:
        return False
