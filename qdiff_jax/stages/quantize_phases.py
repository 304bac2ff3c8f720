"""Who is quantized from which step on: phases of a training run, as data.

A phase names blocks; the step at which each operand begins to be quantized follows. Inside the compiled step
that is a comparison of two numbers, so that a phase compiles nothing.
Source: progressive binarization, BinaryDM (Zheng et al. 2024, first versions, section 3.3, and the code).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qdiff_jax.policy import SitePlan
from qdiff_jax.quant.qparams import QParams

PRODUCTS = ("q", "k", "softmax", "v")
_FINE = 2.0**22  # codes to either side while not yet quantized: float32 holds them exactly


class Phase(NamedTuple):
    """From step `start` on, inputs and weights of `blocks` are quantized; with `products`, the operands of
    all attention products."""

    start: int
    blocks: tuple[str, ...]
    products: bool = False


def progressive(groups: Sequence[Sequence[str]], interval: int) -> tuple[Phase, ...]:
    """One group after the other, `interval` steps apart, and the attention products last.

    interval: the code's is 1, so that all of it takes six steps; 0 quantizes everything from the start.
    """
    phases = [Phase(i * interval, tuple(group)) for i, group in enumerate(groups)]
    return (*phases, Phase(len(groups) * interval, (), products=True))


def starts(phases: Sequence[Phase], plan: SitePlan) -> dict[str, int]:
    """{"site:operand": the step at which it begins to be quantized} of all that the plan quantizes.

    Raises ValueError for a planned block that is in no phase, or in two.
    """
    blocks: dict[str, int] = {}
    for phase in phases:
        for block in phase.blocks:
            if block in blocks:
                raise ValueError(f"Block {block!r} is in two phases; a block begins once.")
            blocks[block] = phase.start
    products = [phase.start for phase in phases if phase.products]
    begins = {}
    for entry in plan.quantized():
        block = entry.site.split("/")[0]
        where = f"{entry.site}:{entry.operand}"
        if entry.operand in PRODUCTS and products:
            begins[where] = min(products)
        elif entry.operand not in PRODUCTS and block in blocks:
            begins[where] = blocks[block]
        else:
            raise ValueError(
                f"{where} is planned and no phase quantizes it; name its block in one of the phases "
                "(products=True for the operands of attention)."
            )
    return begins


def quantized_from(qparams: QParams, begun: jax.Array) -> QParams:
    """qparams where `begun` () is true; before it the same grid so fine that it is full precision.

    The fine grid has 2^23 codes over four times the range on either side: off by less than 1e-6 of the
    range. Raises ValueError for a grid that is not affine, or is measured at run time.
    """
    if qparams.spec.grid != "affine" or qparams.spec.dynamic:
        raise ValueError(
            f"a quantizer of the spec {qparams.spec} cannot be widened to full precision; plan a static "
            "affine grid, or quantize everything from the first step (interval 0)."
        )
    reach = 4.0 * qparams.scale * (qparams.qmax - qparams.qmin + 1.0)
    fine = (reach / _FINE, jnp.zeros_like(qparams.zero_point), -_FINE, _FINE)
    held = (qparams.scale, qparams.zero_point, qparams.qmin, qparams.qmax)
    # How far the fine grid reaches follows from the scale: without the stop, noise would train it.
    fine = jax.lax.stop_gradient(fine)
    scale, zero, qmin, qmax = (jnp.where(begun, a, b) for a, b in zip(held, fine))
    return qparams.replace(scale=scale, zero_point=zero, qmin=qmin, qmax=qmax)
