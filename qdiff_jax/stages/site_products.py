"""What the quantized product of a site reads and multiplies, where an operator stands in the plain one's place.

Closed-form rounding solves for the codes of a matrix from what is multiplied with it. At most sites the one is
the kernel and the other the layer's input as its quantizer leaves it. An operator with a quantized product
inside (`branch.low_rank`) multiplies something else, adds something of its own, and may need a bias that
follows from the codes: `PRODUCTS` says what, and the engine knows of no operator. One that is not there has no
single product to solve for, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from qdiff_jax.branch import low_rank, remainder, smoothed, unshifted
from qdiff_jax.models.program import node_at
from qdiff_jax.operators import Operator, plain
from qdiff_jax.sites import Replacement, SiteQuant, flatten_sites, operand
from qdiff_jax.stages.stage import replace_leaves


class Product(NamedTuple):
    """The quantized product inside an operator; `arrays` are those of its `Replacement`.

    reads(arrays, x): what its activation quantizer reads when the layer reads x. kernel(arrays, W): what is
    multiplied in place of the kernel W, of its shape. bias(arrays, b, values): the bias [N] in place of b (or
    None) when `values` are multiplied; b itself where the operator does not touch it. With kernel and bias in
    full precision, and no quantizer, the operator is the plain one on W and b.
    """

    reads: Callable
    kernel: Callable
    bias: Callable


PRODUCTS: dict[Callable, Product] = {
    low_rank: Product(smoothed, jax.jit(remainder), jax.jit(unshifted)),
}


def check_operator(site: SiteQuant, where: str) -> None:
    """Raise ValueError for an operator whose quantized product is not known. where: names the site."""
    if site.substitute is not None and site.substitute.apply not in PRODUCTS:
        raise ValueError(
            f"{where} has a substitute operator, {site.substitute.apply.__name__}, whose weights closed-form "
            "rounding does not know; reconstruct it, or round it to nearest."
        )


def multiplied(params: Mapping, quant: Mapping) -> dict:
    """params with what is multiplied in place of every kernel inside an operator, and the bias that goes with
    it: with the operators of `quant`, and no quantizer, the function of `params` itself."""
    leaves = {}
    for name, site in flatten_sites(quant).items():
        if site.substitute is None or site.substitute.apply not in PRODUCTS:
            continue
        weights, arrays = node_at(params, name), site.substitute.arrays
        product = PRODUCTS[site.substitute.apply]
        kernel = product.kernel(arrays, weights["kernel"])
        bias = product.bias(arrays, weights.get("bias"), kernel)
        leaves[f"{name}/kernel"] = kernel
        if bias is not None:
            leaves[f"{name}/bias"] = bias
    return replace_leaves(params, leaves)


def product_input(site: SiteQuant | None, x: jax.Array) -> jax.Array:
    """What the codes of a site are multiplied with when the layer reads x, of its shape."""
    if site is None:
        return x
    if site.substitute is not None:
        x = PRODUCTS[site.substitute.apply].reads(site.substitute.arrays, x)
    return operand(site.lhs, x)


def site_output(
    site: SiteQuant | None, operator: Operator, x: jax.Array, kernel: jax.Array, bias
) -> jax.Array:
    """What the layer puts out when it reads x, with the weights (`multiplied`) as they are given."""
    if site is None or site.substitute is None:
        return plain(operator, product_input(site, x), kernel, bias)
    bare = site.replace(rhs=None, execute=False)
    held = site.substitute
    return held.apply(held.arrays, operator, x, lambda: kernel, bias, bare)


def bias_of_codes(site: SiteQuant, weights: Mapping, values: jax.Array) -> jax.Array | None:
    """The bias [N] for `values` in place of the kernel of `weights` (as `multiplied`), where the operator makes
    it depend on them; None where it does not."""
    held: Replacement | None = site.substitute
    if held is None:
        return None
    bias = PRODUCTS[held.apply].bias(held.arrays, None, values - weights["kernel"])
    return None if bias is None else weights["bias"] + bias
