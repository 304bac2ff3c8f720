"""Analyses of a diffusion model under quantization, each with its numbers and a picture.

    python -m experiments.analyze --what=ranges --model=unet_fashion --out=W
    python -m experiments.analyze --what=all --model=unet_fashion --bits=w8a8,w4a8 --out=W
    python -m experiments.analyze --what=beneficial --data=idx:DIR --pairs=1000 --out=W

Writes `<what>.json`, `<what>.png` and `<what>.pdf` (one column of a paper wide) and prints the verdict.
Variants are made here by round-to-nearest at --bits, finer first, or read from --bundle. An analysis that
has no meaning on the model says so and exits with code 2; among several (`--what=noise,taylor`, or `all`) it
is skipped. Trajectories are those of DDIM (or of the bundle's sampler) with the model's labels as they are,
without guidance. Several analyses leave out those that the same settings have written to --out before, so that
a stopped run goes on. Whether fewer bits give
images nearer to real ones (`beneficial`) can only be said with --data.
"""

from __future__ import annotations

import functools
import pathlib
import sys

import jax
import numpy as np
from absl import app, flags, logging

from experiments import command_line
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
from qdiff_jax.data.images import load_images, to_unit_range
from qdiff_jax.eval.moments import Moments, moments_of
from qdiff_jax.methods.run import (
    check_comparable,
    load_for_sampling,
    make_sampler,
    unguided_sampler,
)
from qdiff_jax.models import registry
from qdiff_jax.observe.archive import load_record, save_record
from qdiff_jax.runtime.cache import enable_compile_cache
from qdiff_jax.runtime.progress import log_progress, progress

_REAL_BATCH = 500


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
    data: str = "",
    pairs: int = 0,
) -> Given:
    """Everything the flags can get wrong, then the trajectories.

    classifier: by name or path; "" for none. data: real images, as `data.images.load_images` takes them
    (their test split, padded to the model's size); "" for none. pairs: of beneficial noise, by default as many
    as `samples`. Raises ValueError for unknown models, bits or spacings, a bundle of another model, and
    real images that no classifier compares or too few pairs for it.
    """
    diffusion = registry.load(model)
    widths = tuple(bits.split(","))
    for width in widths:
        parse_bits(width)
    classify = _classifier(classifier, diffusion) if classifier else None
    if pairs == 1:
        raise ValueError("one pair shows no scatter; give --pairs of at least 2.")
    calibration = min(samples, 16)
    seeds = range(calibration, calibration + (pairs or samples))
    real = _real(data, diffusion, classify, len(seeds)) if data else None
    ready: dict[str, dict] = {}
    hooks, own_samplers = {}, {}
    if bundle is not None:
        loaded = load_for_sampling(bundle)
        made_from = loaded.manifest["source"]
        if made_from["sha256"] != diffusion.source["sha256"]:
            raise ValueError(
                f"{bundle} was made from another model than {model!r}, from {made_from['name']!r}; "
                "give that one as --model."
            )
        check_comparable(loaded.manifest, str(bundle))
        method = loaded.manifest["extra"]["method"]
        ready, hooks, own_samplers = (
            {method: held} for held in (loaded.variables, loaded.hooks, loaded.plan)
        )
        sampled = unguided_sampler(loaded, str(bundle))

    deterministic = {"name": "ddim", "spacing": spacing, "steps": steps, "options": {"eta": 0.0}}

    def ddim(eta: float):
        return make_sampler(diffusion.source["schedule"], deterministic | {"options": {"eta": eta}})

    def recorded(sampler, what: str) -> Subject:
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

    subject = recorded(sampled if ready else ddim(0.0), "trajectories")

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

    settings = {
        "source": {key: diffusion.source[key] for key in ("name", "sha256")},
        "bits": None if ready else bits,
        "bundle_sha256": loaded.manifest["sha256"] if ready else None,
        "sampler": loaded.manifest["sampler"] if ready else deterministic,
        "samples": samples,
        "calibration": calibration,
        "seed": seed,
        "classifier": classifier if classify else None,
        "data": data or None,
        "pairs": len(seeds),
    }
    if ready and loaded.correction is not None:
        settings["corrected"] = True
    return Given(
        subject,
        variants,
        samplers,
        widths,
        classify,
        real,
        seeds,
        settings,
        hooks,
        own_samplers,
    )


