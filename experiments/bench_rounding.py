"""Ways of rounding weights, set against each other: error from full precision against CPU seconds.

    python -m experiments.bench_rounding --config=configs/bench_rounding.py --out=W

Every cell (model, bits, recipe, seed) is a run of `experiments.quantize` under OUT/runs; a finished one is not
made again, and full precision is made once for all that share model and seed. Writes rounding.md,
rounding.csv and a picture for each model and width, over all cells under OUT that are finished. CPU seconds are
those of the stages that decide weights (all threads, compiling apart), so run it on a machine that does
nothing else.
"""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments import command_line
from experiments.compare import Run, run_once
from experiments.quantize_config import read_config
from qdiff_jax.analysis.column import column, dress, line_style, plain_log, save
from qdiff_jax.analysis.subject import parse_bits
from qdiff_jax.eval.curves import COLOURS
from qdiff_jax.eval.files import write_atomic
from qdiff_jax.eval.report import read_report
from qdiff_jax.eval.tables import ABSENT, significant
from qdiff_jax.observe.archive import load_record
from qdiff_jax.runtime.cache import enable_compile_cache
from qdiff_jax.runtime.progress import log_progress

KEYS = ("model", "bits", "recipe", "seed", "eps_rel_mse", "rollout_mse", "cpu_s", "compile_s")
CELL = "cell.json"  # beside the report of a run: which cell it is


class Cell(NamedTuple):
    """One run. name: of its folder; row: the first four of KEYS."""

    name: str
    row: dict[str, Any]
    config: ConfigDict


def cells(config: ConfigDict) -> list[Cell]:
    """Every cell of a config, cheap recipes first within a width. Raises ValueError for a wrong key."""
    made = []
    for model in config.models:
        for bits in config.bits:
            w_bits, a_bits = (width or 32 for width in parse_bits(bits))
            for name, recipe in config.recipes:
                for seed in config.seeds:
                    own = config.quantize.copy_and_resolve_references()
                    own.model, own.seed = model, seed
                    variant = dict(method=recipe["method"], w_bits=w_bits, a_bits=a_bits)
                    own.variants = ConfigDict({"rounded": variant})
                    own.update_from_flattened_dict(dict(recipe["set"]))
                    read_config(own)
                    words = (pathlib.Path(model).stem, bits, name, str(seed))
                    folder = "-".join(re.sub(r"[^\w.]+", "_", word) for word in words)
                    row = dict(zip(KEYS, (model, bits, name, int(seed))))
                    made.append(Cell(folder, row, own))
    return made


def run_cells(given: Sequence[Cell], out: pathlib.Path) -> None:
    """Run what is not finished yet."""
    for position, cell in enumerate(given):
        run = Run(cell.name, "configs/bench_rounding.py", cell.config, read_config(cell.config))
        logging.info("cell %d of %d: %s", position + 1, len(given), cell.name)
        workdir = run_once(run, out, "python -m experiments.bench_rounding")
        # Also of a run that a kill left finished but unnamed.
        write_atomic(workdir / CELL, json.dumps(cell.row))


def read_cells(out: pathlib.Path) -> list[dict]:
    """One row of KEYS for each finished run under out, by name of its folder."""
    rows = []
    for path in sorted((out / "runs").glob(f"*/{CELL}")):
        variant = read_report(path.parent / "report.json")["variants"][1]
        record = load_record(path.parent / "variants" / "rounded" / "quantize.json")
        deciding = [
            report
            for name, report in record["stages"].items()
            if not name.split("_", 1)[1].startswith("calibrate_activations")
        ]
        rows.append(
            {
                **json.loads(path.read_text("utf-8")),
                "eps_rel_mse": variant["eps_rel_mse"],
                "rollout_mse": variant["rollout_mse"],
                "cpu_s": sum(report["cpu_seconds"] for report in deciding),
                "compile_s": sum(report["compile_seconds"] for report in deciding),
            }
        )
    return rows


def summaries(rows: Iterable[Mapping]) -> list[dict]:
    """Mean and spread (largest - smallest over seeds) of each (model, bits, recipe), least eps error first.

    A recipe that diverged with any seed has None for its error and comes last.
    """
    groups: dict[tuple, list[Mapping]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in KEYS[:3]), []).append(row)
    found = []
    for (model, bits, recipe), held in groups.items():
        entry = {"model": model, "bits": bits, "recipe": recipe, "seeds": len(held)}
        for key in KEYS[4:]:
            values = [row[key] for row in held]
            sound = None not in values
            entry[key] = float(np.mean(values)) if sound else None
            entry[f"{key}_spread"] = float(np.ptp(values)) if sound else None
        found.append(entry)
    return sorted(found, key=lambda e: (e["model"], e["bits"], e["eps_rel_mse"] or np.inf))


