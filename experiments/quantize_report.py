"""What `experiments.quantize` measures of each variant, the pictures, and where the figures come from."""

from __future__ import annotations

import functools
import os
import pathlib
import platform
import subprocess

import jax
import numpy as np
from absl import logging

from experiments.quantize_config import QuantizeConfig, VariantConfig
from qdiff_jax.config import fingerprint
from qdiff_jax.diffusion.hooks import IDENTITY, Hooks
from qdiff_jax.eval import plots, report, variant
from qdiff_jax.eval.asked import Asked
from qdiff_jax.eval.samples import FIRST_INDEX, Samples, draw_samples
from qdiff_jax.export.bundle import stored_bytes
from qdiff_jax.methods.run import Loaded, is_modulation_folded, load_for_sampling, make_sampler
from qdiff_jax.models import registry
from qdiff_jax.named_policies import policy
from qdiff_jax.observe.archive import load_arrays, load_record, save_arrays, save_record
from qdiff_jax.observe.selectors import every_step
from qdiff_jax.observe.trajectory import Trajectory
from qdiff_jax.policy import make_plan
from qdiff_jax.runtime.progress import progress
from qdiff_jax.stages.calibrate import ranges_by_step

# Images of each variant in the picture: every class of a class-conditional model twice.
_SHOWN = 20


def is_measured(folder: pathlib.Path) -> bool:
    """Whether `measure` has nothing left to do for the variant of this folder."""
    return all((folder / name).exists() for name in ("metrics.json", "samples.npz", "bundle"))


def rollout(
    config: QuantizeConfig,
    asked: Asked,
    variables,
    plan,
    module,
    name: str,
    hooks: Hooks = IDENTITY,
) -> np.ndarray:
    """x_0 of all evaluation samples of a variant, telling how far it is."""
    count, scale = config.evaluation.samples, config.sampler.guidance_scale
    with progress(f"{name}: sampling", count) as tell:
        return draw_samples(
            module,
            variables,
            plan,
            seed=config.seed,
            count=count,
            batch_size=config.evaluation.batch,
            shape=asked.diffusion.image_shape,
            classes=asked.diffusion.classes,
            guidance_scale=scale,
            y=asked.conditions(range(FIRST_INDEX, FIRST_INDEX + count)),
            null=asked.null(scale),
            hooks=hooks,
            on_batch=tell,
        )


def reference(config: QuantizeConfig, asked: Asked, workdir: pathlib.Path) -> dict:
    """The full-precision record, and its samples on disk."""
    diffusion = asked.diffusion
    path = workdir / "variants" / "fp32" / "samples.npz"
    if not path.exists():
        plan = make_sampler(diffusion.source["schedule"], config.sampler.as_json())
        variables = {"params": diffusion.model.params, "quant": {}}
        x = rollout(config, asked, variables, plan, diffusion.model.module, "fp32")
        save_arrays(path, Samples(x))
    return full_precision(diffusion)


def full_precision(diffusion: registry.DiffusionModel) -> dict:
    """The record of a model beside its quantized variants."""
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


