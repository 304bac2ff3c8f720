"""One method on one model, from plan to bundle, and the bundle back to something that samples."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from qdiff_jax.diffusion.corrections import hooks_of
from qdiff_jax.diffusion.flow import flow_euler, flow_sigmas
from qdiff_jax.diffusion.hooks import IDENTITY, Hooks
from qdiff_jax.diffusion.quantized_tensors import quantize_tensors
from qdiff_jax.diffusion.samplers import SamplerPlan, make_plan
from qdiff_jax.diffusion.schedule import schedule_of
from qdiff_jax.diffusion.timesteps import make_timesteps
from qdiff_jax.export.bundle import Bundle, load_bundle, save_bundle
from qdiff_jax.export.integer import check_executable
from qdiff_jax.models.registry import DiffusionModel, from_config
from qdiff_jax.observe.archive import load_record, save_record
from qdiff_jax.policy import SitePlan
from qdiff_jax.sites import flatten_sites, nest_sites
from qdiff_jax.stages.balance import FOLDED
from qdiff_jax.stages.stage import Method, fold_weights, initial_state, run_stage, tuned_params

_FLOW_OPTIONS = ("shift", "mu")
_QUANTIZE_S = {"calibrate": "calibrate_s", "round": "calibrate_s"}


class Loaded(NamedTuple):
    """A bundle ready to sample: variables for `registry.predictor(module)`, and what it was made for.

    hooks: the correction of its sampling, under `plan`; correction: its tables, for another plan."""

    module: Any
    variables: dict
    plan: SamplerPlan
    manifest: dict
    hooks: Hooks = IDENTITY
    correction: Any = None


def run_method(
    method: Method,
    diffusion: DiffusionModel,
    plan: SitePlan,
    key: jax.Array,
    directory: pathlib.Path,
    *,
    sampler_config: Mapping,
    extra: Mapping,
    on_stage: Callable[[str], None] | None = None,
    made: Mapping[str, Any] | None = None,
) -> dict:
    """Run the method's stages and write `directory/bundle` and `directory/quantize.json`.

    Stages keep their unfinished work under `directory/stages`; called again after a kill, they go on
    from it. made: what the record shall say of its origin, such as the commit. Returns the record: that,
    seconds by kind of stage (wall, of all processes that worked on it), compile seconds and each stage's
    report.
    """
    record = directory / "quantize.json"
    if record.exists() and (directory / "bundle").is_dir():
        return load_record(record)
    # A kill between the bundle and its record leaves a bundle whose figures are lost: made again. One
    # inside the writing of the bundle leaves its draft.
    for leftover in (directory / "bundle", *directory.glob(".bundle.*")):
        shutil.rmtree(leftover, ignore_errors=True)
    state = initial_state(plan, key, diffusion.source["sha256"])
    seconds = {"calibrate_s": 0.0, "reconstruct_s": 0.0, "compile_s": 0.0}
    reports = {}
    for i, stage in enumerate(method.stages):
        if on_stage is not None:
            on_stage(stage.name)
        state, report = run_stage(stage, state, directory / "stages" / f"{i}_{stage.name}")
        kind = seconds_of(stage.name)
        seconds[kind] += report["seconds"]
        seconds["compile_s"] += report["compile_seconds"]
        reports[f"{i}_{stage.name}"] = {k: v for k, v in report.items() if k != "ranges"}
    save_bundle(
        directory / "bundle",
        params=tuned_params(diffusion.model.params, state.aux),
        quant=state.quant,
        plan_json=state.plan.to_json(),
        model_config=diffusion.config,
        schedule_config=diffusion.source["schedule"],
        sampler_config=dict(sampler_config),
        source={"sha256": diffusion.source["sha256"], "name": diffusion.source["name"]},
        extra={
            "method": method.name,
            "notes": method.notes,
            **({FOLDED: True} if FOLDED in state.aux else {}),
            **extra,
        },
        correction=state.aux.get("correction"),
    )
    result = {**(made or {}), **seconds, "stages": reports}
    save_record(record, result)
    return result


def seconds_of(stage: str) -> str:
    """Where the seconds of a stage count, by its name: "calibrate_s" or "reconstruct_s"."""
    return _QUANTIZE_S.get(stage.split("_")[0], "reconstruct_s")


def make_sampler(schedule_config: Mapping, sampler_config: Mapping) -> SamplerPlan:
    """The sampler's plan from the JSON configs of the model's schedule and of the sampler.

    schedule_config: "schedule", "timesteps", optionally the schedule's "options" and the network's
    "prediction" ("eps" without). sampler_config: "name", "spacing", "steps", optionally the sampler's
    "options", the grid's ("grid": offset, last), and the bits and ranges of its own "tensors". A model
    with the schedule "flow" is sampled by "flow_euler" alone, whose options are `shift` and `mu` of
    `flow_sigmas`; "spacing" is then one of sigmas.
    Raises ValueError for a sampler of another kind of model, a flow's unknown option or grid, and as the
    functions called.
    """
    name, steps, options = (
        sampler_config["name"],
        sampler_config["steps"],
        dict(sampler_config.get("options", {})),
    )
    timesteps, prediction = schedule_config["timesteps"], schedule_config.get("prediction", "eps")
    if (schedule_config["schedule"] == "flow") != (name == "flow_euler"):
        raise ValueError(
            f"the sampler '{name}' does not sample a model with the schedule "
            f"'{schedule_config['schedule']}': 'flow_euler' belongs to 'flow' models and to no others."
        )
    if name == "flow_euler":
        _check_flow(sampler_config)
        sigmas = flow_sigmas(
            steps, spacing=sampler_config["spacing"], num_timesteps=timesteps, **options
        )
        plan = flow_euler(sigmas, num_timesteps=timesteps)
    else:
        grid = make_timesteps(
            sampler_config["spacing"], timesteps, steps, **sampler_config.get("grid", {})
        )
        if name == "euler" and sampler_config["spacing"] == "leading" and "start" not in options:
            raise ValueError(
                "Euler on the spacing 'leading' starts with the option start='unit' in diffusers and with "
                "'noise' in k-diffusion: say which."
            )
        if prediction != "eps":
            options["prediction"] = prediction
        plan = make_plan(name, schedule_of(schedule_config), grid, **options)
    tensors = sampler_config.get("tensors")
    return plan if tensors is None else quantize_tensors(plan, tensors["bits"], tensors["ranges"])


def _check_flow(sampler_config: Mapping) -> None:
    if sampler_config.get("grid"):
        raise ValueError(
            f"the sampler 'flow_euler' visits noise levels and has no grid of timesteps, and "
            f"{dict(sampler_config['grid'])} was given: leave grid out, or set shift or mu among its options."
        )
    unknown = sorted(set(sampler_config.get("options", {})) - set(_FLOW_OPTIONS))
    if unknown:
        raise ValueError(
            f"sampler 'flow_euler' has no option {unknown}; its options are {list(_FLOW_OPTIONS)}."
        )


def is_modulation_folded(manifest: Mapping) -> bool:
    """Whether temporal features and smoothed activations of a bundle are not in full precision's units."""
    return bool((manifest["extra"] or {}).get(FOLDED))


