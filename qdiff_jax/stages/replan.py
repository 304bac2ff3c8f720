"""Changing the site plan as part of a method: another grid, another granularity for some operands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from qdiff_jax.policy import SitePlan
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.stages.stage import QuantState, Stage


class Carry(NamedTuple):
    state: QuantState
    report: dict | None


def replan(name: str, change: Callable[[SitePlan], tuple[SitePlan, dict]]) -> Stage:
    """The stage `name` that replaces the plan of the state by what `change(plan)` returns beside a report.

    It must come before anything is calibrated; `run` raises ValueError if a quantizer exists already,
    for it would keep the grid of the old plan.
    """

    def run(carry: Carry, n: int) -> Carry:
        del n
        if carry.state.quant:
            raise ValueError(
                f"Stage {name!r} changes the site plan after quantizers were made from it; put it first."
            )
        plan, report = change(carry.state.plan)
        return Carry(carry.state.replace(plan=plan), report)

    return Stage(
        name,
        lambda state, store: Carry(state, None),
        run,
        lambda carry: (carry.state, carry.report),
        lambda carry: carry.report is not None,
        "plan",
    )


def symmetric_weights(plan: SitePlan) -> SitePlan:
    """The plan with every quantized weight on a signed grid whose zero point is 0."""

    def changed(entry):
        if entry.operand != "weight" or entry.bits is None:
            return entry
        spec = dataclasses.replace(entry.spec, symmetric=True, signed=True)
        return dataclasses.replace(entry, spec=spec)

    return SitePlan(tuple(changed(entry) for entry in plan.entries))


def per_tensor_weights(plan: SitePlan) -> SitePlan:
    """The plan with every quantized weight on one signed grid for the whole tensor, zero point 0."""

    def changed(entry):
        if entry.operand != "weight" or entry.bits is None:
            return entry
        return dataclasses.replace(entry, spec=QuantSpec(symmetric=True, signed=True))

    return SitePlan(tuple(changed(entry) for entry in plan.entries))
