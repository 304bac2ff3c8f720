"""Methods by name, built from one settings record, so that a config can name them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable

import jax

from qdiff_jax.methods.binarydm import binarydm
from qdiff_jax.methods.brecq import brecq
from qdiff_jax.methods.closed_form import check_rounding, closed_form
from qdiff_jax.methods.efficientdm import efficientdm
from qdiff_jax.methods.own_rounding import check_read
from qdiff_jax.methods.par import par
from qdiff_jax.methods.ptq4dit import check_transformer, ptq4dit
from qdiff_jax.methods.ptq4dm import ptq4dm
from qdiff_jax.methods.ptqd import ptqd
from qdiff_jax.methods.qdiffusion import qdiffusion
from qdiff_jax.methods.recipes import JOIN, PARTS, check_order, compose, parts_of
from qdiff_jax.methods.rtn import rtn
from qdiff_jax.methods.settings import CalibrationSets, MethodSettings
from qdiff_jax.methods.svdquant import svdquant
from qdiff_jax.methods.tcaq import tcaq
from qdiff_jax.methods.tdq import tdq
from qdiff_jax.methods.tfmq import tfmq
from qdiff_jax.stages.stage import Method, Model
from qdiff_jax.stages.training_sets import split_images, split_trajectories
from qdiff_jax.stages.tune import TuneConfig


def _two_sets(sets):
    return sets.weights, sets.activations, sets.timesteps


def _rounded(sets, settings):
    """What every method takes that reconstructs its weights."""
    return dict(
        weight_method=settings.weight_method,
        weights=settings.weights,
        rounding=settings.rounding,
        closed_form=settings.closed_form,
        step_weights=sets.step_weights,
    )


def _repeated(settings):
    """What methods take whose reconstruction PAR can repeat."""
    return dict(rounds=settings.rounds, round_share=settings.tcaq.round_share)


def _second_phase(settings):
    if not settings.activation_steps:
        return None
    return dataclasses.replace(
        settings.weights,
        steps=settings.activation_steps,
        temporal_steps=0,  # of scales they cost what all others cost
        batch_size=settings.activation_batch or settings.weights.batch_size,
        scale_lr=settings.activation_lr,
        trains="scales",
        inputs="full_precision",
        p=2.4,
    )


def _rtn(model, sets, settings, **own):
    return rtn(
        model,
        sets.activations,
        sets.timesteps,
        weight_method=settings.weight_method,
        activations=settings.activations,
        **own,
    )


def _qdiffusion(model, sets, settings, **own):
    return qdiffusion(
        model,
        sets.weights,
        sets.timesteps,
        split=settings.split,
        activations=settings.activations,
        activation_steps=_second_phase(settings),
        **_rounded(sets, settings),
        **_repeated(settings),
        **own,
    )


def _ptq4dm(model, sets, settings, **own):
    size = settings.activations.batch_size
    ranges = dataclasses.replace(settings.batch_ranges, batch_size=size)
    return ptq4dm(model, sets.weights, activations=ranges, **own)


def _brecq(model, sets, settings, **own):
    return brecq(
        model,
        *_two_sets(sets),
        activations=settings.activations,
        activation_steps=_second_phase(settings),
        **_rounded(sets, settings),
        **_repeated(settings),
        **own,
    )


def _tfmq(model, sets, settings, **own):
    return tfmq(
        model,
        *_two_sets(sets),
        variant=settings.variant,
        tiar=settings.tiar,
        fsc=settings.fsc,
        freeze=settings.freeze,
        split=settings.tfmq_split,
        margin=settings.faithful_margin,
        activations=settings.activations,
        **_rounded(sets, settings),
        **_repeated(settings),
        **own,
    )


def _closed_form(model, sets, settings, **own):
    return closed_form(
        model,
        *_two_sets(sets),
        weight_method=settings.weight_method,
        rounding=settings.closed_form,
        tuning=TuneConfig(steps=settings.tune_steps) if settings.tune_steps else None,
        activations=settings.activations,
        step_weights=sets.step_weights,
        **own,
    )


def _ptqd(model, sets, settings, **own):
    _check_paired(sets)
    _check_base(settings.ptqd.base)
    base = METHODS[settings.ptqd.base](model, sets, settings, **own)
    return ptqd(model, base, sets.paired, settings.ptqd, **own)


def _correction(model, sets, settings, **own):
    """PTQD's own stages, for what stands before them in a recipe."""
    _check_paired(sets)
    return ptqd(model, Method("recipe", ()), sets.paired, settings.ptqd, **own)