def check_comparable(manifest: Mapping, name: str) -> None:
    """Raise ValueError for a bundle whose layers cannot be compared with full precision's one by one."""
    if is_modulation_folded(manifest):
        raise ValueError(
            f"{name} has factors of channels folded into its modulation: its temporal features and activations "
            "are in other units than full precision's, and only its images compare; leave it out, or take a "
            "variant without factors (ptq4dit.csb=False)."
        )


def unguided_sampler(loaded: Loaded, name: str) -> SamplerPlan:
    """The sampler that a bundle was made for, its own tensors in full precision: for trajectories without
    guidance, to compare the bundle's with.

    Raises ValueError for a correction that was measured on guided estimates, which holds for those alone.
    """
    sampler = loaded.manifest["sampler"]
    if loaded.correction is not None and sampler.get("guidance_scale", -1.0) >= 0:
        raise ValueError(
            f"{name} corrects estimates at guidance {sampler['guidance_scale']:g}, and trajectories are "
            "compared without: leave it out, or calibrate one with sampler.guidance_scale=-1."
        )
    if sampler.get("tensors") is None:
        return loaded.plan
    return make_sampler(loaded.manifest["schedule"], {**sampler, "tensors": None})


def load_for_sampling(directory: pathlib.Path, execute: bool = False) -> Loaded:
    """A bundle with its weights folded (simulated), or kept packed and multiplied as integers.

    Raises BundleError for a damaged bundle and ValueError, with execute, for one whose sites cannot
    run as integers (it names the first).
    """
    bundle: Bundle = load_bundle(directory)
    manifest = bundle.manifest
    if execute:
        check_executable(bundle.quant)
        sites = flatten_sites(bundle.quant)
        ready = {
            name: site.replace(execute=site.lhs is not None and site.rhs is not None)
            for name, site in sites.items()
        }
        params, quant = bundle.params, nest_sites(ready)
    else:
        params, quant = fold_weights(bundle.params, bundle.quant)
    module = from_config(manifest["model"])
    plan = make_sampler(manifest["schedule"], manifest["sampler"])
    hooks = hooks_of(bundle.correction, plan)
    variables = {"params": params, "quant": quant}
    return Loaded(module, variables, plan, manifest, hooks, bundle.correction)
