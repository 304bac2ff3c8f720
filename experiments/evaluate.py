"""Judges a model or a quantized bundle by many samples, and sets evaluations side by side.

    python -m experiments.evaluate --config=configs/evaluate.py --workdir=W \
        --config.data.source=idx:/data/fashion_mnist
    python -m experiments.evaluate --compare=W1,W2,W3 --workdir=W
    python -m experiments.evaluate --config=configs/evaluate.py --statistics --workdir=W \
        --config.data.source=idx:/data/fashion_mnist

Samples are drawn in shards of uint8 images (`W/shards`): killed at any moment, the same command goes on
with the next shard, and more samples continue fewer. `metrics.json` has every value with its 95 % interval, the
floor of every distance, and the protocol; `report.html` needs no other file. `config.pictures` of the
samples are also written one by one (`W/pictures`) and as a contact sheet. `--compare` refuses
evaluations whose protocols differ, and says in what. `--statistics` writes `W/statistics.npz`: the
moments of the reference split alone, made in one pass, for `--config.data.published` of other evaluations.
"""

from __future__ import annotations

import pathlib
import time
from typing import Any

import jax
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import config_flags

from experiments import command_line
from experiments.evaluate_captions import Captions, load_captions, measure_captions
from experiments.evaluate_config import (
    FREE_TO_CHANGE,
    HALVES,
    EvaluateConfig,
    check_alike,
    protocol,
    read_config,
    read_result,
)
from experiments.evaluate_paired import load_partner, load_perceptual, measure_pairs
from experiments.evaluate_pictures import write_pictures
from experiments.evaluate_real import (
    Judge,
    Real,
    described,
    extrapolated,
    floors_of_halves,
    frechet_to,
    load_judge,
    load_real,
    real_images,
    with_classes,
    write_statistics,
)
from experiments.evaluate_report import metric_title, shown, write_comparison, write_report
from experiments.evaluate_subject import (
    Subject,
    check_unchanged,
    load_subject,
    sampler_of,
    subject_digest,
)
from qdiff_jax.config import claim_workdir
from qdiff_jax.diffusion.corrections import hooks_of
from qdiff_jax.diffusion.samplers import SamplerPlan
from qdiff_jax.eval.distribution import measure
from qdiff_jax.eval.shards import claim_shards, read_shards, sample_shards, shard_paths
from qdiff_jax.eval.tools import find_tool
from qdiff_jax.methods.run import make_sampler
from qdiff_jax.observe.archive import save_record
from qdiff_jax.quant.timed import check_schedule
from qdiff_jax.runtime.cache import enable_compile_cache
from qdiff_jax.runtime.mesh import data_mesh
from qdiff_jax.runtime.progress import log_progress, progress


def evaluate(config: Any, workdir: str | pathlib.Path) -> dict:
    """Run an evaluation to its end; returns what metrics.json holds.

    Raises ValueError for a config, model, image source, statistics file, partner or network that does not
    fit, before anything is drawn, and for samples that are not finite.
    """
    config = read_config(config)
    workdir = pathlib.Path(workdir)
    subject = load_subject(config)
    plan = make_sampler(subject.schedule, sampler_of(config, subject))
    hooks_of(subject.correction, plan)
    check_schedule(subject.variables["quant"], plan.timesteps)
    partner = load_partner(
        config, subject.schedule, subject.wanted, subject.origin.get("prompts_sha256")
    )
    perceptual = load_perceptual(config.lpips, subject.shape)
    judge = load_judge(config, subject.shape) if config.network else None
    captions = load_captions(
        config.clip, subject.classes, subject.shape, config.data.source, subject.prompts
    )
    claim_workdir(workdir, config, FREE_TO_CHANGE, write=False)
    check_unchanged(workdir, subject)
    real = None if judge is None else load_real(config, judge)
    claim_workdir(workdir, config, FREE_TO_CHANGE)
    claim_shards(workdir / "shards", subject_digest(subject.origin))
    paths = _draw(config, subject, plan, workdir)

    began = time.monotonic()
    metrics = {} if judge is None else _measure(config, subject, judge, real, paths)
    if partner is not None:
        metrics.update(measure_pairs(partner, paths, perceptual))
    if captions is not None:
        metrics["clip_score"] = _captioned(config, captions, paths)
    judged = protocol(
        config,
        "" if judge is None else judge.network.fingerprint,
        real.reference.digest if real and real.reference else "",
        subject.schedule,
    )
    further = {
        "prompts_sha256": subject.origin.get("prompts_sha256"),
        "published_sha256": real and real.published_sha256,
        "paired_sha256": partner and partner.sha256,
        "lpips": perceptual and perceptual.protocol,
        "clip": captions and captions.protocol,
    }
    judged |= {name: value for name, value in further.items() if value is not None}
    for name, entry in metrics.items():
        entry["name"] = metric_title(name, judged)
    logging.info("measured in %.0f s", time.monotonic() - began)
    result = {
        "subject": subject.origin,
        "protocol": judged,
        "metrics": metrics,
        "cost": {
            "sampling_seconds": sum(float(shard.seconds) for shard in read_shards(paths)),
            "samples": config.samples,
            "device": jax.devices()[0].device_kind,
        },
    }
    save_record(workdir / "metrics.json", result)
    write_report(result, next(read_shards(paths)), workdir)
    write_pictures(read_shards(paths), config.pictures, subject.prompts, workdir)
    return result


