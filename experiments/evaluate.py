"""Judges a model or a quantized bundle by many samples, and sets evaluations side by side.

    python -m experiments.evaluate --config=configs/evaluate.py --workdir=W \
        --config.data.source=idx:/data/fashion_mnist
    python -m experiments.evaluate --compare=W1,W2,W3 --workdir=W

Samples are drawn in shards of uint8 images (`W/shards`): killed at any moment, the same command goes on
with the next shard, and more samples continue fewer. `metrics.json` has every value with its 95 % interval, the
floor of every distance, and the protocol; `report.html` needs no other file. `--compare` refuses
evaluations whose protocols differ, and says in what.
"""

from __future__ import annotations

import hashlib
import math
import pathlib
import time
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from experiments.evaluate_config import (
    FREE_TO_CHANGE,
    EvaluateConfig,
    check_alike,
    protocol,
    read_config,
    read_result,
)
from experiments.evaluate_report import shown, write_comparison, write_report
from qdiff_jax.config import claim_workdir
from qdiff_jax.data.images import Images, load_images, to_unit_range
from qdiff_jax.diffusion.corrections import hooks_of
from qdiff_jax.diffusion.samplers import SamplerPlan
from qdiff_jax.eval import backends
from qdiff_jax.eval.described import Described, describe
from qdiff_jax.eval.distribution import check_protocol, measure
from qdiff_jax.eval.paired import paired_metrics
from qdiff_jax.eval.shards import read_shards, sample_shards, shard_paths
from qdiff_jax.methods.run import load_for_sampling, make_sampler
from qdiff_jax.models import registry
from qdiff_jax.observe.archive import save_record
from qdiff_jax.runtime.cache import enable_compile_cache
from qdiff_jax.runtime.mesh import data_mesh
from qdiff_jax.runtime.progress import log_progress, progress


class Subject(NamedTuple):
    """What is judged. variables: {"params", "quant"}; origin: JSON for the report. correction: of a bundle's
    sampling, and sampler: the one that it was made for, with "tensors" if it quantizes them too."""

    module: Any
    variables: dict
    model_config: dict
    schedule: dict
    origin: dict
    correction: Any = None
    sampler: dict | None = None


def load_subject(config: EvaluateConfig) -> Subject:
    """The model, or the bundle where one is named. Raises ValueError or BundleError as they do."""
    if config.bundle:
        loaded = load_for_sampling(pathlib.Path(config.bundle))
        manifest = loaded.manifest
        origin = {"bundle": config.bundle, **manifest["source"], **manifest["extra"]}
        return Subject(
            loaded.module,
            loaded.variables,
            manifest["model"],
            manifest["schedule"],
            origin,
            loaded.correction,
            manifest["sampler"],
        )
    diffusion = registry.load(config.model)
    return Subject(
        diffusion.model.module,
        {"params": diffusion.model.params, "quant": {}},
        diffusion.config,
        diffusion.source["schedule"],
        {"name": diffusion.source["name"], "sha256": diffusion.source["sha256"]},
    )


def _sampler_of(config: EvaluateConfig, subject: Subject) -> dict:
    """The config's sampler, with the quantized tensors of the bundle's. Raises ValueError where a bundle's
    measured tables belong to another one."""
    asked, made_for = config.sampler.as_json(), subject.sampler or {}
    tensors = made_for.get("tensors")
    if config.sampler.tensor_bits and (tensors or {}).get("bits") != config.sampler.tensor_bits:
        raise ValueError(
            f"config.sampler.tensor_bits is {config.sampler.tensor_bits}, and what is judged holds no "
            "ranges for that: they come with a bundle of experiments.quantize."
        )
    scale = made_for.get("guidance_scale")
    if subject.correction is not None and scale != asked["guidance_scale"]:
        raise ValueError(
            f"the bundle corrects estimates at guidance {scale:g}, and the config samples at "
            f"{asked['guidance_scale']:g}: set config.sampler.guidance_scale to the bundle's, or "
            "calibrate one at the config's."
        )
    if tensors is None:
        return asked
    other = [name for name, value in asked.items() if made_for.get(name) != value]
    if other:
        raise ValueError(
            f"the bundle quantizes the sampler's own tensors by ranges of another sampler "
            f"({', '.join(f'{n}: {made_for.get(n)!r}' for n in other)}): evaluate it with that one."
        )
    return {**asked, "tensors": tensors}


