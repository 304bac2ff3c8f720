"""Samples from a quantized bundle in a new process.

    python -m experiments.sample --bundle=W/variants/tfmq_w4a8/bundle --out=/tmp/samples

Without further flags the samples are those of the run that wrote the bundle, bit for bit (same seed,
number, batch size and sampler, all in the bundle's manifest). `--execute` multiplies packed integers
instead of simulating them. Writes samples.npz and samples.png. The network of a pipeline draws latents: its
bundle says where the first stage and the text encoder are, `--model` where they are now.
"""

from __future__ import annotations

import hashlib
import pathlib

from absl import app, flags, logging

from experiments import command_line
from qdiff_jax.eval import plots
from qdiff_jax.eval.asked import Asked
from qdiff_jax.eval.samples import FIRST_INDEX, Samples, draw_samples
from qdiff_jax.methods.run import Loaded, load_for_sampling
from qdiff_jax.models import registry
from qdiff_jax.models.families import parse_model
from qdiff_jax.models.load_pipeline import Parts, load_pipeline
from qdiff_jax.models.pipeline import Pipeline
from qdiff_jax.observe.archive import save_arrays
from qdiff_jax.runtime.cache import enable_compile_cache
from qdiff_jax.runtime.progress import log_progress, progress


def sample_bundle(
    bundle: pathlib.Path,
    out: pathlib.Path,
    *,
    count: int | None = None,
    seed: int | None = None,
    execute: bool = False,
    model: str = "",
):
    """Sample a bundle and write `out/samples.npz` and `out/samples.png`; returns x_0 [N, H, W, C].

    Of the network of a pipeline these are latents, and the picture shows the decoded images. model: place of
    the pipeline's other parts, "" for that of the run."""
    loaded = load_for_sampling(bundle, execute)
    extra, scale = loaded.manifest["extra"], loaded.manifest["sampler"]["guidance_scale"]
    asked = asked_for(loaded, model)
    count = extra["samples"] if count is None else count
    with progress(f"sampling {bundle}", count) as tell:
        x = draw_samples(
            loaded.module,
            loaded.variables,
            loaded.plan,
            seed=extra["seed"] if seed is None else seed,
            count=count,
            batch_size=extra["batch"],
            shape=asked.diffusion.image_shape,
            classes=asked.diffusion.classes,
            guidance_scale=scale,
            y=asked.conditions(range(FIRST_INDEX, FIRST_INDEX + count)),
            null=asked.null(scale),
            hooks=loaded.hooks,
            on_batch=tell,
        )
    save_arrays(out / "samples.npz", Samples(x))
    images = asked.images(x, extra["batch"])
    plots.plot_samples({extra["method"]: images}, out / "samples.png", 10)
    logging.info("x_0 sha256 %s", hashlib.sha256(x.tobytes()).hexdigest())
    return x


def asked_for(loaded: Loaded, model: str) -> Asked:
    """The bundle's network with the other parts of its pipeline, and the prompts of the run that wrote it.

    Raises ValueError for parts that are not found, or a place given for a network that has none.
    """
    manifest = loaded.manifest
    source = {**manifest["source"], "schedule": manifest["schedule"]}
    network = parse_model(manifest["model"])
    diffusion = registry.assembled(network, loaded.variables["params"], source)
    held = manifest["extra"].get("pipeline")
    if held is None:
        if model:
            raise ValueError(f"--model={model}: this bundle draws images itself; leave it out.")
        return Asked(Pipeline(diffusion))
    pipeline = load_pipeline(model or held["model"], Parts(**held["parts"]), diffusion)
    return Asked(pipeline, tuple(held["prompts"]))


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    log_progress()
    enable_compile_cache(flags.FLAGS.compile_cache)
    sample_bundle(
        pathlib.Path(flags.FLAGS.bundle),
        pathlib.Path(flags.FLAGS.out),
        count=flags.FLAGS.count,
        seed=flags.FLAGS.seed,
        execute=flags.FLAGS.execute,
        model=flags.FLAGS.model,
    )


if __name__ == "__main__":
    flags.DEFINE_string("bundle", None, "Folder of the bundle.")
    flags.DEFINE_string("out", None, "Where samples.npz and samples.png go.")
    flags.DEFINE_integer(
        "count", None, "Number of samples; by default that of the run.", lower_bound=1
    )
    flags.DEFINE_integer("seed", None, "Seed of the noise; by default that of the run.")
    flags.DEFINE_bool("execute", False, "Multiply packed integers instead of simulating them.")
    flags.DEFINE_string("model", "", "Place of first stage and text encoder, if it has changed.")
    flags.DEFINE_string("compile_cache", None, "Folder for compiled programs.")
    flags.mark_flags_as_required(["bundle", "out"])
    command_line.run(main)
