"""Ways of rounding weights, set against each other: error from full precision against CPU seconds.

    python -m experiments.bench_rounding --config=configs/bench_rounding.py --out=W

Every cell (model, bits, recipe, seed) is a run of `experiments.quantize` under OUT/runs; a finished one is not
made again, one that diverged neither (delete its folder to try again), and full precision is made once for all
that share model and seed. Writes rounding.md, rounding.csv and a picture for each model and width, over all
cells under OUT that are finished. `--rows=FILE` adds those of a rounding.csv made before, here or elsewhere:
their cells are not made again either.

CPU seconds are those of the stages that decide weights, all threads, compiling apart, and of the rollouts that
weigh steps; run it on a machine that does nothing else. A cell that compiled for more than a twentieth of them
has its stages run once more at once, its programs now being compiled, and is timed by that.
"""

from __future__ import annotations

import pathlib
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments import command_line
from experiments.bench_rounding_table import (
    MADE,
    NOT_KEPT,
    WHICH,
    merged,
    read_rows,
    write_results,
)
from experiments.compare_runs import Run
from experiments.made_once import run_once
from experiments.quantize import quantize_one
from experiments.quantize_config import read_config
from experiments.quantize_job import prepare
from experiments.quantize_report import made_at
from experiments.quantize_sets import sets_of, trajectories
from qdiff_jax.analysis.subject import parse_bits
from qdiff_jax.eval.report import read_report
from qdiff_jax.observe.archive import load_record, save_record
from qdiff_jax.runtime.cache import enable_compile_cache
from qdiff_jax.runtime.programs import release_programs
from qdiff_jax.runtime.progress import log_progress

CELL = "cell.json"  # beside the report of a run: which cell it is, and what made it
TIMED = "timed"  # beside it, too: the stages once more
# Of a cell's CPU seconds; what compiles less is near enough.
MOST_COMPILED = 1 / 20


class Cell(NamedTuple):
    """One run. name: of its folder; row: WHICH of the cells it is."""

    name: str
    row: dict[str, Any]
    config: ConfigDict


def cells(config: ConfigDict) -> list[Cell]:
    """Every cell of a config, in the order of its models, bits, recipes and seeds; none of a recipe that
    concerns activations at a width that leaves them alone. Raises ValueError for a wrong key, or no cell."""
    made = []
    for model in config.models:
        for bits in config.bits:
            w_bits, a_bits = (width or 32 for width in parse_bits(bits))
            for name, recipe in config.recipes:
                if a_bits == 32 and recipe["activations"]:
                    continue
                for seed in config.seeds:
                    own = config.quantize.copy_and_resolve_references()
                    own.model, own.seed = model, seed
                    variant = dict(method=recipe["method"], w_bits=w_bits, a_bits=a_bits)
                    own.variants = ConfigDict({"rounded": variant})
                    own.update_from_flattened_dict(dict(recipe["set"]))
                    read_config(own)
                    words = (pathlib.Path(model).stem, bits, name, str(seed))
                    folder = "-".join(re.sub(r"[^\w.]+", "_", word) for word in words)
                    row = dict(zip(WHICH, (model, bits, name, int(seed))))
                    made.append(Cell(folder, row, own))
    if not made:
        raise ValueError(
            f"the recipes {[name for name, _ in config.recipes]} concern quantized activations, and "
            f"{list(config.bits)} have none: take bits such as w4a8."
        )
    return made


