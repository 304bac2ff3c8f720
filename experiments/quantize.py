"""Quantizes a diffusion model by several methods, samples each from the same noise, shows what was lost.

    python -m experiments.quantize --config=configs/quickstart.py --workdir=W

Leaves in the workdir: report.md, report.html, report.json, pictures/, and for each variant under
variants/NAME a bundle (see experiments.sample), its samples and its figures. Killed at any moment and
started again with the same command, it goes on with the unit and step where it was.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
import resource
import shlex
import subprocess
import sys
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console

from qdiff_jax.config import claim_workdir, fingerprint, to_dataclass
from qdiff_jax.diffusion.guidance import classifier_free
from qdiff_jax.diffusion.sample import sample
from qdiff_jax.eval import plots, report, variant
from qdiff_jax.eval.files import write_atomic
from qdiff_jax.export.bundle import stored_bytes
from qdiff_jax.methods.registry import METHODS, CalibrationSets, MethodSettings, build
from qdiff_jax.methods.run import load_for_sampling, make_sampler, run_method
from qdiff_jax.models import registry
from qdiff_jax.observe.archive import load_arrays, save_arrays
from qdiff_jax.observe.selectors import every_step, uniform
from qdiff_jax.observe.trajectory import Trajectory, record_trajectories
from qdiff_jax.policy import make_plan, policy
from qdiff_jax.runtime.cache import compile_account, enable_compile_cache
from qdiff_jax.runtime.phases import follow, phases
from qdiff_jax.runtime.progress import progress
from qdiff_jax.sites import list_sites
from qdiff_jax.stages.calibrate import ActivationConfig, ranges_by_step
from qdiff_jax.stages.reconstruct import ReconstructConfig

# Evaluation noise starts far from the indices of the calibration trajectories.
FIRST_INDEX = 1_000_000


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """guidance_scale: classifier-free guidance; negative for none (labels as they are)."""

    name: str = "ddim"
    spacing: str = "uniform"
    steps: int = 20
    eta: float = 0.0
    guidance_scale: float = -1.0

    def as_json(self) -> dict:
        options = {"eta": self.eta} if self.name == "ddim" else {}
        return {
            "name": self.name,
            "spacing": self.spacing,
            "steps": self.steps,
            "options": options,
            "guidance_scale": self.guidance_scale,
        }


@dataclasses.dataclass(frozen=True)
class CalibrationConfig:
    """samples: full-precision trajectories; weight_steps: how many of their steps reconstruction sees
    (activation ranges see every step)."""

    samples: int = 16
    weight_steps: int = 20


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """held_out: trajectories for teacher-forced error; samples: rollouts; batch: of both."""

    held_out: int = 16
    samples: int = 64
    batch: int = 32


@dataclasses.dataclass(frozen=True)
class VariantConfig:
    """w_bits and a_bits: target bits; 0 or 32 keeps that side in full precision."""

    method: str
    w_bits: int
    a_bits: int


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig:
    """The fields of ReconstructConfig that a config sets, and BRECQ's activation phase (0: none)."""

    steps: int = 150
    temporal_steps: int = 0
    batch_size: int = 32
    lr: float = 1e-2
    schedule: str = "cosine"
    rounding_weight: float = 0.01
    walk_batch: int = 64
    memory_mib: int = 1024
    activation_steps: int = 0
    activation_lr: float = 4e-4


@dataclasses.dataclass(frozen=True)
class ActivationsConfig:
    observer: str = "ema"
    margin: float = 1.1
    batch_size: int = 64


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """model, classifier: shipped names or .safetensors paths (classifier "" for none)."""

    model: str
    classifier: str
    seed: int
    policy: str
    variants: dict
    sampler: SamplerConfig
    calibration: CalibrationConfig
    evaluation: EvaluationConfig
    reconstruct: ReconstructionConfig
    activations: ActivationsConfig
    tfmq_variant: str = "fixed"


def quantize(config: Any, workdir: pathlib.Path, command: str = "") -> dict:
    """The whole job; returns the paths of the reports. Everything is read back if it exists already."""
    config = to_dataclass(QuantizeConfig, config)
    variants = {
        n: to_dataclass(VariantConfig, v, f"variants.{n}") for n, v in config.variants.items()
    }
    # A ConfigDict sorts its keys; the table reads from little damage to much, simple method to complex.
    order = list(METHODS)
    variants = dict(
        sorted(
            variants.items(), key=lambda v: (-v[1].w_bits, -v[1].a_bits, order.index(v[1].method))
        )
    )
    claim_workdir(workdir, config)
    diffusion = registry.load(config.model)
    predict = registry.predictor(diffusion.model.module)
    names = ["trajectories", "fp32", *variants]
    weights = [1.0, 1.0, *(1.0 + 6.0 * (v.method != "rtn") for v in variants.values())]
    with phases(dict(zip(names, weights))) as enter, compile_account() as account:
        enter("trajectories")
        calibration, held_out = trajectories(config, diffusion, predict, workdir)
        sets = calibration_sets(config, calibration)
        enter("fp32")
        records = [reference(config, diffusion, predict, workdir)]
        for name, v in variants.items():
            enter(name)
            folder = workdir / "variants" / name
            record = quantize_one(config, name, v, diffusion, sets, folder)
            records.append(measure(config, name, v, record, diffusion, held_out, workdir))
    pictures = draw(config, diffusion, calibration, records, workdir)
    logging.info(
        "programs compiled: %d, found in the cache: %d, %.0f s; peak memory %.0f MiB",
        account.backend_compiles,
        account.cache_hits,
        account.seconds,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )
    paths = report.write_report(workdir, records, provenance(config, diffusion, command), pictures)
    Console().print(report.terminal_table(records))
    return paths