def _check_base(base):
    if base not in set(METHODS) - {"ptqd"}:
        raise ValueError(
            f"PTQD goes on top of another method, not of {base!r}; there are "
            f"{sorted(set(METHODS) - {'ptqd'})}."
        )


def _check_paired(sets):
    if sets.paired is None:
        raise ValueError("PTQD needs paired estimates: give CalibrationSets.paired.")


def _par(model, sets, settings, base, **own):
    return par(
        model,
        base,
        sets.paired,
        sets.weights,
        settings.tcaq.rounds,
        batch_size=settings.activations.batch_size,
        **own,
    )


def _tdq(model, sets, settings, **own):
    size = settings.activations.batch_size
    return tdq(
        model,
        *_two_sets(sets),
        config=settings.tdq,
        batch_size=size,
        **_rounded(sets, settings),
        **own,
    )


def _tcaq(model, sets, settings, **own):
    # It learns activation steps beside the rounding, at their own rate.
    weights = dataclasses.replace(settings.weights, scale_lr=settings.activation_lr)
    settings = dataclasses.replace(settings, weights=weights)
    return tcaq(
        model,
        *_two_sets(sets),
        sets.paired,
        activations=settings.activations,
        config=settings.tcaq,
        **_rounded(sets, settings),
        **own,
    )


def _ptq4dit(model, sets, settings, **own):
    # It learns activation steps beside the rounding, at their own rate; its ranges of weights are its own.
    weights = dataclasses.replace(settings.weights, scale_lr=settings.activation_lr)
    rounded = _rounded(sets, dataclasses.replace(settings, weights=weights))
    return ptq4dit(
        model,
        sets.weights,
        sets.timesteps,
        config=settings.ptq4dit,
        activations=settings.activations,
        **{k: v for k, v in rounded.items() if k != "weight_method"},
        **own,
    )


def _svdquant(model, sets, settings, **own):
    return svdquant(
        model,
        *_two_sets(sets),
        config=settings.svdquant,
        activations=settings.activations,
        rounding="closed_form" if settings.rounding == "closed_form" else "layer",
        closed_form=settings.closed_form,
        step_weights=sets.step_weights,
        **own,
    )


def _efficientdm(model, sets, settings, **own):
    return efficientdm(
        model,
        sets.activations,
        sets.timesteps,
        sampling=sets.sampling,
        recorded=sets.paired,
        config=settings.efficientdm,
        activations=settings.activations,
        step_weights=sets.step_weights,
        **own,
    )


def _binarydm(model, sets, settings, **own):
    gate = settings.binarydm.gate_samples
    if sets.images is not None:
        data = split_images(sets.images, gate)
    elif sets.paired is not None:
        data = split_trajectories(jax.random.key(0), sets.paired.trajectory, gate)
    else:
        raise ValueError(
            "binarydm trains on images or on recorded trajectories: give CalibrationSets.images or .paired."
        )
    return binarydm(
        model,
        *data,
        sets.activations,
        sets.timesteps,
        weight_method=settings.weight_method,
        activations=settings.activations,
        config=settings.binarydm,
        **own,
    )


METHODS: dict[str, Callable[..., Method]] = {
    "rtn": _rtn,
    "ptq4dm": _ptq4dm,
    "brecq": _brecq,
    "qdiffusion": _qdiffusion,
    "tfmq": _tfmq,
    "closed_form": _closed_form,
    "ptqd": _ptqd,
    "tdq": _tdq,
    "tcaq": _tcaq,
    "ptq4dit": _ptq4dit,
    "svdquant": _svdquant,
    "efficientdm": _efficientdm,
    "binarydm": _binarydm,
}
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
        _check_base(base)
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
            return lambda model, before: _par(model, sets, settings, before, **own)
        if word == "ptqd":
            return lambda model, before: _correction(model, sets, settings, **own)
        return lambda model, before: METHODS[PARTS[word].method](model, sets, settings, **own)

    return compose(name, model, {word: builder(word) for word in names})