def _measure(config: EvaluateConfig, subject: Subject, judge: Judge, real: Real, paths) -> dict:
    mesh = _mesh()
    devices = 1 if mesh is None else mesh.size
    generated = described(
        judge,
        _stream(paths),
        tool=config.tool,
        count=config.samples,
        batch=devices * -(-64 // devices),
        mesh=mesh,
    )
    reference = real.reference and real.reference.described
    floor = real.floor and real.floor.described
    generated, reference, floor = with_classes(judge, subject.classes, generated, reference, floor)
    metrics = {}
    if reference is not None:
        metrics = measure(
            generated,
            reference,
            floor,
            tool=config.tool,
            k=config.neighbours,
            extrapolate=config.extrapolate and real.published is None,
            mesh=mesh,
        )
    if real.published is not None:
        spatial = not config.tool or find_tool(config.tool).spatial
        metrics.update(frechet_to(real.published, generated, floor, spatial))
        if config.extrapolate:
            metrics["frechet_infinity"] = extrapolated(
                real.published["pool"], generated, metrics["frechet"]
            )
    if reference is not None and config.data.floor == HALVES:
        floors_of_halves(metrics, reference, config.samples, config.tool)
    return metrics


def _captioned(config: EvaluateConfig, captions: Captions, paths) -> dict:
    real = None
    if config.data.source and captions.real:
        real = real_images(config, captions.judge, config.data.reference, None).described
    return measure_captions(captions, described(captions.judge, _stream(paths)), real)


def _stream(paths):
    return ((shard.images, shard.labels) for shard in read_shards(paths))


def _draw(config: EvaluateConfig, subject: Subject, plan: SamplerPlan, workdir: pathlib.Path):
    shards = workdir / "shards"
    files = shard_paths(shards, config.samples, config.shard)
    have = sum(path.exists() for path, _ in files) * config.shard
    with progress("sampling", config.samples, start=have) as tell:
        return sample_shards(
            subject.module,
            subject.variables,
            plan,
            shards,
            seed=config.seed,
            count=config.samples,
            size=config.shard,
            batch_size=config.batch,
            **subject.sampling(config.sampler.guidance_scale, config.batch),
            guidance_scale=config.sampler.guidance_scale,
            guided_channels=config.sampler.guided_channels,
            hooks=hooks_of(subject.correction, plan),
            on_shard=tell,
            mesh=_mesh(),
            uint8_rule=config.uint8,
        )


def _mesh() -> Mesh | None:
    """Every accelerator; several CPU devices share the same cores and gain nothing."""
    return None if jax.default_backend() == "cpu" else data_mesh()


def compare(workdirs: list[str], out: str | pathlib.Path) -> str:
    """A table of several evaluations as Markdown, also written to out/comparison.{md,html}.

    Raises ValueError if one is missing or they were not measured alike.
    """
    results = {str(path): read_result(path) for path in workdirs}
    check_alike([(name, result["protocol"]) for name, result in results.items()])
    return write_comparison(results, pathlib.Path(out))


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    log_progress()
    enable_compile_cache(flags.FLAGS.compile_cache)
    if flags.FLAGS.compare:
        print(compare(flags.FLAGS.compare, flags.FLAGS.workdir))
        return
    if flags.FLAGS.config is None:
        raise app.UsageError("give --config=configs/evaluate.py, or --compare=W1,W2.")
    if flags.FLAGS.statistics:
        path = pathlib.Path(flags.FLAGS.workdir) / "statistics.npz"
        found = write_statistics(read_config(flags.FLAGS.config), path)
        print(f"{path}: {found.origin.count} images of {found.origin.source}")
        return
    result = evaluate(flags.FLAGS.config, flags.FLAGS.workdir)
    for entry in result["metrics"].values():
        line = f"{entry['name']:48} {shown(entry['value']):>10}"
        line += f"  [{shown(entry['low'])}, {shown(entry['high'])}]"
        for key in ("floor", "real"):
            line += f"  {key} {shown(entry[key])}" if key in entry else ""
        print(line)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file, path:arg.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Shards, metrics.json and report.html go here.")
    flags.DEFINE_list("compare", None, "Workdirs of finished evaluations, to set side by side.")
    flags.DEFINE_bool(
        "statistics", False, "Only write the reference's moments, for data.published."
    )
    flags.DEFINE_string("compile_cache", None, "Folder for compiled programs.")
    flags.mark_flags_as_required(["workdir"])
    command_line.run(main)
