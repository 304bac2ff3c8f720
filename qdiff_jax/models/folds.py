"""Which layers of a network read an input that can be divided by a factor of each channel, and who takes the
division: declared once for an architecture, used by every method that smooths (specifics of `models.dit`)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from qdiff_jax.models.dit import DiTBlock, FinalLayer
from qdiff_jax.models.program import Node, node_at
from qdiff_jax.quant.folding import divide_chunk, fold_modulation
from qdiff_jax.quant.reparameterise import scale_rows


class Fold(NamedTuple):
    """site: the layer whose input is divided by s. into: the layer whose output columns take 1 / s; None
    where something nonlinear comes between, so that the input is divided at the site (its `divisor`).
    shift: chunk of those columns; scale: a second one that the network reads as 1 + gamma, or None."""

    site: str
    into: str | None
    shift: int = 0
    scale: int | None = None


def folds_of(program: Sequence[Node]) -> tuple[Fold, ...]:
    """The folds of a program in order of execution; none for a network without DiT blocks
    (PixArt's and spatial transformers are others).

    DiT: qkv and fc1 into their chunks of the block's modulation, proj into the V columns of qkv (an output
    channel of attention is a mean over tokens of that channel of V), the last layer into its own modulation;
    fc2 comes after GELU and keeps its division.
    """
    found: list[Fold] = []
    for node in program:
        name = node.name
        if isinstance(node.module, DiTBlock):
            modulation = f"{node.reads[1]}/dense"
            found += [
                Fold(f"{name}/attn_qkv", modulation, 0, 1),
                Fold(f"{name}/attn_proj", f"{name}/attn_qkv", 2),
                Fold(f"{name}/mlp_fc1", modulation, 3, 4),
                Fold(f"{name}/mlp_fc2", None),
            ]
        elif isinstance(node.module, FinalLayer):
            found.append(Fold(f"{name}/linear", f"{node.reads[1]}/dense", 0, 1))
    return tuple(found)


def fold_leaves(params: Mapping, fold: Fold, factors: jax.Array) -> dict[str, jax.Array]:
    """{path: leaf} of the parameters that change, so that the layer reads x / s and its rows are s W."""
    leaves = {f"{fold.site}/kernel": _scale_rows(node_at(params, fold.site)["kernel"], factors)}
    if fold.into is None:
        before = node_at(params, fold.site).get("divisor")
        leaves[f"{fold.site}/divisor"] = factors if before is None else before * factors
        return leaves
    source = node_at(params, fold.into)
    kernel, bias = _fold(source["kernel"], source["bias"], factors, fold.shift, fold.scale)
    return {**leaves, f"{fold.into}/kernel": kernel, f"{fold.into}/bias": bias}


_scale_rows = jax.jit(scale_rows)


@functools.partial(jax.jit, static_argnames=("shift", "scale"))
def _fold(kernel, bias, factors, shift, scale):
    if scale is not None:
        return fold_modulation(kernel, bias, factors, shift, scale)
    return divide_chunk(kernel, factors, shift), divide_chunk(bias, factors, shift)
