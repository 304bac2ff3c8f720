"""Quantizes a diffusion model by several methods, samples each from the same noise, shows what was lost.

    python -m experiments.quantize --config=configs/quickstart.py --workdir=W

Leaves in the workdir: report.md, report.html, report.json, pictures/, and for each variant under
variants/NAME a bundle (see experiments.sample), its samples and its figures. Killed at any moment and
started again with the same command, it goes on with the unit and step where it was.

The model is one of this project, or the network of a published pipeline (`config.parts`, `config.prompts`):
its samples are kept as latents, and compared and shown as the images that the first stage makes of them.
"""

from __future__ import annotations

import dataclasses
import pathlib
import resource
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console

from experiments import command_line
from experiments.prompts import prompts_digest, read_prompts
from experiments.quantize_config import (
    DRAWING,
    FREE_TO_CHANGE,
    QuantizeConfig,
    check_sizes,
    method_settings,
    read_config,
    settings_of,
)
from experiments.quantize_images import training_images
from experiments.quantize_report import (
    commits,
    draw,
    is_measured,
    made_at,
    measure,
    provenance,
    reference,
)
from qdiff_jax.config import claim_workdir
from qdiff_jax.diffusion.guidance import Guidance
from qdiff_jax.diffusion.quantized_tensors import tensor_ranges
from qdiff_jax.diffusion.samplers import SamplerPlan
from qdiff_jax.eval import report
from qdiff_jax.eval.asked import Asked, asked_of
from qdiff_jax.eval.samples import FIRST_HELD_OUT, noise_key
from qdiff_jax.methods.checks import check_variant
from qdiff_jax.methods.registry import (
    CalibrationSets,
    MethodSettings,
    build,
    methods_of,
)
from qdiff_jax.methods.run import make_sampler, run_method
from qdiff_jax.models import registry
from qdiff_jax.models.load_pipeline import load_pipeline
from qdiff_jax.observe.archive import load_arrays, load_record, save_arrays, save_record
from qdiff_jax.observe.quantization_noise import Paired, paired
from qdiff_jax.observe.selectors import every_step, select_calibration
from qdiff_jax.observe.sources import Sampling, make_source
from qdiff_jax.observe.trajectory import Trajectory, record_trajectories
from qdiff_jax.policy import SitePlan, make_plan, policy
from qdiff_jax.runtime.cache import compile_account, enable_compile_cache
from qdiff_jax.runtime.phases import follow, phases
from qdiff_jax.runtime.progress import log_progress, progress
from qdiff_jax.runtime.seconds import stopwatch
from qdiff_jax.sites import Site, list_sites
from qdiff_jax.stages.noising import Images
from qdiff_jax.stages.row_weights import eps_importance, rollout_sensitivity


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


def quantize(
    config: Any, workdir: pathlib.Path, command: str = "", *, pictures: bool = True
) -> dict:
    """The whole job; returns the paths of the reports. Everything is read back if it exists already.

    pictures: False for a job of many runs, whose own picture sets them side by side.

    Raises ValueError for a config that cannot run (nothing is written then) or a workdir of another
    one, naming the keys that differ.
    """
    job = prepare(config)
    config, diffusion, asked = job.config, job.diffusion, job.asked
    claim_workdir(workdir, config, FREE_TO_CHANGE)
    claim_prompts(workdir, asked.prompts)
    made_at()  # the commit of now, whatever is committed while this runs
    with phases(phase_weights(config, workdir)) as enter, compile_account() as account:
        enter("trajectories")
        calibration, held_out = trajectories(job, workdir)
        sets = sets_of(job, workdir, calibration)
        enter("fp32")
        records = [reference(config, asked, workdir)]
        for name, v in config.variants.items():
            enter(name)
            record = quantize_one(job, name, sets, workdir / "variants" / name, calibration)
            records.append(measure(config, name, v, record, asked, held_out, workdir))
        drawn = draw(config, asked, job.sites, calibration, records, workdir) if pictures else {}
    logging.info(
        "programs compiled: %d, found in the cache: %d, %.0f s; peak memory %.0f MiB",
        account.backend_compiles,
        account.cache_hits,
        account.seconds,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )
    # Of each variant by its own records: what is read back was made at an earlier commit.
    origin = {name: commits(workdir / "variants" / name) for name in config.variants}
    made = {**provenance(config, diffusion, command), "commits_of_variants": origin}
    paths = report.write_report(workdir, records, made, drawn)
    Console().print(report.terminal_table(records))
    return paths