def trajectories(config, diffusion, predict, workdir) -> tuple[Trajectory, Trajectory]:
    """Full-precision trajectories: to calibrate on, and others to measure on."""
    plan = make_sampler(diffusion.source["schedule"], config.sampler.as_json())
    variables = {"params": diffusion.model.params, "quant": {}}
    guidance = guidance_of(config.sampler.guidance_scale, diffusion.null_class)
    total = config.calibration.samples + config.evaluation.held_out
    recorded = []
    for name, indices in (
        ("calibration", range(config.calibration.samples)),
        ("held_out", range(config.calibration.samples, total)),
    ):
        path = workdir / "trajectories" / f"{name}.npz"
        if not path.exists():
            with progress(f"recording {name} trajectories", len(indices)) as tell:
                trajectory = record_trajectories(
                    predict,
                    variables,
                    plan,
                    jax.random.fold_in(jax.random.key(config.seed), 1),
                    list(indices),
                    shape=diffusion.image_shape,
                    y=labels(diffusion.null_class, indices),
                    guidance=guidance,
                    batch_size=config.evaluation.batch,
                    on_batch=tell,
                )
            save_arrays(path, trajectory)
        recorded.append(load_arrays(path, Trajectory))
    return tuple(recorded)


def labels(classes: int | None, indices) -> np.ndarray | None:
    """Every class in turn, by global sample index; None for an unconditional model."""
    return None if classes is None else np.asarray(indices, np.int32) % classes


def guidance_of(scale: float, null_class: int | None):
    return classifier_free(None if scale < 0 else scale, null_class)


def calibration_sets(config, calibration: Trajectory) -> CalibrationSets:
    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    return CalibrationSets(
        weights=uniform(
            key, calibration, config.calibration.weight_steps, config.calibration.samples
        ),
        activations=every_step(jax.random.fold_in(key, 1), calibration),
        timesteps=calibration.t,
    )


def quantize_one(config, name, v, diffusion, sets, folder) -> dict:
    """Run the variant's method to its bundle."""
    module = diffusion.model.module
    example = (
        np.zeros((2, *diffusion.image_shape), np.float32),
        np.zeros((2,), np.float32),
        labels(diffusion.null_class, range(2)),
    )
    sites = list_sites(module, *example)
    w_bits, a_bits = (bits if 0 < bits < 32 else None for bits in (v.w_bits, v.a_bits))
    plan = make_plan(sites, policy(config.policy, sites, w_bits, a_bits))
    fields = dataclasses.asdict(config.reconstruct)
    activation_steps, activation_lr = fields.pop("activation_steps"), fields.pop("activation_lr")
    settings = MethodSettings(
        weights=ReconstructConfig(**fields, devices=len(jax.devices())),
        activations=ActivationConfig(**dataclasses.asdict(config.activations)),
        activation_steps=activation_steps,
        activation_lr=activation_lr,
        variant=config.tfmq_variant,
    )
    with follow(name) as tell:
        method = build(v.method, diffusion.model, sets, settings, tell)
        return run_method(
            method,
            diffusion,
            plan,
            jax.random.fold_in(jax.random.key(config.seed), 3),
            folder,
            sampler_config=config.sampler.as_json(),
            extra={
                "seed": config.seed,
                "samples": config.evaluation.samples,
                "batch": config.evaluation.batch,
                "policy": config.policy,
                "w_bits": v.w_bits,
                "a_bits": v.a_bits,
            },
            on_stage=lambda stage: logging.info("%s: %s", name, stage),
        )


def rollout(config, diffusion, variables, plan, module, name: str) -> np.ndarray:
    """x_0 of all evaluation samples: the same noise and labels for every variant."""
    indices = range(FIRST_INDEX, FIRST_INDEX + config.evaluation.samples)
    with progress(f"{name}: sampling", len(indices)) as tell:
        return sample(
            registry.predictor(module),
            variables,
            plan,
            jax.random.fold_in(jax.random.key(config.seed), 1),
            list(indices),
            shape=diffusion.image_shape,
            y=labels(diffusion.null_class, indices),
            guidance=guidance_of(config.sampler.guidance_scale, diffusion.null_class),
            batch_size=config.evaluation.batch,
            on_batch=tell,
        ).x