def pareto(entries: Sequence[Mapping], error: str = "eps_rel_mse") -> set[str]:
    """Recipes that no other beats in both this error and CPU seconds."""
    sound = [e for e in entries if e[error] is not None]
    return {
        e["recipe"]
        for e in sound
        if not any(o[error] <= e[error] and o["cpu_s"] < e["cpu_s"] for o in sound if o is not e)
    }


def curves(entries: Iterable[Mapping]) -> dict[str, list[Mapping]]:
    """{label: entries by CPU seconds}: AdaRound's lengths at one rate are one curve, all others points."""
    found: dict[str, list[Mapping]] = {}
    for entry in sorted(entries, key=lambda e: e["cpu_s"]):
        label = re.sub(r"^adaround \d+ at (.*)", r"adaround at \1, more steps", entry["recipe"])
        found.setdefault(label, []).append(entry)
    return dict(sorted(found.items()))


def _draw(entries: Sequence[Mapping], labels: Sequence[str], stem: pathlib.Path) -> pathlib.Path:
    """Both errors over CPU seconds. labels: of all pictures, so that a recipe looks the same in each."""
    errors = {"eps_rel_mse": "eps error (relative MSE)", "rollout_mse": "rollout MSE"}
    figure, panels = column((2.1, 2.1))
    for axes, (error, title) in zip(panels, errors.items(), strict=True):
        sound = [e for e in entries if e[error]]
        front = pareto(sound, error)
        for label, held in curves(sound).items():
            position = labels.index(label)
            style = {**line_style(position), "markersize": 4.0, "linewidth": 0.8}
            if len(held) == 1:
                style["linestyle"] = "none"
            if position >= len(COLOURS):  # colours begin again
                style["markerfacecolor"] = "white"
            axes.plot(
                [max(e["cpu_s"], 0.1) for e in held], [e[error] for e in held], label=label, **style
            )
        best = sorted((e["cpu_s"], e[error]) for e in sound if e["recipe"] in front)
        axes.step(
            [max(x, 0.1) for x, _ in best],
            [y for _, y in best],
            where="post",
            color="#BBBBBB",
            linewidth=2.5,
            zorder=0.5,
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
        dress(axes, "CPU seconds (compiling apart)" if axes is panels[-1] else "", title)
        plain_log(axes)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        fontsize=6,
        frameon=False,
        columnspacing=1.0,
    )
    return save(figure, stem)[0]


def write_results(out: pathlib.Path, command: str) -> pathlib.Path:
    """rounding.md, rounding.csv and pictures under out, from all cells there."""
    rows = read_cells(out)
    table = io.StringIO()
    writer = csv.DictWriter(table, KEYS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(out / "rounding.csv", table.getvalue())

    def cell(entry, key):
        if entry[key] is None:
            return "diverged"
        spread = entry[f"{key}_spread"]
        return significant(entry[key]) + (f" ± {significant(spread / 2)}" if spread else "")

    parts = [
        "# Rounding weights: error against CPU seconds",
        "Mean over seeds ± half the range; * marks the recipes that no other beats in both eps error and CPU "
        "seconds. Seconds are of the stages that decide weights.",
    ]
    entries = summaries(rows)
    labels = list(curves(entries))
    for model, bits in dict.fromkeys((e["model"], e["bits"]) for e in entries):
        mine = [e for e in entries if (e["model"], e["bits"]) == (model, bits)]
        front = pareto(mine)
        lines = [
            "| recipe | eps error | rollout MSE | CPU s | compile s | seeds |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for e in mine:
            name = e["recipe"] + (" *" if e["recipe"] in front else "")
            shown = (cell(e, key) for key in KEYS[4:])
            lines.append(f"| {name} | " + " | ".join(shown) + f" | {e['seeds'] or ABSENT} |")
        stem = re.sub(r"\W+", "_", f"rounding_{pathlib.Path(model).stem}_{bits}")
        picture = _draw(mine, labels, out / "pictures" / stem)
        parts += [f"## {model}, {bits}", "\n".join(lines), f"![]({picture.relative_to(out)})"]
    made = f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}"
    parts.append(f"Made by `{command}` on {made}.")
    return write_atomic(out / "rounding.md", "\n\n".join(parts) + "\n")


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    log_progress()
    enable_compile_cache(flags.FLAGS.compile_cache)
    out = pathlib.Path(flags.FLAGS.out)
    run_cells(cells(flags.FLAGS.config), out)
    path = write_results(
        out, "python -m experiments.bench_rounding --config=configs/bench_rounding.py"
    )
    print(path.read_text("utf-8"))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file, path:arg.", lock_config=True)
    flags.DEFINE_string("out", None, "Runs and tables go here; the same again resumes.")
    flags.DEFINE_string("compile_cache", None, "Folder for compiled programs.")
    flags.mark_flags_as_required(["config", "out"])
    command_line.run(main)
