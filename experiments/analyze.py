"""Analyses of a diffusion model under quantization, each with its numbers and a picture.

    python -m experiments.analyze --what=ranges --model=unet_fashion --out=W
    python -m experiments.analyze --what=all --model=unet_fashion --bits=w8a8,w4a8 --out=W

Writes `<what>.json`, `<what>.png` and `<what>.pdf` (one column of a paper wide) and prints the verdict.
Variants are made here by round-to-nearest at --bits, finer first, or read from --bundle. An analysis that
has no meaning on the model says so and exits with code 2; within `all` it is skipped. Trajectories are those
of DDIM (or of the bundle's sampler) with the model's labels as they are, without guidance.
"""

from __future__ import annotations

import functools
import logging as python_logging
import pathlib
import sys

import jax
from absl import app, flags, logging

from qdiff_jax.analysis.column import save
from qdiff_jax.analysis.registry import ANALYSES, Given, names_of
from qdiff_jax.analysis.subject import (
    NotApplicable,
    Subject,
    make_subject,
    parse_bits,
    round_to_nearest,
    to_json,
)
from qdiff_jax.methods.run import load_for_sampling, make_sampler
from qdiff_jax.models import registry
from qdiff_jax.observe.archive import save_record
from qdiff_jax.runtime.cache import enable_compile_cache
from qdiff_jax.runtime.progress import log_progress, progress


def prepare(
    model: str,
    *,
    bits: str = "w8a8,w4a8",
    bundle: pathlib.Path | None = None,
    classifier: str = "classifier_fashion",
    steps: int = 20,
    samples: int = 64,
    spacing: str = "quad",
    seed: int = 0,
    batch: int = 32,
) -> Given:
    """Everything the flags can get wrong, then the trajectories.

    classifier: by name or path; "" for none. Raises ValueError for unknown models, bits or spacings, and for
    a bundle of another model.
    """
    diffusion = registry.load(model)
    widths = tuple(bits.split(","))
    for width in widths:
        parse_bits(width)
    classify = _classifier(classifier, diffusion) if classifier else None
    ready: dict[str, dict] = {}
    if bundle is not None:
        loaded = load_for_sampling(bundle)
        made_from = loaded.manifest["source"]
        if made_from["sha256"] != diffusion.source["sha256"]:
            raise ValueError(
                f"{bundle} was made from another model than {model!r}, from {made_from['name']!r}; "
                "give that one as --model."
            )
        ready = {loaded.manifest["extra"]["method"]: loaded.variables}

    def ddim(eta: float):
        config = {"name": "ddim", "spacing": spacing, "steps": steps, "options": {"eta": eta}}
        return make_sampler(diffusion.source["schedule"], config)

    def recorded(sampler, what: str) -> Subject:
        calibration = min(samples, 16)
        with progress(f"recording {what}", samples + calibration) as tell:
            return make_subject(
                diffusion,
                sampler,
                samples=samples,
                calibration=calibration,
                seed=seed,
                batch=batch,
                on_batch=tell,
            )

    def rounded(subject: Subject) -> dict[str, dict]:
        made = {}
        for width in widths:
            logging.info("round to nearest at %s", width)
            made[width] = round_to_nearest(subject, width)
        return made

    subject = recorded(loaded.plan if ready else ddim(0.0), "trajectories")

    @functools.cache
    def variants() -> dict[str, dict]:
        return ready or rounded(subject)

    def samplers():
        if ready or len(widths) != 2:
            raise NotApplicable(
                "beneficial noise compares two variants, finer bits first: give two --bits, as in "
                "w8a8,w4a8, and no bundle."
            )
        stochastic = recorded(ddim(1.0), "ancestral trajectories")
        return {"ode": (subject, variants()), "sde": (stochastic, rounded(stochastic))}

    return Given(subject, variants, samplers, widths, classify)


def _classifier(name: str, diffusion: registry.DiffusionModel):
    classify = registry.classifier(name)
    try:
        jax.eval_shape(classify, jax.ShapeDtypeStruct((1, *diffusion.image_shape), "float32"))
    except ValueError as error:
        logging.info("no classifier: %s Only distances to full precision are compared.", error)
        return None
    return classify


def analyze(name: str, given: Given, out: pathlib.Path) -> dict:
    """One analysis: writes its three files, prints and returns the verdict. Raises NotApplicable."""
    analysis = ANALYSES[name]
    with progress(f"{name} (percent)", 100) as tell:
        result = analysis.run(given, lambda done, total: tell(100 * done // total))
    record = to_json(result)
    save_record(out / f"{name}.json", record)
    save(analysis.draw(result), out / name)
    for key, value in record["verdict"].items():
        print(
            f"{name}: {key} = {value:.4g}"
            if isinstance(value, float)
            else f"{name}: {key} = {value}"
        )
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
    python_logging.getLogger("fontTools").setLevel(python_logging.WARNING)  # every glyph of a PDF
    enable_compile_cache(values.compile_cache)
    names = names_of(values.what)
    given = prepare(
        values.model,
        bits=values.bits,
        bundle=None if values.bundle is None else pathlib.Path(values.bundle),
        classifier=values.classifier,
        steps=values.steps,
        samples=values.samples,
        spacing=values.spacing,
        seed=values.seed,
        batch=values.batch,
    )
    run(names, given, pathlib.Path(values.out), asked=values.what != "all")


if __name__ == "__main__":
    flags.DEFINE_string("what", None, f"One of {', '.join(ANALYSES)}, or all.")
    flags.DEFINE_string("model", "unet_fashion", "A shipped model, or a .safetensors path.")
    flags.DEFINE_string("out", None, "Folder of the numbers and pictures.")
    flags.DEFINE_string("bits", "w8a8,w4a8", "Variants by round-to-nearest, finer first.")
    flags.DEFINE_string("bundle", None, "Analyse this bundle instead of variants at --bits.")
    flags.DEFINE_string("classifier", "classifier_fashion", "Judges images; empty for none.")
    flags.DEFINE_integer("steps", 20, "Steps of the sampler.", lower_bound=2)
    flags.DEFINE_integer("samples", 64, "Trajectories to measure on.", lower_bound=2)
    flags.DEFINE_integer("batch", 32, "Samples at a time while sampling.", lower_bound=1)
    flags.DEFINE_string("spacing", "quad", "Grid of the sampler's timesteps.")
    flags.DEFINE_integer("seed", 0, "Of the noise.")
    flags.DEFINE_string("compile_cache", None, "Folder for compiled programs.")
    flags.mark_flags_as_required(["what", "out"])
    app.run(main)