def reference(config, diffusion, predict, workdir) -> dict:
    """The full-precision record, and its samples on disk."""
    path = workdir / "variants" / "fp32" / "samples.npz"
    if not path.exists():
        plan = make_sampler(diffusion.source["schedule"], config.sampler.as_json())
        variables = {"params": diffusion.model.params, "quant": {}}
        x = rollout(config, diffusion, variables, plan, diffusion.model.module, "fp32")
        save_arrays(path, Samples(x))
    return {
        "name": "fp32",
        "w_bits": 32,
        "a_bits": 32,
        "stored_bytes": registry.size_in_bytes(diffusion.model.params),
        **report.reference_metrics(),
        "calibrate_s": 0.0,
        "reconstruct_s": 0.0,
        "compile_s": 0.0,
    }


@dataclasses.dataclass(frozen=True)
class Samples:
    """x: [N, H, W, C] float32."""

    x: np.ndarray


def measure(config, name, v, record, diffusion, held_out, workdir) -> dict:
    """Sample the variant's bundle and compare with full precision; read back if done already."""
    folder = workdir / "variants" / name
    path = folder / "metrics.json"
    if path.exists():
        return json.loads(path.read_text())
    loaded = load_for_sampling(folder / "bundle")
    samples = rollout(config, diffusion, loaded.variables, loaded.plan, loaded.module, name)
    save_arrays(folder / "samples.npz", Samples(samples))
    full = load_arrays(workdir / "variants" / "fp32" / "samples.npz", Samples).x
    classify = registry.classifier(config.classifier) if config.classifier else None
    with progress(f"{name}: teacher-forced error", len(held_out.t)) as tell:
        forced = variant.teacher_forced(
            registry.predictor(loaded.module),
            loaded.variables,
            held_out,
            lambda done, total: tell(done),
        )
    folded = loaded.variables
    temporal = variant.temporal(
        diffusion.model, folded["params"], folded["quant"], held_out.t, diffusion.null_class
    )
    result = {
        "name": name,
        "w_bits": v.w_bits or 32,
        "a_bits": v.a_bits or 32,
        "stored_bytes": stored_bytes(folder / "bundle").tensors,
        "eps_rel_mse": forced.rel_mse,
        "eps_rel_mse_by_step": forced.rel_mse_rows.tolist(),
        **variant.rollout(full, samples, classify and (lambda images: classify(images)[1])),
        "temporal_cosine": temporal.cosine,
        "temporal_cosine_by_step": temporal.cosine_rows.tolist(),
        "temporal_mismatch": temporal.mismatch,
        "timesteps": held_out.t.tolist(),
        **{key: record[key] for key in ("calibrate_s", "reconstruct_s", "compile_s")},
    }
    result = report.check_variants([result])[0]
    write_atomic(path, json.dumps(result, indent=1))
    return result


def draw(config, diffusion, calibration, records, workdir) -> dict[str, pathlib.Path]:
    """The four pictures, captioned."""
    folder = workdir / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    names = [record["name"] for record in records]
    steps = calibration.t
    images = {
        name: load_arrays(workdir / "variants" / name / "samples.npz", Samples).x[:20]
        for name in names
    }

    def curves(key):
        return {r["name"]: np.asarray(r.get(key) or np.zeros(len(steps))) for r in records}

    module = diffusion.model.module
    shape = (2, *diffusion.image_shape)
    sites = list_sites(
        module, np.zeros(shape, np.float32), np.zeros(2), labels(diffusion.null_class, range(2))
    )
    ranges = ranges_by_step(
        diffusion.model,
        every_step(jax.random.key(config.seed), calibration),
        steps,
        make_plan(sites, policy("official:qdiffusion", sites, None, 8)),
        config.activations.batch_size,
    )
    lo, hi = (np.stack([r[i] for r in ranges.values()], axis=1) for i in (0, 1))
    return {
        "Samples from the same noise": plots.plot_samples(images, folder / "samples.png", 4),
        "Teacher-forced error by timestep": plots.plot_error(
            steps, curves("eps_rel_mse_by_step"), folder / "error.png"
        ),
        "Activation range by timestep": plots.plot_ranges(
            steps, lo, hi, list(ranges), folder / "ranges.png"
        ),
        "Temporal features by timestep": plots.plot_temporal(
            steps, curves("temporal_cosine_by_step"), folder / "temporal.png"
        ),
    }


def provenance(config, diffusion, command: str) -> dict:
    """What made the report: command, commit, machine, versions, fingerprints."""
    root = pathlib.Path(__file__).resolve().parent
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
    )
    return {
        "command": command or "experiments.quantize.quantize(...)",
        "commit": git.stdout.strip() or "not a git checkout",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}",
        "jax_version": jax.__version__,
        "config_fingerprint": fingerprint(config),
        "source_checkpoint_hash": diffusion.source["sha256"],
    }


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    logging.set_verbosity(logging.INFO)
    enable_compile_cache(flags.FLAGS.compile_cache)
    command = shlex.join(["python", "-m", "experiments.quantize", *sys.argv[1:]])
    quantize(flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir), command)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file, path:arg.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Everything goes here; the same again resumes.")
    flags.DEFINE_string("compile_cache", None, "Folder for compiled programs.")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