def claim_prompts(workdir: pathlib.Path, prompts: Sequence[str]) -> None:
    """Raise ValueError if the workdir's samples were drawn from other prompts than its file has now."""
    digest, path = prompts_digest(prompts), workdir / "prompts.json"
    if path.exists() and load_record(path)["sha256"] != digest:
        raise ValueError(
            f"{workdir} was begun with other prompts than config.prompts holds now: put them back, or take "
            "a new workdir."
        )
    if digest is not None:
        save_record(path, {"sha256": digest})


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


def phase_weights(config: QuantizeConfig, workdir: pathlib.Path) -> dict[str, float]:
    """Relative cost of each phase; nothing for a variant that an earlier run has finished."""
    weights = {"trajectories": 1.0, "fp32": 1.0}
    for name, v in config.variants.items():
        done = is_measured(workdir / "variants" / name)
        weights[name] = 0.0 if done else 1.0 + 6.0 * (v.method != "rtn")
    return weights


def trajectories(job: Job, workdir: pathlib.Path) -> tuple[Trajectory, Trajectory]:
    """Full-precision trajectories: to calibrate on, and others to measure on.

    The latter have indices of their own, so that they are the same ones however many are calibrated on. Beside
    the file lie the seconds that recording took, without compiling.
    """
    config, diffusion = job.config, job.diffusion
    recorded = []
    for name, first, count in (
        ("calibration", 0, config.calibration.samples),
        ("held_out", FIRST_HELD_OUT, config.evaluation.held_out),
    ):
        path, indices = workdir / "trajectories" / f"{name}.npz", range(first, first + count)
        if not path.exists():
            with (
                stopwatch() as read,
                progress(f"recording {name} trajectories", len(indices)) as tell,
            ):
                trajectory = record_trajectories(
                    registry.predictor(diffusion.model.module),
                    {"params": diffusion.model.params, "quant": {}},
                    job.sampler,
                    noise_key(config.seed),
                    list(indices),
                    shape=diffusion.image_shape,
                    y=job.asked.conditions(indices),
                    guidance=job.guidance,
                    batch_size=config.evaluation.batch,
                    on_batch=tell,
                )
                spent = read()
            spent = {"seconds": spent.seconds, "cpu_seconds": spent.cpu_seconds}
            save_record(path.with_suffix(".json"), spent)  # first: no trajectories without it
            save_arrays(path, trajectory)
        recorded.append(load_arrays(path, Trajectory, optional=("y",)))
    return tuple(recorded)


def sets_of(job: Job, workdir: pathlib.Path, calibration: Trajectory) -> CalibrationSets:
    """All that methods are calibrated on, from the recorded trajectories."""
    return calibration_sets(job.config, calibration)._replace(
        paired=pairs_of(job, calibration),
        sampling=sampling_of(job),
        step_weights=step_weights(job, workdir),
        images=job.images,
    )


def calibration_sets(config: QuantizeConfig, calibration: Trajectory) -> CalibrationSets:
    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    chosen = config.calibration
    options = {"steps": chosen.weight_steps, "per_step": chosen.samples}
    if chosen.selector in DRAWING:
        options = {"count": chosen.count or None}
    if chosen.selector == "one_step":
        options["position"] = chosen.position
    if chosen.selector == "ndtc":
        own = dict(mean=chosen.mean, std=chosen.std, mirror_bug=chosen.mirror_bug)
        options = {**options, **own}
    return CalibrationSets(
        weights=select_calibration(chosen.selector, key, calibration, **options),
        activations=every_step(jax.random.fold_in(key, 1), calibration),
        timesteps=calibration.t,
    )