def _real(source: str, diffusion: registry.DiffusionModel, classify, pairs: int) -> Moments:
    """Moments of the features of the source's test images."""
    if classify is None:
        raise ValueError(
            f"--data={source} needs a classifier that takes the model's images {diffusion.image_shape}; "
            "name one by --classifier, or leave --data out."
        )
    images = load_images(source, "test", pad_to=diffusion.image_shape[0]).images
    if images.shape[1:] != diffusion.image_shape:
        raise ValueError(
            f"--data={source} holds images {images.shape[1:]} and the model draws "
            f"{diffusion.image_shape}; use the set that it was made for."
        )
    parts = (images[i : i + _REAL_BATCH] for i in range(0, len(images), _REAL_BATCH))
    features = np.concatenate([np.asarray(classify(to_unit_range(part))[1]) for part in parts])
    dim = features.shape[1]
    if min(pairs, len(images)) <= dim:
        raise ValueError(
            f"a Frechet distance in the classifier's {dim} features needs more than {dim} pairs and real "
            f"images; there are {pairs} and {len(images)}: raise --pairs, or leave --data out."
        )
    return moments_of(features)


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
    record = {**to_json(result), "made_with": to_json(given.settings)}
    save(analysis.draw(result), out / name)
    save_record(out / f"{name}.json", record)  # last: it says that the analysis is done
    for key, value in record["verdict"].items():
        print(
            f"{name}: {key} = {value:.4g}"
            if isinstance(value, float)
            else f"{name}: {key} = {value}"
        )
    return record["verdict"]


def run(names: list[str], given: Given, out: pathlib.Path, asked: bool) -> None:
    """The analyses one after the other. One that does not apply to the model is skipped with a line, or
    ends the process with code 2 if it was asked for by name; what is there already is made again only then."""
    for name in names:
        if not asked and _is_done(name, given, out):
            print(f"{name}: {out / name}.json has it with the same settings; delete it to repeat.")
            continue
        try:
            analyze(name, given, out)
        except NotApplicable as error:
            if asked:
                print(f"{name}: {error}", file=sys.stderr)
                sys.exit(2)
            print(f"{name}: skipped, {error}")


def _is_done(name: str, given: Given, out: pathlib.Path) -> bool:
    file = out / f"{name}.json"
    return file.exists() and load_record(file).get("made_with") == to_json(given.settings)


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    values = flags.FLAGS
    log_progress()
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
        data=values.data,
        pairs=values.pairs,
    )
    run(names, given, pathlib.Path(values.out), asked=len(names) == 1)


if __name__ == "__main__":
    flags.DEFINE_string(
        "what", None, f"Of {', '.join(ANALYSES)}: one, several with commas, or all."
    )
    flags.DEFINE_string("model", "unet_fashion", "A shipped model, or a .safetensors path.")
    flags.DEFINE_string("out", None, "Folder of the numbers and pictures.")
    flags.DEFINE_string("bits", "w8a8,w4a8", "Variants by round-to-nearest, finer first.")
    flags.DEFINE_string("bundle", None, "Analyse this bundle instead of variants at --bits.")
    flags.DEFINE_string("classifier", "classifier_fashion", "Judges images; empty for none.")
    flags.DEFINE_integer("steps", 20, "Steps of the sampler.", lower_bound=2)
    flags.DEFINE_integer("samples", 64, "Trajectories to measure on.", lower_bound=2)
    flags.DEFINE_integer("batch", 32, "Samples at a time while sampling.", lower_bound=1)
    flags.DEFINE_string(
        "data", "", "Real images for beneficial noise, as in idx:DIR; empty for none."
    )
    flags.DEFINE_integer("pairs", 0, "Pairs of beneficial noise; 0: --samples.", lower_bound=0)
    flags.DEFINE_string("spacing", "quad", "Grid of the sampler's timesteps.")
    flags.DEFINE_integer("seed", 0, "Of the noise.")
    flags.DEFINE_string("compile_cache", None, "Folder for compiled programs.")
    flags.mark_flags_as_required(["what", "out"])
    command_line.run(main)
