"""A config that was found in order, and all that it names, before the first minute of work."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from experiments.prompts import read_prompts
from experiments.quantize_config import QuantizeConfig, read_config
from experiments.quantize_images import training_images
from experiments.quantize_settings import check_sizes, method_settings, settings_of
from qdiff_jax.diffusion.guidance import Guidance
from qdiff_jax.diffusion.samplers import SamplerPlan
from qdiff_jax.eval.asked import Asked, asked_of
from qdiff_jax.methods.checks import check_variant
from qdiff_jax.methods.registry import (
    MethodSettings,
    methods_of,
)
from qdiff_jax.methods.run import make_sampler
from qdiff_jax.models import registry
from qdiff_jax.models.load_pipeline import load_pipeline
from qdiff_jax.named_policies import policy
from qdiff_jax.observe.sources import Sampling, make_source
from qdiff_jax.policy import SitePlan, make_plan
from qdiff_jax.sites import Site, list_sites
from qdiff_jax.stages.noising import Images


class Job(NamedTuple):
    """A config that was found in order, and what it names: the model, with its first stage and text encoder,
    and what it is asked for; its sites, a plan per variant. guidance: of the sampler."""

    config: QuantizeConfig
    asked: Asked
    guidance: Guidance | None
    sites: tuple[Site, ...]
    plans: dict[str, SitePlan]
    settings: MethodSettings
    sampler: SamplerPlan
    images: Images | None = None

    @property
    def diffusion(self) -> registry.DiffusionModel:
        return self.asked.diffusion


def prepare(config: Any) -> Job:
    """Everything a config can get wrong, found out before the first minute of work."""
    config = read_config(config)
    settings = method_settings(config)
    prompts = read_prompts(config.prompts)
    asked = asked_of(load_pipeline(config.model, config.parts), prompts, config.model)
    diffusion = asked.diffusion
    base = config.ptqd.base
    methods = {part for v in config.variants.values() for part in methods_of(v.method, base)}
    if config.classifier:
        registry.classifier(config.classifier)
    sampler = make_sampler(diffusion.source["schedule"], config.sampler.as_json())
    check_sizes(config, sampler.steps)
    guidance = asked.guidance(config.sampler.guidance_scale)  # refused here, if at all
    example = (
        np.zeros((2, *diffusion.image_shape), np.float32),
        np.zeros((2,), np.float32),
        asked.conditions(range(2)),
    )
    sites = list_sites(diffusion.model.module, *example)
    plans = {
        name: make_plan(sites, policy(config.policy, sites, *v.targets))
        for name, v in config.variants.items()
    }
    for name, v in config.variants.items():
        own = settings_of(config, settings, name)
        try:
            check_variant(v.method, diffusion.model, sites, plans[name], own)
        except ValueError as error:
            raise ValueError(f"config.variants.{name}: {error}") from error
    images = training_images(config.data, methods, asked)
    job = Job(config, asked, guidance, sites, plans, settings, sampler, images)
    source = settings.efficientdm.source
    if source.kind == "online" and "efficientdm" in methods and asked.prompts:
        raise ValueError(
            f"an online source draws classes for its trajectories, and {config.model} reads prompts: set "
            "efficientdm.source.kind=cached, which takes the recorded ones."
        )
    if source.kind == "online" and "efficientdm" in methods:
        # A grid that cannot be is found here.
        make_source(source, sampler.steps, sampling_of(job), None)
    return job


def sampling_of(job: Job) -> Sampling:
    """What the config's trajectories are made of, for methods that sample while they train."""
    config, diffusion = job.config.sampler, job.diffusion
    options = {"prediction": diffusion.source["schedule"].get("prediction", "eps")}
    if config.final:
        options["final"] = config.final
    return Sampling(
        diffusion.schedule,
        config.spacing,
        job.guidance,
        diffusion.image_shape,
        diffusion.classes,
        diffusion.null_class,
        config.steps,
        config.as_json().get("grid", {}),
        options,
    )