def run_cells(given: Sequence[Cell], out: pathlib.Path, command: str) -> None:
    """Run what is not finished yet; a cell that diverges is recorded as such. command: recorded in each."""
    for position, cell in enumerate(given):
        run = Run(cell.name, "configs/bench_rounding.py", cell.config, read_config(cell.config))
        logging.info("cell %d of %d: %s", position + 1, len(given), cell.name)
        place = out / "runs" / cell.name / CELL
        held = load_record(place) if place.exists() else {}
        if "diverged" in held:
            continue
        record = place.parent / "variants" / "rounded" / "quantize.json"
        fresh = not record.exists()
        if held and "commit" not in held:
            # The report may be written anew, and says the commit of now then.
            held |= reported(place.parent)
            save_record(place, held)
        origin = {"command": command, **made_at()}
        try:
            run_once(run, out, command)
        except FloatingPointError as error:
            logging.warning("%s diverged: %s", cell.name, error)
            save_record(place, {**cell.row, **origin, "diverged": str(error)})
            release_programs()
            continue
        if fresh:
            save_record(place, {**cell.row, **origin})
        elif not held:  # a kill left it quantized but unnamed
            said = load_record(record)
            save_record(place, {**cell.row, **{key: said[key] for key in MADE[1:] if key in said}})
        time_again(cell, place.parent, fresh)


def reported(workdir: pathlib.Path) -> dict[str, str]:
    """Commit, machine and version by the report of a cell that was made before cells said it."""
    provenance = read_report(workdir / "report.json")["provenance"]
    return {key: provenance[key] for key in MADE[1:]}


def time_again(cell: Cell, workdir: pathlib.Path, fresh: bool) -> None:
    """Run the stages of a finished cell once more, into a folder of their own, if they compiled for long.

    fresh: whether this process compiled its programs. A kill in here begins it anew.
    """
    again = workdir / TIMED
    first = load_record(workdir / "variants" / "rounded" / "quantize.json")
    if (again / "quantize.json").exists() or not compiled_long(deciding(first)):
        return
    if not (fresh or jax.config.jax_compilation_cache_dir):
        logging.warning("%s is not timed again: give it a compile cache.", cell.name)
        return
    shutil.rmtree(again, ignore_errors=True)
    logging.info("%s once more, for its seconds without compiling", cell.name)
    job = prepare(cell.config)
    calibration, _ = trajectories(job, workdir)
    quantize_one(job, "rounded", sets_of(job, workdir, calibration), again, calibration)
    release_programs()


def deciding(record: Mapping) -> list[dict]:
    """Reports of the stages that decide weights (or the scales beside them) of a quantize.json."""
    return [
        stage
        for name, stage in record["stages"].items()
        if not name.split("_", 1)[1].startswith("calibrate_activations")
    ]


def compiled_long(stages: Sequence[Mapping]) -> bool:
    """Whether compiling took more than MOST_COMPILED of their CPU seconds, by the wall where the processor's
    own clock was not read."""

    def compiling(stage):
        own = stage.get("compile_cpu_seconds")
        return stage["compile_seconds"] if own is None else own

    spent = sum(stage["cpu_seconds"] for stage in stages)
    return sum(map(compiling, stages)) > MOST_COMPILED * spent


def read_cells(out: pathlib.Path) -> list[dict]:
    """One row for each finished run under out, by name of its folder: WHICH, FIGURES (None for what diverged),
    fell_back and units (None for recipes that cannot fall back), notes and MADE."""
    return [_row(path) for path in sorted((out / "runs").glob(f"*/{CELL}"))]


