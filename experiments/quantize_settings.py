"""A config of `experiments.quantize` as the settings of methods, and whether its sizes fit."""

from __future__ import annotations

import dataclasses

import jax

from experiments.quantize_config import DRAWING, QuantizeConfig
from qdiff_jax.diffusion.guidance import branches
from qdiff_jax.eval.samples import guidance_of
from qdiff_jax.methods.registry import (
    MethodSettings,
    check_rounds,
    deciding,
    methods_of,
)
from qdiff_jax.observe.capture import batch_bounds
from qdiff_jax.stages.calibrate import ActivationConfig
from qdiff_jax.stages.layer_rounding import ClosedFormConfig
from qdiff_jax.stages.reconstruct import ReconstructConfig

# Methods that calibrate activations on the set of their weights.
ONE_SET = {"ptq4dm", "qdiffusion", "ptq4dit", "csb"}


def method_settings(config: QuantizeConfig) -> MethodSettings:
    """The knobs of every method. Raises ValueError for one outside its choices."""
    fields = dataclasses.asdict(config.reconstruct)
    phase = {
        name: fields.pop(name) for name in ("activation_steps", "activation_lr", "activation_batch")
    }
    # Several CPU devices share the same cores: they gain nothing, and the figures would depend on them.
    devices = 1 if jax.default_backend() == "cpu" else len(jax.devices())
    rounding = dataclasses.asdict(config.closed_form)
    tune_steps, _ = rounding.pop("tune_steps"), rounding.pop("step_weights")
    return MethodSettings(
        weights=ReconstructConfig(**fields, devices=devices),
        activations=ActivationConfig(**dataclasses.asdict(config.activations)),
        **phase,
        variant=config.tfmq_variant,
        tiar=config.tfmq_tiar,
        fsc=config.tfmq_fsc,
        freeze=config.tfmq_freeze,
        faithful_margin=config.tfmq_margin,
        tfmq_split=config.tfmq_split,
        rounding=config.rounding,
        closed_form=ClosedFormConfig(
            **rounding,
            walk_batch=config.reconstruct.walk_batch,
            memory_mib=config.reconstruct.memory_mib,
            devices=devices,
        ),
        tune_steps=tune_steps,
        split=config.qdiffusion_split,
        ptqd=config.ptqd,
        tdq=config.tdq,
        tcaq=config.tcaq,
        ptq4dit=config.ptq4dit,
        svdquant=config.svdquant,
        efficientdm=config.efficientdm,
        binarydm=config.binarydm,
    )


def settings_of(config: QuantizeConfig, settings: MethodSettings, name: str) -> MethodSettings:
    """The settings of the variant `name`. Rounding to nearest is what others are compared with, and stays so
    beside variants that are rounded as the config asks.

    Raises ValueError for `config.rounding` asked of a method that decides its codes in a way of its own, or
    where there is nothing but rounding to nearest.
    """
    base = config.ptqd.base
    decide = {v: deciding(asked.method, base) for v, asked in config.variants.items()}
    if decide[name] == "rtn" and set(decide.values()) != {"rtn"}:
        return dataclasses.replace(settings, rounding=MethodSettings.rounding)
    check_rounds(config.variants[name].method, settings)
    return settings


def check_sizes(config: QuantizeConfig, steps: int) -> None:
    """Raise ValueError for a batch that does not divide its calibration set, before anything ran.

    steps: of the sampler's plan, which may be a few more than the config asks for.
    """
    calibration = config.calibration
    if not 1 <= calibration.weight_steps <= steps:
        raise ValueError(
            f"config.calibration.weight_steps is {calibration.weight_steps}; choose 1 to {steps}, "
            "the steps of the sampler."
        )
    # Any label does: only the number of branches counts.
    rows = calibration.samples * len(branches(guidance_of(config.sampler.guidance_scale, 0)))
    items = rows * len(range(0, steps, steps // calibration.weight_steps))
    if calibration.selector in DRAWING:
        if calibration.selector == "one_step" and not 0 <= calibration.position < steps:
            raise ValueError(
                f"config.calibration.position is {calibration.position}; choose 0 to {steps - 1}."
            )
        items = (calibration.count or calibration.samples) * (rows // calibration.samples)
    activations = config.activations.batch_size
    batches = [
        ("reconstruct.walk_batch", items, config.reconstruct.walk_batch),
        ("activations.batch_size", rows * steps, min(activations, rows * steps)),
    ]
    if {
        part for v in config.variants.values() for part in methods_of(v.method, config.ptqd.base)
    } & ONE_SET:
        batches.append(("activations.batch_size", items, min(activations, items)))
    for name, size, batch in batches:
        try:
            batch_bounds(size, batch)
        except ValueError as error:
            raise ValueError(f"config.{name}: {error}") from error
