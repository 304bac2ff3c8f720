"""What methods of `experiments.quantize` are calibrated on: recorded trajectories, sets, weights of steps."""

from __future__ import annotations

import pathlib

import jax
import numpy as np

from experiments.quantize_config import DRAWING, QuantizeConfig
from experiments.quantize_job import Job, sampling_of
from experiments.quantize_report import (
    made_at,
)
from qdiff_jax.eval.samples import FIRST_HELD_OUT, noise_key
from qdiff_jax.methods.registry import (
    CalibrationSets,
)
from qdiff_jax.models import registry
from qdiff_jax.observe.archive import load_arrays, load_record, save_arrays, save_record
from qdiff_jax.observe.quantization_noise import Paired, paired
from qdiff_jax.observe.selectors import every_step, select_calibration
from qdiff_jax.observe.trajectory import Trajectory, record_trajectories
from qdiff_jax.runtime.progress import progress
from qdiff_jax.runtime.seconds import stopwatch
from qdiff_jax.stages.row_weights import eps_importance, rollout_sensitivity


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
