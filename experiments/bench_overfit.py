"""What ways of rounding have learned by heart: errors of blocks on the calibration set and on held-out samples.

    python -m experiments.bench_overfit --config=configs/bench_rounding.py:model=unet_fashion,bits=w4a32 \
        --out=W --table=F

Of the cells of experiments.bench_rounding that its config names and that are finished in W, every block's
relative error behind the quantized prefix (`qdiff_jax.analysis.unit_errors`) is measured twice: on the states
that the cell was calibrated on, and on those of its held-out trajectories at the same steps. The last block is
left out: its error is the eps error. W/runs/CELL/unit_errors.json keeps the errors, so that a cell is measured
once, in half a minute on a core. Writes F/overfit.md and F/overfit.csv.
"""

from __future__ import annotations

import csv
import io
import pathlib
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from experiments import command_line
from experiments.bench_rounding import CELL, WHICH, Cell, cells
from experiments.bench_rounding_table import NEAREST
from experiments.quantize_job import prepare
from experiments.quantize_report import made_at
from experiments.quantize_sets import calibration_sets, trajectories
from qdiff_jax.analysis.unit_errors import unit_errors
from qdiff_jax.eval.files import write_atomic
from qdiff_jax.eval.tables import ABSENT
from qdiff_jax.methods.run import load_for_sampling
from qdiff_jax.observe.archive import load_record, save_record
from qdiff_jax.runtime.cache import enable_compile_cache
from qdiff_jax.runtime.progress import log_progress

KEPT = "unit_errors.json"
SETS = ("calibration", "held_out")
COLUMNS = (*WHICH, "unit", "shape", *SETS)
LEAD = (
    "Relative squared error of every block's output behind the quantized prefix, on the states that the "
    "rounding was calibrated on and on those of held-out trajectories at the same steps. In the cells: the "
    "held-out error as a share of nearest's with the same seed, and in brackets how many times the error on "
    "the calibration set it is, over the same ratio of nearest, which learns nothing (1: nothing was learned "
    "by heart). Geometric means over blocks and seeds; blocks are sorted by the size of their output, and the "
    "last one is left out."
)


def measured(cell: Cell, workdir: pathlib.Path) -> list[dict]:
    """One row of COLUMNS for each unit of a finished cell, the last left out; from KEPT where that is there."""
    place = workdir / KEPT
    if not place.exists():
        job = prepare(cell.config)
        sets = [calibration_sets(job.config, drawn).weights for drawn in trajectories(job, workdir)]
        loaded = load_for_sampling(workdir / "variants" / "rounded" / "bundle")
        both = [
            unit_errors(job.diffusion.model, loaded.variables, samples, batch_size=_batch(samples))
            for samples in sets
        ]
        found = [
            {
                "unit": first.unit,
                "shape": list(first.shape),
                **dict(zip(SETS, (first.error, second.error))),
            }
            for first, second in zip(*both, strict=True)
        ]
        save_record(place, {"units": found[:-1], **made_at()})
    return [{**cell.row, **unit} for unit in load_record(place)["units"]]


def _batch(samples) -> int:
    """The largest batch up to 32 that divides a set."""
    return max(size for size in range(1, 33) if len(samples) % size == 0)


def size_of(shape: Sequence[int]) -> str:
    """ "4x4" of a map, "64 tokens" of a sequence, "vectors" of what has no positions."""
    if len(shape) == 1:
        return "vectors"
    return f"{shape[0]} tokens" if len(shape) == 2 else "x".join(map(str, shape[:-1]))


def summaries(rows: Iterable[Mapping]) -> list[dict]:
    """One entry for each (model, bits, recipe): seeds, and by size of the output (share, overfit) of LEAD; only
    over seeds that nearest has too. Sorted by the share over all blocks."""
    rows = list(rows)
    nearest = {_place(row): row for row in rows if row["recipe"] == NEAREST}
    groups: dict[tuple, list[Mapping]] = {}
    for row in rows:
        if _place(row) in nearest:
            groups.setdefault(tuple(row[key] for key in WHICH[:3]), []).append(row)
    entries = []
    for (model, bits, recipe), held in groups.items():
        by_size: dict[str, list] = {"all": []}
        for row in held:
            other = nearest[_place(row)]
            share = np.log(row["held_out"] / other["held_out"])
            learned = share - np.log(row["calibration"] / other["calibration"])
            for size in ("all", size_of(row["shape"])):
                by_size.setdefault(size, []).append((share, learned))
        means = {size: tuple(np.exp(np.mean(pairs, axis=0))) for size, pairs in by_size.items()}
        seeds = len({row["seed"] for row in held})
        entries.append(
            {"model": model, "bits": bits, "recipe": recipe, "seeds": seeds, "sizes": means}
        )
    return sorted(entries, key=lambda e: (e["model"], e["bits"], e["sizes"]["all"][0]))


def _place(row: Mapping) -> tuple:
    return row["model"], row["bits"], row["seed"], row["unit"]


def table(rows: Sequence[Mapping], command: str) -> str:
    """overfit.md."""
    entries = summaries(rows)
    parts = ["# Rounding weights: what is learned by heart", LEAD]
    for model, bits in dict.fromkeys((e["model"], e["bits"]) for e in entries):
        mine = [e for e in entries if (e["model"], e["bits"]) == (model, bits)]
        counts = {size: 0 for size in mine[0]["sizes"]}
        for row in rows:
            if (row["model"], row["bits"], row["recipe"], row["seed"]) == (model, bits, NEAREST, 0):
                counts[size_of(row["shape"])] += 1
                counts["all"] += 1
        heads = ["recipe", *(f"{size} ({n} blocks)" for size, n in counts.items()), "seeds"]
        lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
        for entry in mine:
            shown = [
                f"{entry['sizes'][size][0]:.3f} ({entry['sizes'][size][1]:.2f})"
                if size in entry["sizes"]
                else ABSENT
                for size in counts
            ]
            lines.append("| " + " | ".join([entry["recipe"], *shown, str(entry["seeds"])]) + " |")
        parts += [f"## {model}, {bits}", "\n".join(lines)]
    return "\n\n".join([*parts, f"Made by `{command}`."]) + "\n"


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    log_progress()
    enable_compile_cache(flags.FLAGS.compile_cache)
    out = pathlib.Path(flags.FLAGS.out)
    rows = []
    for cell in cells(flags.FLAGS.config):
        workdir = out / "runs" / cell.name
        if not (workdir / CELL).exists() or "diverged" in load_record(workdir / CELL):
            continue
        logging.info("errors of blocks of %s", cell.name)
        rows += measured(cell, workdir)
    if not any(row["recipe"] == NEAREST for row in rows):
        raise ValueError(
            f"{out} has no finished cell of '{NEAREST}' of this config, which all others are held against: run "
            "`python -m experiments.bench_rounding` with the same --config and --out first."
        )
    to = pathlib.Path(flags.FLAGS.table)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "shape": size_of(row["shape"])} for row in rows)
    write_atomic(to / "overfit.csv", text.getvalue())
    command = shlex.join(["python", "-m", "experiments.bench_overfit", *sys.argv[1:]])
    print(write_atomic(to / "overfit.md", table(rows, command)).read_text("utf-8"))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file, path:arg.", lock_config=True)
    flags.DEFINE_string("out", None, "The --out of experiments.bench_rounding.")
    flags.DEFINE_string("table", None, "Folder for the table.")
    flags.DEFINE_string("compile_cache", None, "Folder for compiled programs.")
    flags.mark_flags_as_required(["config", "out", "table"])
    command_line.run(main)
