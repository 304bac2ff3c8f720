"""Symmetric grids for groups of input channels on both sides of every layer, as a change of the plan.

Weights get one scale for each group and output channel, activations one for each token (of a convolution: each
pixel) and group, measured at run time; codes are +-(2^(b-1) - 1). The accumulation of an integer product is cut
at the borders of groups, so that the scales can be honoured. Source: SVDQuant's INT4 form (arXiv:2411.05007),
groups of 64.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence

import numpy as np
from absl import logging

from qdiff_jax.policy import Entry, SitePlan
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.sites import Site
from qdiff_jax.stages.replan import replan
from qdiff_jax.stages.stage import Stage

MISFITS = ("error", "adapt")
PLAIN = "one scale for each output channel and for each token"


def weight_spec(group: int) -> QuantSpec:
    """Symmetric, per output channel and group of input channels; group 0: per output channel alone. Scales are
    rounded to float16 before any code is taken, and stored so: 4.25 bits for each weight in groups of 64."""
    given = dict(symmetric=True, signed=True, narrow=True, scale_format="f16")
    if not group:
        return QuantSpec(granularity="channel", **given)
    return QuantSpec(granularity="group", axis=-2, group=group, **given)


def activation_spec(group: int, unsigned: bool = False) -> QuantSpec:
    """Symmetric, per token and group of channels, measured at run time; group 0: per token alone."""
    given = dict(symmetric=True, signed=not unsigned, narrow=not unsigned, dynamic=True)
    if not group:
        return QuantSpec(granularity="token", **given)
    return QuantSpec(granularity="group", group=group, **given)


def group_of(site: Site, group: int, misfit: str = "error") -> int:
    """The group size of a layer whose input channels are to be cut into groups of `group` (0: not cut).

    misfit: where `group` does not divide the channels, "error" raises ValueError naming the site; "adapt"
    takes the largest divisor of the channels that is not above `group`.
    """
    channels = site.rhs_shape[-2]
    if not group or channels % group == 0:
        return group
    if misfit == "adapt":
        return max(d for d in range(1, min(group, channels) + 1) if channels % d == 0)
    raise ValueError(
        f"{site.name} has {channels} input channels, which groups of {group} do not divide; choose a group "
        "that divides every layer's, keep the site in full precision, or set misfit='adapt' to give it the "
        f"largest divisor (group=0 for {PLAIN})."
    )


def group_plan(
    plan: SitePlan,
    sites: Sequence[Site],
    group: int,
    *,
    misfit: str = "error",
    unsigned: Sequence[str] = (),
) -> tuple[SitePlan, dict]:
    """The plan with its layers' quantized operands on these grids; the report says which sites were adapted.

    The report: {"group", "adapted": {site: group}, "unsigned": sites}. Products of two activations keep their
    plan. unsigned: patterns of sites whose input will be shifted to be
    non-negative. Raises ValueError as `group_of` does, for a shifted input that is padded with zeros, and for
    an unknown misfit.
    """
    if misfit not in MISFITS:
        raise ValueError(f"misfit {misfit!r} is unknown; use one of {MISFITS}.")
    by_name = {site.name: site for site in sites}
    adapted: dict[str, int] = {}
    shifted: list[str] = []

    def changed(entry: Entry) -> Entry:
        if entry.bits is None or entry.operand not in ("weight", "input"):
            return entry
        site = by_name[entry.site]
        own = group_of(site, group, misfit)
        if own != group:
            adapted[site.name] = own
        if entry.operand == "weight":
            return dataclasses.replace(entry, spec=weight_spec(own))
        positive = any(fnmatch.fnmatchcase(site.name, pattern) for pattern in unsigned)
        if positive:
            if np.any(site.operator.padding):
                raise ValueError(
                    f"{site.name} pads its input with zeros, which a shifted input does not have; leave it "
                    "out of the shifted sites."
                )
            shifted.append(site.name)
        return dataclasses.replace(entry, spec=activation_spec(own, positive))

    made = SitePlan(tuple(changed(entry) for entry in plan.entries))
    return made, {"group": group, "adapted": adapted, "unsigned": shifted}


def group_grids(
    sites: Sequence[Site],
    group: int = 64,
    *,
    misfit: str = "error",
    unsigned: Sequence[str] = (),
) -> Stage:
    """The stage that puts the plan on grids of groups, see `group_plan`; the log names what was adapted."""

    def change(plan: SitePlan) -> tuple[SitePlan, dict]:
        made, report = group_plan(plan, sites, group, misfit=misfit, unsigned=unsigned)
        if report["adapted"]:
            logging.warning(
                "groups of %d do not divide the channels of %d sites, which get smaller ones: %s",
                group,
                len(report["adapted"]),
                ", ".join(f"{site} {own}" for site, own in report["adapted"].items()),
            )
        return made, report

    return replan("group_grids", change)
