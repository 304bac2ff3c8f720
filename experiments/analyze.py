"""Analyses of a diffusion model under quantization, each with its numbers and a picture.

    python -m experiments.analyze --what=ranges --model=unet_fashion --out=W
    python -m experiments.analyze --what=all --model=unet_fashion --bits=w8a8,w4a8 --out=W

Writes `<what>.json`, `<what>.png` and `<what>.pdf` (one column of a paper wide) and prints the verdict.
Variants are made here by round-to-nearest at --bits, or read from --bundle. An analysis that has no
meaning on the model says so and exits with code 2; within `all` it is skipped. Trajectories are those
of DDIM with the model's labels as they are, without guidance.
"""

from __future__ import annotations

import difflib
import functools
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from absl import app, flags, logging
from matplotlib.figure import Figure

from qdiff_jax.analysis import figures
from qdiff_jax.analysis.column import save
from qdiff_jax.analysis.outliers import channel_outliers
from qdiff_jax.analysis.ranges import activation_ranges
from qdiff_jax.analysis.skips import skip_concatenations
from qdiff_jax.analysis.subject import (
    NotApplicable,
    Subject,
    make_subject,
    parse_bits,
    round_to_nearest,
    to_json,
)
from qdiff_jax.analysis.temporal import grid_for, temporal_information
from qdiff_jax.methods.run import load_for_sampling, make_sampler
from qdiff_jax.models import registry
from qdiff_jax.observe.archive import save_record
from qdiff_jax.runtime.cache import enable_compile_cache
from qdiff_jax.runtime.progress import log_progress, progress


class Given(NamedTuple):
    """What an analysis may ask for; the functions are called when they are needed, once.

    variants: () -> {name: variables}, in the order of --bits.
    """

    subject: Subject
    variants: Callable[[], Mapping[str, dict]]


class Analysis(NamedTuple):
    """run(given, on_step) -> a NamedTuple with `verdict`; draw(result) -> its picture."""

    run: Callable[[Given, Callable], Any]
    draw: Callable[[Any], Figure]


def _temporal(given: Given, on_step: Callable) -> Any:
    variants = given.variants()
    grid = grid_for(given.subject, variants)
    return temporal_information(given.subject, variants, grid)


ANALYSES: dict[str, Analysis] = {
    "ranges": Analysis(
        lambda given, on_step: activation_ranges(given.subject, on_step), figures.ranges_figure
    ),
    "skips": Analysis(
        lambda given, on_step: skip_concatenations(given.subject, on_step=on_step),
        figures.skips_figure,
    ),
    "temporal": Analysis(_temporal, figures.temporal_figure),
    "outliers": Analysis(
        lambda given, on_step: channel_outliers(given.subject, on_step), figures.outliers_figure
    ),
}


def names_of(what: str) -> list[str]:
    """The analyses that --what asks for. Raises ValueError for an unknown one, with those there are."""
    if what == "all":
        return list(ANALYSES)
    if what not in ANALYSES:
        near = difflib.get_close_matches(what, ANALYSES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Analysis {what!r} is unknown; there are {[*ANALYSES, 'all']}.{hint}")
    return [what]


def prepare(
    model: str,
    *,
    bits: str,
    bundle: pathlib.Path | None,
    steps: int,
    samples: int,
    spacing: str,
    seed: int,
    batch: int,
) -> Given:
    """Everything the flags can get wrong, then the trajectories.

    Raises ValueError for unknown models, bits or spacings, and for a bundle of another model.
    """
    diffusion = registry.load(model)
    widths = bits.split(",")
    for width in widths:
        parse_bits(width)
    if bundle is None:
        config = {"name": "ddim", "spacing": spacing, "steps": steps}
        sampler = make_sampler(diffusion.source["schedule"], config)
        ready: dict[str, dict] = {}
    else:
        loaded = load_for_sampling(bundle)
        made_from = loaded.manifest["source"]["sha256"]
        if made_from != diffusion.source["sha256"]:
            raise ValueError(
                f"{bundle} was made from another model than {model!r} "
                f"({loaded.manifest['source']['name']!r}); give that one as --model."
            )
        sampler = loaded.plan
        ready = {loaded.manifest["extra"]["method"]: loaded.variables}
    calibration = min(samples, 16)
    with progress("recording trajectories", samples + calibration) as tell:
        subject = make_subject(
            diffusion,
            sampler,
            samples=samples,
            calibration=calibration,
            seed=seed,
            batch=batch,
            on_batch=tell,
        )

    @functools.cache
    def variants() -> dict[str, dict]:
        if ready:
            return ready
        made = {}
        for width in widths:
            logging.info("round to nearest at %s", width)
            made[width] = round_to_nearest(subject, width)
        return made

    return Given(subject, variants)


def analyze(name: str, given: Given, out: pathlib.Path) -> dict:
    """One analysis: writes its three files and returns the verdict. Raises NotApplicable."""
    analysis = ANALYSES[name]
    with progress(name, len(given.subject.trajectory.t)) as tell:
        result = analysis.run(given, lambda done, total: tell(done))
    record = to_json(result)
    save_record(out / f"{name}.json", record)
    save(analysis.draw(result), out / name)
    for key, value in record["verdict"].items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"{name}: {key} = {shown}")
    return record["verdict"]


def run(names: list[str], given: Given, out: pathlib.Path, asked: bool) -> None:
    """The analyses one after the other. One that does not apply to the model is skipped with a line, or
    ends the process with code 2 if it was asked for by name."""
    for name in names:
        try:
            analyze(name, given, out)
        except NotApplicable as error:
            if asked:
                print(f"{name}: {error}", file=sys.stderr)
                sys.exit(2)
            print(f"{name}: skipped, {error}")


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    values = flags.FLAGS
    log_progress()
    enable_compile_cache(values.compile_cache)
    out = pathlib.Path(values.out)
    names = names_of(values.what)
    given = prepare(
        values.model,
        bits=values.bits,
        bundle=None if values.bundle is None else pathlib.Path(values.bundle),
        steps=values.steps,
        samples=values.samples,
        spacing=values.spacing,
        seed=values.seed,
        batch=values.batch,
    )
    run(names, given, out, asked=values.what != "all")


if __name__ == "__main__":
    flags.DEFINE_string("what", None, f"One of {', '.join(ANALYSES)}, or all.")
    flags.DEFINE_string("model", "unet_fashion", "A shipped model, or a .safetensors path.")
    flags.DEFINE_string("out", None, "Folder of the numbers and pictures.")
    flags.DEFINE_string("bits", "w8a8,w4a8", "Variants by round-to-nearest.")
    flags.DEFINE_string("bundle", None, "Analyse this bundle instead of variants at --bits.")
    flags.DEFINE_integer("steps", 20, "Steps of the sampler.", lower_bound=2)
    flags.DEFINE_integer("samples", 64, "Trajectories to measure on.", lower_bound=2)
    flags.DEFINE_integer("batch", 32, "Samples at a time.", lower_bound=1)
    flags.DEFINE_string("spacing", "quad", "Grid of the sampler's timesteps.")
    flags.DEFINE_integer("seed", 0, "Of the noise.")
    flags.DEFINE_string("compile_cache", None, "Folder for compiled programs.")
    flags.mark_flags_as_required(["what", "out"])
    app.run(main)