def measure(
    config: QuantizeConfig,
    name: str,
    v: VariantConfig,
    record: dict,
    asked: Asked,
    held_out: Trajectory,
    workdir: pathlib.Path,
) -> dict:
    """Sample the variant's bundle and compare with full precision; read back if done already.

    record: of `methods.run.run_method`. Leaves samples.npz and metrics.json in the variant's folder. Samples
    are kept as the network draws them, and compared as images.
    """
    folder = workdir / "variants" / name
    if is_measured(folder):
        return load_record(folder / "metrics.json")
    loaded = load_for_sampling(folder / "bundle")
    samples = rollout(
        config, asked, loaded.variables, loaded.plan, loaded.module, name, loaded.hooks
    )
    save_arrays(folder / "samples.npz", Samples(samples))
    full = load_arrays(workdir / "variants" / "fp32" / "samples.npz", Samples).x
    full, samples = (asked.images(x, config.evaluation.batch) for x in (full, samples))
    classify = registry.classifier(config.classifier) if config.classifier else None
    with progress(f"{name}: teacher-forced error", len(held_out.t)) as tell:
        forced = variant.teacher_forced(
            registry.predictor(loaded.module),
            loaded.variables,
            held_out,
            lambda done, total: tell(done),
            hooks=loaded.hooks,
        )
    result = {
        "name": name,
        "w_bits": v.w_bits or 32,
        "a_bits": v.a_bits or 32,
        "stored_bytes": stored_bytes(folder / "bundle").tensors,
        "eps_rel_mse": forced.rel_mse,
        "eps_rel_mse_by_step": forced.rel_mse_rows.tolist(),
        **variant.rollout(full, samples, classify and (lambda images: classify(images)[1])),
        **_temporal(loaded, asked, held_out.t),
        "timesteps": held_out.t.tolist(),
        **{key: record[key] for key in ("calibrate_s", "reconstruct_s", "compile_s")},
        "commit": commit(),
    }
    result = report.check_variants([result])[0]
    save_record(folder / "metrics.json", result)
    return result


def _temporal(loaded: Loaded, asked: Asked, timesteps: np.ndarray) -> dict:
    """The agreement of the temporal features; nothing of a variant whose factors are folded into them."""
    if is_modulation_folded(loaded.manifest):
        logging.info("temporal features: not compared, factors of channels are folded into them.")
        rows = [None] * len(timesteps)
        return {
            "temporal_cosine": None,
            "temporal_cosine_by_step": rows,
            "temporal_mismatch": None,
        }
    found = variant.temporal(
        asked.diffusion.model,
        loaded.variables["params"],
        loaded.variables["quant"],
        timesteps,
        asked.conditions(range(1)) if asked.prompts else asked.diffusion.feature_class,
    )
    return {
        "temporal_cosine": found.cosine,
        "temporal_cosine_by_step": found.cosine_rows.tolist(),
        "temporal_mismatch": found.mismatch,
    }


def draw(
    config: QuantizeConfig,
    asked: Asked,
    sites,
    calibration: Trajectory,
    records: list[dict],
    workdir: pathlib.Path,
) -> dict[str, pathlib.Path]:
    """The four pictures, captioned."""
    folder = workdir / "pictures"
    steps = calibration.t
    images = {
        r["name"]: asked.images(
            load_arrays(workdir / "variants" / r["name"] / "samples.npz", Samples).x[:_SHOWN],
            config.evaluation.batch,
        )
        for r in records
    }

    def curves(key):
        # float: a value that is not finite is stored as null, and leaves a gap in the picture.
        zeros = np.zeros(len(steps))
        return {r["name"]: np.asarray(r.get(key, zeros), np.float64) for r in records}

    ranges = ranges_by_step(
        asked.diffusion.model,
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


def provenance(config: QuantizeConfig, diffusion, command: str) -> dict:
    """What made the report: command, commit, machine, versions, fingerprints."""
    return {
        "command": command or "experiments.quantize.quantize(...)",
        **made_at(),
        "config_fingerprint": fingerprint(config),
        "source_checkpoint_hash": diffusion.source["sha256"],
    }


def commits(folder: pathlib.Path) -> str:
    """Where the figures of a variant's folder come from, as its own records say, whenever they are read."""
    places = {"quantized": "quantize.json", "measured": "metrics.json"}
    found = {
        what: load_record(folder / name).get("commit", "a commit not recorded")
        for what, name in places.items()
    }
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return ", ".join(f"{what} at {commit}" for what, commit in found.items())


def made_at() -> dict[str, str]:
    """The commit, the machine and the version of JAX, for whatever records figures."""
    return {
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}",
        "jax_version": jax.__version__,
    }


@functools.cache  # what runs is what was there when it began
def commit() -> str:
    """The code's, with -dirty behind it where files have changed; "not a git checkout" where there is none."""
    root = pathlib.Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed, which must not cost a finished run its report
        found = ""
    return found or "not a git checkout"