def step_weights(job: Job, workdir: pathlib.Path) -> np.ndarray | None:
    """[S], by the config's rule; None for equal weights. Rollouts are made once for a workdir, and the file
    with their outcome says what they took."""
    config, diffusion = job.config, job.diffusion
    if config.closed_form.step_weights == "uniform":
        return None
    if config.closed_form.step_weights == "eps_coefficient":
        return eps_importance(job.sampler)
    path = workdir / "trajectories" / "sensitivity.json"
    if not path.exists():
        indices = list(range(config.calibration.samples))
        with stopwatch() as read:
            importance = rollout_sensitivity(
                registry.predictor(diffusion.model.module),
                {"params": diffusion.model.params, "quant": {}},
                job.sampler,
                noise_key(config.seed),
                indices,
                shape=diffusion.image_shape,
                y=job.asked.conditions(indices),
                guidance=job.guidance,
                batch_size=min(config.evaluation.batch, len(indices)),
            )
            spent = read()
        save_record(path, {"importance": importance.tolist(), **spent._asdict(), **made_at()})
    return np.asarray(load_record(path)["importance"])


def pairs_of(job: Job, calibration: Trajectory) -> Paired:
    """The calibration trajectories as pairs, for methods that correct the sampling."""
    key = noise_key(job.config.seed)
    return paired(calibration, job.guidance, job.sampler, job.diffusion.schedule, key)


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


def sampler_config(job: Job, calibration: Trajectory) -> dict:
    """The sampler of a quantized variant: the config's, with its own tensors quantized if asked for."""
    config, as_json = job.config.sampler, job.config.sampler.as_json()
    if not config.tensor_bits:
        return as_json
    ranges = tensor_ranges(job.sampler, calibration, job.guidance)
    return {**as_json, "tensors": {"bits": config.tensor_bits, "ranges": ranges}}


def quantize_one(
    job: Job, name: str, sets: CalibrationSets, folder: pathlib.Path, calibration: Trajectory
) -> dict:
    """Run the variant's method to its bundle. calibration: full-precision trajectories."""
    config, v = job.config, job.config.variants[name]
    settings = settings_of(config, job.settings, name)
    with follow(name) as tell:
        return run_method(
            build(v.method, job.diffusion.model, sets, settings, tell),
            job.diffusion,
            job.plans[name],
            jax.random.fold_in(jax.random.key(config.seed), 3),
            folder,
            sampler_config=sampler_config(job, calibration),
            extra={
                "seed": config.seed,
                "samples": config.evaluation.samples,
                "batch": config.evaluation.batch,
                "policy": config.policy,
                **described(job),
                "w_bits": v.w_bits,
                "a_bits": v.a_bits,
            },
            on_stage=lambda stage: logging.info("%s: %s", name, stage),
            made=made_at(),
        )


def described(job: Job) -> dict:
    """What a bundle of a pipeline's network says of its other parts, so that it can be sampled alone."""
    if job.asked.pipeline.first_stage is None and job.asked.pipeline.text is None:
        return {}
    parts, prompts = dataclasses.asdict(job.config.parts), list(job.asked.prompts)
    return {"pipeline": {"model": job.config.model, "parts": parts, "prompts": prompts}}


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    log_progress()
    enable_compile_cache(flags.FLAGS.compile_cache)
    command = shlex.join(["python", "-m", "experiments.quantize", *sys.argv[1:]])
    quantize(flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir), command)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file, path:arg.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Everything goes here; the same again resumes.")
    flags.DEFINE_string("compile_cache", None, "Folder for compiled programs.")
    flags.mark_flags_as_required(["config", "workdir"])
    command_line.run(main)
