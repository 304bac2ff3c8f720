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
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console

from experiments import command_line
from experiments.prompts import prompts_digest
from experiments.quantize_config import FREE_TO_CHANGE, QuantizeConfig
from experiments.quantize_job import Job, prepare
from experiments.quantize_report import (
    commits,
    draw,
    is_measured,
    made_at,
    measure,
    provenance,
    reference,
)
from experiments.quantize_sets import sets_of, trajectories
from experiments.quantize_settings import settings_of
from qdiff_jax.config import claim_workdir
from qdiff_jax.diffusion.quantized_tensors import tensor_ranges
from qdiff_jax.eval import report
from qdiff_jax.methods.registry import (
    CalibrationSets,
    build,
)
from qdiff_jax.methods.run import run_method
from qdiff_jax.observe.archive import load_record, save_record
from qdiff_jax.observe.trajectory import Trajectory
from qdiff_jax.runtime.cache import compile_account, enable_compile_cache
from qdiff_jax.runtime.phases import follow, phases
from qdiff_jax.runtime.progress import log_progress


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


def phase_weights(config: QuantizeConfig, workdir: pathlib.Path) -> dict[str, float]:
    """Relative cost of each phase; nothing for a variant that an earlier run has finished."""
    weights = {"trajectories": 1.0, "fp32": 1.0}
    for name, v in config.variants.items():
        done = is_measured(workdir / "variants" / name)
        weights[name] = 0.0 if done else 1.0 + 6.0 * (v.method != "rtn")
    return weights


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
