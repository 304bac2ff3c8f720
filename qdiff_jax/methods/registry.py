"""Methods by name, built from one settings record, so that a config can name them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable

from qdiff_jax.methods.builders import METHODS, check_base, correction, par_after
from qdiff_jax.methods.closed_form import check_rounding
from qdiff_jax.methods.own_rounding import check_read
from qdiff_jax.methods.ptq4dit import check_transformer
from qdiff_jax.methods.recipes import JOIN, PARTS, check_order, compose, parts_of
from qdiff_jax.methods.settings import CalibrationSets, MethodSettings
from qdiff_jax.stages.stage import Method, Model

# Methods that can make weights of one bit; all others round on uniform grids.
BINARY = ("rtn", "binarydm")
# Methods that not every network has layers for: what raises ValueError for one that has none.
_NEEDS: dict[str, Callable[[Model], None]] = {
    "ptq4dit": check_transformer,
    "csb": check_transformer,
}


def methods_of(name: str, base: str = "rtn") -> tuple[str, ...]:
    """The methods, or the parts of a recipe, that a name stands for. base: PTQD's, which comes before it.

    Raises ValueError for an unknown name, with those there are, and for a recipe in an impossible order.
    """
    if JOIN in name:
        check_order(name)
        return parts_of(name)
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        part = (
            f" {name!r} is a part: put it in a recipe, {name + JOIN + 'rtn'!r}."
            if name in PARTS
            else ""
        )
        raise ValueError(f"Method {name!r} is unknown; there are {sorted(METHODS)}.{hint}{part}")
    return (base, name) if name == "ptqd" else (name,)


def deciding(name: str, base: str = "rtn") -> str:
    """The method that decides the codes of a method or a recipe. base: PTQD's.

    Raises ValueError as `methods_of` does, and for a base that is none.
    """
    names = methods_of(name, base)
    if name == "ptqd":
        check_base(base)
    # Training that goes on from codes decides them where nothing has before it.
    parts = [n for n in names if {"codes", "training"} & set(PARTS[n].kinds)]
    return PARTS[parts[0]].method


def check_rounds(name: str, settings: MethodSettings) -> None:
    """Raise ValueError for a `settings.rounding` other than the default that the method or recipe would not
    read, since it decides codes in a way of its own, and for a default that leaves PAR nothing to repeat."""
    method = deciding(name, settings.ptqd.base)
    if settings.rounding == MethodSettings.rounding:
        if method == "svdquant" and "par" in methods_of(name):
            raise ValueError(
                f"{name}: svdquant rounds layer by layer, of which par has nothing to repeat; set "
                "rounding='closed_form'."
            )
        return
    check_rounding(settings.rounding)
    check_read(method, settings, name)


def check_network(name: str, model: Model) -> None:
    """Raise ValueError for a method or part that this network has no layers for, before any work."""
    if name in _NEEDS:
        _NEEDS[name](model)


def build(
    name: str,
    model: Model,
    sets: CalibrationSets,
    settings: MethodSettings,
    on_progress: Callable | None = None,
) -> Method:
    """The method of that name on a model, or the recipe of parts ("csb+svdquant+efficientdm",
    `methods.recipes`).

    Raises ValueError as `methods_of` and `check_rounds` do.
    """
    names = methods_of(name)
    check_rounds(name, settings)
    if JOIN not in name:
        return METHODS[name](model, sets, settings, on_progress=on_progress)
    if "par" in names:
        settings = dataclasses.replace(settings, rounds=settings.tcaq.rounds)
    own = dict(on_progress=on_progress)

    def builder(word: str):
        if word == "par":
            return lambda model, before: par_after(model, sets, settings, before, **own)
        if word == "ptqd":
            return lambda model, before: correction(model, sets, settings, **own)
        return lambda model, before: METHODS[PARTS[word].method](model, sets, settings, **own)

    return compose(name, model, {word: builder(word) for word in names})
