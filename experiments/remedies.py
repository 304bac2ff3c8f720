"""Before a method and after it: ranges over t, accumulated error, temporal features, skip concatenations.

    python -m experiments.quantize --config=configs/quickstart.py:full --workdir=W
    python -m experiments.remedies --run=W --variants=rtn_w4a4,qdiffusion_w4a4,tfmq_w4a4,tcaq_w4a4 --out=F

`--variants` are variants of that run, the one without a remedy first. Writes F/remedies.json, .png and .pdf
(one column of a paper wide) and prints the verdict, measured on `--samples` trajectories that the run has not
seen.
"""

from __future__ import annotations

import pathlib

from absl import app, flags

from experiments import command_line
from qdiff_jax.analysis.column import save
from qdiff_jax.analysis.figures_remedies import remedies_figure
from qdiff_jax.analysis.remedies import remedies
from qdiff_jax.analysis.subject import make_subject, to_json
from qdiff_jax.methods.run import Loaded, check_comparable, load_for_sampling
from qdiff_jax.models import registry
from qdiff_jax.observe.archive import save_record
from qdiff_jax.runtime.cache import enable_compile_cache
from qdiff_jax.runtime.progress import log_progress, progress

_SEED = 1_000_003  # of trajectories that no run has calibrated on


def load_variants(run: pathlib.Path, names: list[str]) -> dict[str, Loaded]:
    """The bundles of a workdir of `experiments.quantize` by name.

    Raises ValueError for a variant that is not there or whose layers do not compare, or bundles of different
    models or samplers.
    """
    there = sorted(path.parent.name for path in (run / "variants").glob("*/bundle"))
    missing = [name for name in names if name not in there]
    if missing or not names:
        raise ValueError(
            f"{run} has no finished variant {(missing or [''])[0]!r}; there are {there}."
        )
    loaded = {name: load_for_sampling(run / "variants" / name / "bundle") for name in names}
    first = loaded[names[0]].manifest
    for name, one in loaded.items():
        check_comparable(one.manifest, name)
        for key in ("source", "sampler"):
            mine, theirs = ({**m.get(key), "tensors": None} for m in (one.manifest, first))
            if mine != theirs:
                raise ValueError(
                    f"{name} and {names[0]} differ in their {key}: {mine} and {theirs}."
                )
    return loaded


def measure(
    run: pathlib.Path, names: list[str], samples: int, batch: int, out: pathlib.Path
) -> dict:
    """Measure, draw and write; returns the verdict. Raises ValueError as `load_variants`."""
    loaded = load_variants(run, names)
    first = next(iter(loaded.values()))
    diffusion = registry.load(first.manifest["source"]["name"])
    with progress("trajectories", samples + 1) as tell:
        subject = make_subject(
            diffusion,
            first.plan,
            samples=samples,
            calibration=1,
            seed=_SEED,
            batch=batch,
            on_batch=tell,
        )
    with progress("steps", first.plan.steps) as tell:
        variants = {name: one.variables for name, one in loaded.items()}
        found = remedies(subject, variants, lambda done, total: tell(done))
    record = {**to_json(found), "made_with": {"run": str(run), "samples": samples}}
    save(remedies_figure(found), out / "remedies")
    save_record(out / "remedies.json", record)
    return record["verdict"]


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    log_progress()
    enable_compile_cache(flags.FLAGS.compile_cache)
    verdict = measure(
        pathlib.Path(flags.FLAGS.run),
        flags.FLAGS.variants,
        flags.FLAGS.samples,
        flags.FLAGS.batch,
        pathlib.Path(flags.FLAGS.out),
    )
    for key, value in verdict.items():
        print(f"{key} = {value:.4g}")


if __name__ == "__main__":
    flags.DEFINE_string("run", None, "Workdir of experiments.quantize.")
    flags.DEFINE_list("variants", None, "Its variants, the one without a remedy first.")
    flags.DEFINE_string("out", None, "Folder of the numbers and the picture.")
    flags.DEFINE_integer("samples", 32, "Trajectories to measure on.", lower_bound=2)
    flags.DEFINE_integer("batch", 16, "Samples at a time while sampling.", lower_bound=1)
    flags.DEFINE_string("compile_cache", None, "Folder for compiled programs.")
    flags.mark_flags_as_required(["run", "variants", "out"])
    command_line.run(main)
