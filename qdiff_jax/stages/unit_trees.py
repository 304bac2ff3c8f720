"""A unit's quantizer trees in the forms that reconstruction needs: soft, folded, weights only.

Trees come as one per node of the unit, and trainable leaves are keyed "<node index>:<op>[:side]", so that
no block name reaches a compiled function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from qdiff_jax.models.program import Unit, subtrees
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.quant.rounding import (
    SoftRounding,
    binarised_fraction,
    hard_codes,
    soft_rounding,
)
from qdiff_jax.sites import SiteQuant, flatten_sites, nest_sites

Trees = tuple[dict, ...]


def map_sites(function, tree: Any) -> Any:
    """Apply function(site) to every SiteQuant of a tree; a site mapped to None is dropped."""
    if isinstance(tree, SiteQuant):
        return function(tree)
    if isinstance(tree, tuple):
        return tuple(map_sites(function, part) for part in tree)
    mapped = {key: map_sites(function, value) for key, value in tree.items()}
    return {key: value for key, value in mapped.items() if value is not None}


def soft_trees(params: Mapping, quant: Mapping, unit: Unit) -> Trees:
    """Every weight of the unit that has a range but no codes yet becomes a `SoftRounding`.

    floor(w / scale) is computed here, once, outside the step.
    """
    flat = [flatten_sites(tree) for tree in subtrees(quant, unit)]
    held = [
        (i, name, kernel)
        for i, weights in enumerate(subtrees(params, unit))
        for name, site in flat[i].items()
        if isinstance(site.rhs, QParams) and (kernel := _find(weights, name)) is not None
    ]
    soft = _soften([flat[i][name].rhs for i, name, _ in held], [kernel for *_, kernel in held])
    for (i, name, _), rounding in zip(held, soft):
        flat[i][name] = flat[i][name].replace(rhs=rounding)
    return tuple(nest_sites(tree) for tree in flat)


# Lists, so that one compile serves every unit with weights of these shapes.
@jax.jit
def _soften(ranges, kernels):
    return [soft_rounding(kernel, qparams) for qparams, kernel in zip(ranges, kernels)]


@jax.jit
def harden(roundings):
    """(codes, binarised fraction) of each soft rounding of a list."""
    return [(hard_codes(r), binarised_fraction(r.alpha)) for r in roundings]


def folded_trees(quant: Mapping, unit: Unit) -> Trees:
    """The unit's activation quantizers alone; its weights are expected in folded parameters."""

    def activations(site: SiteQuant):
        rhs = site.rhs if isinstance(site.rhs, QParams) and site.product else None
        return None if site.lhs is None and rhs is None else site.replace(rhs=rhs, execute=False)

    return map_sites(activations, subtrees(quant, unit))


def only_weights(trees: Any) -> Any:
    """Drop everything but weight entries, so that activations stay in full precision."""

    def weights(site: SiteQuant):
        if site.rhs is None or site.product:
            return None
        return SiteQuant(rhs=site.rhs, bias=site.bias)

    return map_sites(weights, trees)


def only_activations(trees: Any) -> Any:
    """The quantizers of activations, step tables and dynamic ones included, and operators that hold them."""

    def activations(site: SiteQuant):
        rhs = site.rhs if site.product else None
        if site.lhs is None and rhs is None and site.substitute is None:
            return None
        return SiteQuant(site.lhs, rhs, substitute=site.substitute, product=site.product)

    return map_sites(activations, trees)


def only_operators(trees: Any) -> Any:
    """The operators in place of plain ones, without a quantizer."""

    def operators(site: SiteQuant):
        held = site.substitute
        return None if held is None else SiteQuant(substitute=held)

    return map_sites(operators, trees)


def replace_weights(params: Sequence[Mapping], weights: Mapping[str, tuple]) -> list[dict]:
    """A unit's parameters, one tree per node, with some kernels and biases replaced.

    weights: {"<node>:<op>": (kernel, bias)}; None leaves what is there.
    """
    trees = list(params)
    for key, (kernel, bias) in weights.items():
        node, op_name = key.split(":")
        fresh = {"kernel": kernel, "bias": bias}
        fresh = {field: value for field, value in fresh.items() if value is not None}
        trees[int(node)] = _updated(trees[int(node)], op_name.split("/"), fresh)
    return trees


def trainable_alphas(trees: Trees) -> dict[str, jax.Array]:
    """{"<node>:<op>": alpha} of every soft rounding."""
    return {
        f"{i}:{name}": site.rhs.alpha
        for i, tree in enumerate(trees)
        for name, site in flatten_sites(tree).items()
        if isinstance(site.rhs, SoftRounding)
    }


def trainable_scales(trees: Trees) -> dict[str, jax.Array]:
    """{"<node>:<op>:lhs|rhs": scale} of every static activation quantizer.

    Step tables and dynamic quantizers are not among them: they keep their calibrated ranges.
    """
    return {
        f"{i}:{name}:{side}": getattr(site, side).scale
        for i, tree in enumerate(trees)
        for name, site in flatten_sites(tree).items()
        for side in ("lhs", "rhs")
        if _is_static(getattr(site, side)) and (side == "lhs" or site.product)
    }


def without_kernels(params: Mapping, tree: Mapping) -> dict:
    """Parameters without the kernels that soft roundings stand for: they would only be carried."""
    soft = {n for n, s in flatten_sites(tree).items() if isinstance(s.rhs, SoftRounding)}

    def strip(node: Mapping, path: str) -> dict:
        out = {}
        for key, value in node.items():
            here = f"{path}/{key}" if path else key
            if isinstance(value, Mapping):
                out[key] = strip(value, here)
            elif not (key == "kernel" and path in soft):
                out[key] = value
        return out

    return strip(params, "")


def _is_static(quantizer) -> bool:
    return isinstance(quantizer, QParams) and not quantizer.spec.dynamic


def _updated(tree: Mapping, path: Sequence[str], fields: Mapping) -> dict:
    if not path:
        return {**tree, **fields}
    return {**tree, path[0]: _updated(tree[path[0]], path[1:], fields)}


def _find(params: Mapping, name: str):
    node = params
    for part in name.split("/"):
        node = node.get(part, {})
    return node.get("kernel")
