"""The leaderboard of `experiments.compare` as Markdown, CSV and pictures, and whose code made it."""

from __future__ import annotations

import os
import pathlib
import platform
import re
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging

from experiments.compare_columns import COLUMNS, as_csv, commits_of
from experiments.compare_rows import FULL, Row
from qdiff_jax.analysis.column import column, dress, legend, save
from qdiff_jax.eval import plots, tables
from qdiff_jax.eval.curves import COLOURS, INK, MARKERS, spread
from qdiff_jax.eval.files import write_atomic


def _width(row: Row) -> str:
    return f"W{row['w_bits']:g}A{row['a_bits']:g}"


def quality_figure(rows: Sequence[Row]):
    """Rollout error against stored bytes and against BitOps, both axes logarithmic: one mark for each width,
    and at each point the number of its row."""
    figure, panels = column((3.2, 3.2))
    shown = [row for row in rows if row["rollout_mse"]]  # full precision has none, and log no zero
    widths = list(dict.fromkeys(_width(row) for row in shown))
    measures = (("stored_bytes", 2**20, "stored (MiB)"), ("bitops", 1e9, "BitOps (10^9)"))
    for axes, (key, unit, label) in zip(panels, measures, strict=True):
        for index, width in enumerate(widths):
            mine = [row for row in shown if _width(row) == width]
            x = [row[key] / unit for row in mine]
            y = [row["rollout_mse"] for row in mine]
            colour, mark = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            axes.plot(x, y, color=colour, marker=mark, linestyle="", markersize=3.0, label=width)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.margins(0.15, 0.05)
        for width in widths:
            _number(axes, [row for row in shown if _width(row) == width], key, unit)
        dress(axes, label, "rollout MSE")
    if shown:
        legend(panels[0])
    return figure


def _number(axes, rows: Sequence[Row], key: str, unit: float) -> None:
    """The rows' numbers in two columns beside their points, which lie close together, each tied to its own."""
    points = np.array([[row[key] / unit, row["rollout_mse"]] for row in rows])
    limits = np.log10([axes.get_xlim(), axes.get_ylim()])
    places = (np.log10(points) - limits[:, 0]) / (limits[:, 1] - limits[:, 0])
    order = np.argsort(places[:, 0], kind="stable")
    half = len(order) // 2
    for side, chosen in (("right", order[:half]), ("left", order[half:])):
        if not len(chosen):
            continue
        edge = places[:, 0].min() - 0.06 if side == "right" else places[:, 0].max() + 0.06
        for index, height in zip(chosen, spread(places[chosen, 1], 0.028)):
            axes.annotate(
                str(rows[index]["number"]),
                xy=points[index],
                xytext=(edge, height),
                textcoords="axes fraction",
                ha=side,
                va="center",
                fontsize=4.5,
                color=INK,
                arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.25, "shrinkA": 0},
            )


def _pictures(rows: Sequence[Row], out: pathlib.Path) -> dict[str, pathlib.Path]:
    """{caption: path}: quality against size for each model, errors by timestep for each of its widths."""
    pictures = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model and row["name"] != FULL]
        stem = re.sub(r"\W+", "_", pathlib.Path(model).stem)
        folder = out / "pictures"
        quality = save(quality_figure(mine), folder / f"quality_{stem}")[0]
        pictures[f"Quality against size, {model}; numbers are those of the table"] = quality
        drawn = [row for row in mine if "eps_rel_mse_by_step" in row]
        for width in dict.fromkeys(_width(row) for row in drawn):
            own = [row for row in drawn if _width(row) == width]
            # float: a value that is not finite is stored as null, and leaves a gap.
            curves = {r["label"]: np.asarray(r["eps_rel_mse_by_step"], np.float64) for r in own}
            steps, path = np.asarray(own[0]["timesteps"]), folder / f"error_{stem}_{width}.png"
            pictures[f"Teacher-forced error by timestep at {width}, {model}"] = plots.plot_error(
                steps, curves, path
            )
    return pictures


def _origin(rows: Sequence[Row]) -> str:
    """Whose code made the rows; loud where it is not one commit's."""
    made = [commit for row in rows for commit in commits_of(row)]
    if len(set(made)) < 2:
        return "".join(f"All rows were made at commit {commit}." for commit in set(made))
    listed = ", ".join(f"{commit} ({made.count(commit)})" for commit in dict.fromkeys(made))
    logging.warning("rows of different commits stand on one leaderboard: %s", listed)
    return (
        f"**Rows of different commits stand here (rows): {listed}; the last column says which. Where the code "
        "between them changes figures, run the older ones again in a new folder.**"
    )


def write_leaderboard(
    out: pathlib.Path, rows: Sequence[Row], command: str = ""
) -> dict[str, pathlib.Path]:
    """leaderboard.md, leaderboard.csv and pictures/ under out, each whole or not at all."""
    pictures = _pictures(rows, out)
    parts = [
        "# Leaderboard",
        "Less is better but for accuracy and agreement. Variants are ordered by bits, then by policy, then by "
        "rollout error; all on one model were measured on the same noise, states and labels.",
        _origin(rows),
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        full = next(row for row in mine if row["name"] == FULL)
        cells = tables.rows(COLUMNS, mine, full)
        parts.append(f"## {model}\n\n{tables.markdown(COLUMNS, cells)}")
        if full["frechet_floor"] is not None:
            floor = tables.significant(full["frechet_floor"])
            parts.append(f"Floor of the Fréchet distance (as many real images): {floor}.")
        lost = [
            f"- {row['label']}: no result: {row['diverged']}" for row in mine if row["diverged"]
        ]
        parts.append("\n".join(lost))
    for caption, path in pictures.items():
        parts.append(f"![{caption}](<{os.path.relpath(path, out)}>)\n\n*{caption}*")
    made = f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}"
    parts.append(f"Made by `{command or 'experiments.compare.compare(...)'}` on {made}.")
    return {
        "md": write_atomic(out / "leaderboard.md", "\n\n".join(filter(None, parts)) + "\n"),
        "csv": write_atomic(out / "leaderboard.csv", as_csv(rows)),
        **{path.stem: path for path in pictures.values()},
    }
