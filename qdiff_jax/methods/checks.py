"""What a variant cannot do, found from its settings and its site plan: no data is read and no stage is run.

Stages refuse the same things while they run; here they are found before the first trajectory is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence

from qdiff_jax.methods.ptq4dit import check_reconstruction
from qdiff_jax.methods.recipes import JOIN
from qdiff_jax.methods.registry import check_network, methods_of
from qdiff_jax.methods.settings import MethodSettings
from qdiff_jax.methods.svdquant import check_plan
from qdiff_jax.policy import SitePlan
from qdiff_jax.sites import Site
from qdiff_jax.stages.stage import Model
from qdiff_jax.stages.step_bits import target_entries


def check_variant(
    method: str, model: Model, sites: Sequence[Site], plan: SitePlan, settings: MethodSettings
) -> None:
    """Raise ValueError for a method or recipe that this network, this plan or these settings do not allow.

    method: as in `registry.build`. sites: of the model, which the plan speaks of.
    """
    parts = methods_of(method, settings.ptqd.base)
    for part in parts:
        check_network(part, model)
    if JOIN in method:
        _check_parts(method, parts, settings)
    if "svdquant" in parts:
        check_plan(model, sites, plan, settings.svdquant)
    if {"ptq4dit", "csb"} & set(parts):  # CSB is taken from the whole method
        check_reconstruction(settings.ptq4dit, settings.rounding)
    if "ptqd" in parts and settings.ptqd.step_bits:
        target_entries(plan)


def _check_parts(recipe: str, parts: Sequence[str], settings: MethodSettings) -> None:
    """As `recipes.compose` finds when the stages exist: parts that are left nothing, and tuning that has no
    place between them."""
    left_nothing = {
        "csb": ("ptq4dit.csb is off", not settings.ptq4dit.csb),
        "tcr": ("tcaq.tcr is off", not settings.tcaq.tcr),
        "par": (f"tcaq.rounds is {settings.tcaq.rounds}", settings.tcaq.rounds < 1),
    }
    for part in parts:
        why, holds = left_nothing.get(part, ("", False))
        if holds:
            raise ValueError(
                f"Recipe {recipe!r}: {why}, which leaves nothing of its part {part!r}; switch it on or leave "
                "the part out."
            )
    if "closed_form" in parts and settings.tune_steps:
        raise ValueError(
            f"Recipe {recipe!r}: closed_form.tune_steps is {settings.tune_steps}, and tuning has no place in a "
            "recipe; set it to 0, or let a part train the network, such as 'efficientdm'."
        )