def _row(path: pathlib.Path) -> dict:
    held, workdir = load_record(path), path.parent
    row = {key: held[key] for key in WHICH}
    made = {key: held.get(key, NOT_KEPT) for key in MADE}
    figures = dict.fromkeys(("eps_rel_mse", "rollout_mse", "cpu_s", "compile_s"))
    if "diverged" in held:
        return {**row, **figures, "notes": [f"diverged: {held['diverged']}"], **made, **_fallen([])}
    report = read_report(workdir / "report.json")
    if "commit" not in held:
        made |= reported(workdir)
    first = load_record(workdir / "variants" / "rounded" / "quantize.json")
    timed = first
    if (workdir / TIMED / "quantize.json").exists():
        timed = load_record(workdir / TIMED / "quantize.json")
    notes = _notes(deciding(timed), timed is first)
    if timed is not first and timed["commit"] != made["commit"]:
        notes.append(f"timed at commit {timed['commit']}")
    figures = {
        "eps_rel_mse": report["variants"][1]["eps_rel_mse"],
        "rollout_mse": report["variants"][1]["rollout_mse"],
        "cpu_s": sum(stage["cpu_seconds"] for stage in deciding(timed)),
        "compile_s": sum(stage["compile_seconds"] for stage in deciding(first)),
    }
    rollouts = workdir / "trajectories" / "sensitivity.json"
    if rollouts.exists():
        weighed = load_record(rollouts)
        if "cpu_seconds" in weighed:
            figures["cpu_s"] += weighed["cpu_seconds"]
            figures["compile_s"] += weighed["compile_seconds"]
        else:
            notes.append("the rollouts that weigh its steps are not counted: made before they were")
    return {**row, **figures, "notes": notes, **made, **_fallen(deciding(first))}


def _notes(stages: Sequence[Mapping], once: bool) -> list[str]:
    """What keeps the CPU seconds of these stages from being what they should be. once: not timed again."""
    notes = []
    if once and compiled_long(stages):
        notes.append(
            "compiled for more than a twentieth of its CPU seconds and was not timed again"
        )
        if any("compile_cpu_seconds" not in stage for stage in stages):
            notes[0] += (
                ", and the wall seconds of compiling, which are more, were taken off: too low"
            )
    if any(stage.get("compile_cpu_seconds", 0.0) is None for stage in stages):
        notes.append("CPU seconds with compiling: JAX did not say when it began")
    if any(stage.get("resumed") for stage in stages):
        notes.append("resumed after a kill: what was done twice counts twice")
    if any(stage.get("uncounted") for stage in stages):
        notes.append("begun by a process that kept no seconds: too low")
    return notes


def _fallen(stages: Sequence[Mapping]) -> dict:
    """{"fell_back", "units"}: how many units were rounded to nearest after all, and how many there are."""
    able = [stage for stage in stages if "fell_back" in stage]
    if not able:
        return {"fell_back": None, "units": None}
    units = sum(unit["trained"] for stage in able for unit in stage["units"])
    return {"fell_back": sum(len(stage["fell_back"]) for stage in able), "units": units}


def shown_command(args: Sequence[str]) -> str:
    """The command line as anyone can give it: the folder of the cells is W, that of programs is left out."""
    kept, skip = [], False
    for arg in args:
        name, equals, _ = arg.lstrip("-").partition("=")
        if not skip and not (arg.startswith("-") and name in ("out", "rows", "compile_cache")):
            kept.append(arg)
            continue
        # "--out W" is two words, of which the second goes too.
        skip = not skip and not equals
    return shlex.join(["python", "-m", "experiments.bench_rounding", *kept, "--out=W"])


def _among(cell: Cell, rows: Sequence[Mapping]) -> bool:
    return any(all(row[key] == cell.row[key] for key in WHICH) for row in rows)


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    log_progress()
    enable_compile_cache(flags.FLAGS.compile_cache)
    out = pathlib.Path(flags.FLAGS.out)
    kept = read_rows(pathlib.Path(flags.FLAGS.rows)) if flags.FLAGS.rows else []
    given = [cell for cell in cells(flags.FLAGS.config) if not _among(cell, kept)]
    run_cells(given, out, shown_command(sys.argv[1:]))
    path = write_results(out, merged(kept, read_cells(out)))
    print(path.read_text("utf-8"))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file, path:arg.", lock_config=True)
    flags.DEFINE_string("out", None, "Runs and tables go here; the same again resumes.")
    flags.DEFINE_string("rows", None, "A rounding.csv whose cells are made already.")
    flags.DEFINE_string("compile_cache", None, "Folder for compiled programs.")
    flags.mark_flags_as_required(["config", "out"])
    command_line.run(main)