def evaluate(config: Any, workdir: str | pathlib.Path) -> dict:
    """Run an evaluation to its end; returns what metrics.json holds.

    Raises ValueError for a config, model or image source that does not fit, before anything is drawn.
    """
    config = read_config(config)
    workdir = pathlib.Path(workdir)
    subject = load_subject(config)
    plan = make_sampler(subject.schedule, _sampler_of(config, subject))
    hooks_of(subject.correction, plan)
    reference = _real(config, config.data.reference, subject)
    floor = _real(config, config.data.floor, subject) if config.data.floor else None
    if floor is not None:
        # As many real images as are generated: a distance is biased by their number.
        floor = Images(*(x[: config.samples] for x in floor[:2]), floor.num_classes)
    network = backends.feature_network(config.network, config.network_weights or None)
    prepare = backends.preparation(network, config.tool)
    pooled = jax.eval_shape(network.apply, prepare(reference.images[:1]))["pool"]
    check_protocol(
        config.tool,
        config.neighbours,
        config.samples,
        len(reference.images),
        extrapolated_dim=pooled.shape[1] if config.extrapolate else None,
    )
    claim_workdir(workdir, config, FREE_TO_CHANGE)
    paths = _draw(config, subject, plan, workdir)

    def described(pairs, **options) -> Described:
        return describe(network.apply, prepare, pairs, **options)

    def shards():
        return ((shard.images, shard.labels) for shard in read_shards(paths))

    began = time.monotonic()
    generated = described(shards(), tool=config.tool, count=config.samples)
    seen = [described([(images.images, images.labels)]) for images in (reference, floor) if images]
    metrics = measure(
        generated,
        seen[0],
        seen[1] if floor else None,
        tool=config.tool,
        k=config.neighbours,
        extrapolate=config.extrapolate,
    )
    if config.paired:
        metrics.update(_paired(config, workdir, paths))
    logging.info("measured in %.0f s", time.monotonic() - began)
    seconds = sum(float(shard.seconds) for shard in read_shards(paths))
    result = {
        "subject": subject.origin,
        "protocol": protocol(
            config,
            network.fingerprint,
            hashlib.sha256(reference.images.tobytes()).hexdigest(),
            subject.schedule,
        ),
        "metrics": metrics,
        "cost": {
            "sampling_seconds": seconds,
            "samples": config.samples,
            "device": jax.devices()[0].device_kind,
        },
    }
    save_record(workdir / "metrics.json", result)
    first = next(read_shards(paths))
    write_report(result, first, workdir)
    return result


def _draw(config: EvaluateConfig, subject: Subject, plan: SamplerPlan, workdir: pathlib.Path):
    model = subject.model_config
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
            shape=(model["resolution"], model["resolution"], model["in_channels"]),
            classes=model.get("num_classes"),
            guidance_scale=config.sampler.guidance_scale,
            hooks=hooks_of(subject.correction, plan),
            on_shard=tell,
            # Several CPU devices share the same cores and gain nothing.
            mesh=None if jax.default_backend() == "cpu" else data_mesh(),
        )


def _real(config: EvaluateConfig, split: str, subject: Subject) -> Images:
    data = config.data
    images = load_images(data.source, split, pad_to=data.pad_to or None, limit=data.limit or None)
    model = subject.model_config
    shape = (model["resolution"], model["resolution"], model["in_channels"])
    if images.images.shape[1:] != shape:
        raise ValueError(
            f"images of {data.source} are {images.images.shape[1:]} and the model draws {shape}; set "
            "config.data.pad_to or another source."
        )
    return images


def _paired(config: EvaluateConfig, workdir: pathlib.Path, paths) -> dict:
    """Distances to the samples of another evaluation, image by image, from the same noise."""
    other = pathlib.Path(config.paired)
    theirs = [other / "shards" / path.name for path in paths]
    missing = [path for path in theirs if not path.exists()]
    if missing:
        raise ValueError(
            f"config.paired={config.paired}: {missing[0]} is missing; evaluate that model with "
            f"samples={config.samples} and shard={config.shard} first."
        )
    pairs = (
        (to_unit_range(one.images), to_unit_range(two.images))
        for one, two in zip(read_shards(theirs), read_shards(paths), strict=True)
    )

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None  # equal pairs: infinitely many dB

    return {
        name: {"value": finite(f.estimate), "low": finite(f.low), "high": finite(f.high)}
        for name, f in paired_metrics(pairs).items()
    }


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
    result = evaluate(flags.FLAGS.config, flags.FLAGS.workdir)
    for name, entry in result["metrics"].items():
        print(
            f"{name:16} {shown(entry['value']):>10}  [{shown(entry['low'])}, {shown(entry['high'])}]",
            end="",
        )
        print(f"  floor {shown(entry['floor'])}" if "floor" in entry else "")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file, path:arg.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Shards, metrics.json and report.html go here.")
    flags.DEFINE_list("compare", None, "Workdirs of finished evaluations, to set side by side.")
    flags.DEFINE_string("compile_cache", None, "Folder for compiled programs.")
    flags.mark_flags_as_required(["workdir"])
    app.run(main)
