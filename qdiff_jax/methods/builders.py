"""How each method takes what it needs of the calibration sets and the one settings record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from qdiff_jax.methods.binarydm import binarydm
from qdiff_jax.methods.brecq import brecq
from qdiff_jax.methods.closed_form import closed_form
from qdiff_jax.methods.efficientdm import efficientdm
from qdiff_jax.methods.par import par
from qdiff_jax.methods.ptq4dit import ptq4dit
from qdiff_jax.methods.ptq4dm import ptq4dm
from qdiff_jax.methods.ptqd import ptqd
from qdiff_jax.methods.qdiffusion import qdiffusion
from qdiff_jax.methods.rtn import rtn
from qdiff_jax.methods.svdquant import svdquant
from qdiff_jax.methods.tcaq import tcaq
from qdiff_jax.methods.tdq import tdq
from qdiff_jax.methods.tfmq import tfmq
from qdiff_jax.stages.stage import Method
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


def second_phase(settings):
    """BRECQ's training of activation scales, after that of codes; None for no steps of it."""
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
        activation_steps=second_phase(settings),
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
        activation_steps=second_phase(settings),
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
    check_base(settings.ptqd.base)
    base = METHODS[settings.ptqd.base](model, sets, settings, **own)
    return ptqd(model, base, sets.paired, settings.ptqd, **own)


def correction(model, sets, settings, **own):
    """PTQD's own stages, for what stands before them in a recipe."""
    _check_paired(sets)
    return ptqd(model, Method("recipe", ()), sets.paired, settings.ptqd, **own)


def check_base(base):
    """Raise ValueError for a method that PTQD cannot correct: itself, or none there is."""
    if base not in set(METHODS) - {"ptqd"}:
        raise ValueError(
            f"PTQD goes on top of another method, not of {base!r}; there are "
            f"{sorted(set(METHODS) - {'ptqd'})}."
        )


def _check_paired(sets):
    if sets.paired is None:
        raise ValueError("PTQD needs paired estimates: give CalibrationSets.paired.")


def par_after(model, sets, settings, base, **own):
    """PAR's rounds (TCAQ-DM) over the stages of `base`, the parts before it in a recipe."""
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
