"""The leaderboard of `experiments.compare`: rows from finished runs, table, CSV and pictures."""

from __future__ import annotations

import csv
import functools
import io
import math
import os
import pathlib
import platform
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.quantize_config import QuantizeConfig
from qdiff_jax.analysis.column import column, dress, legend, line_style, save
from qdiff_jax.eval import plots, tables
from qdiff_jax.eval.cost import Cost, network_cost
from qdiff_jax.eval.files import write_atomic
from qdiff_jax.eval.report import read_report
from qdiff_jax.eval.samples import FIRST_INDEX, Samples, labels
from qdiff_jax.eval.tables import Column
from qdiff_jax.export.bundle import load_bundle
from qdiff_jax.models import registry
from qdiff_jax.models.families import example_inputs
from qdiff_jax.observe.archive import load_arrays
from qdiff_jax.sites import list_sites

Row = dict[str, Any]


class Finished(NamedTuple):
    """A workdir of `experiments.quantize` that holds a report of `config`."""

    name: str
    config: QuantizeConfig
    workdir: pathlib.Path
    # {variant: metrics of its evaluation by many samples}, of those that have one.
    judged: Mapping[str, Mapping] = MappingProxyType({})


def collect(runs: Sequence[Finished]) -> list[Row]:
    """One row for full precision of each model, one for each variant of each run.

    Models in the order given, and in each the variants from many bits to few, least rollout error first.
    """
    rows: dict[tuple[str, str], Row] = {}
    for run in runs:
        for variant in read_report(run.workdir / "report.json")["variants"]:
            is_full = variant["name"] == "fp32"
            key = (run.config.model, "fp32" if is_full else f"{run.name}/{variant['name']}")
            if key not in rows:
                rows[key] = {**variant, "model": run.config.model, "run": run.name}
                rows[key].update(_measured(run, variant["name"]))
    models = list(dict.fromkeys(run.config.model for run in runs))

    def place(row):
        error = math.inf if row["rollout_mse"] is None else row["rollout_mse"]
        bits = (-row["w_bits"], -row["a_bits"])
        return models.index(row["model"]), row["name"] != "fp32", *bits, error

    ordered = sorted(rows.values(), key=place)
    for row in ordered:
        twice = sum(r["name"] == row["name"] and r["model"] == row["model"] for r in ordered) > 1
        row["label"] = f"{row['name']} ({row['run']})" if twice else row["name"]
    return ordered


def _measured(run: Finished, name: str) -> Row:
    """Cost and classes of one variant, from its bundle and its samples."""
    folder = run.workdir / "variants" / name
    quant = {} if name == "fp32" else load_bundle(folder / "bundle").quant
    cost: Cost = network_cost(_sites(run.config.model), quant)
    found: Row = {"macs": cost.macs, "bitops": cost.bitops, "accuracy": None, "agreement": None}
    frechet = run.judged.get(name, {}).get("frechet", {})
    found |= {f"frechet_{key}": frechet.get(key) for key in ("value", "low", "high", "floor")}
    if run.config.classifier:
        mine, theirs = (
            _classes(run.config.classifier, run.workdir / "variants" / which / "samples.npz")
            for which in (name, "fp32")
        )
        asked = labels(
            registry.load(run.config.model).classes,
            range(FIRST_INDEX, FIRST_INDEX + len(mine)),
        )
        found["accuracy"] = None if asked is None else float((mine == asked).mean())
        found["agreement"] = float((mine == theirs).mean())
    return found


@functools.lru_cache(maxsize=8)
def _sites(model: str):
    module = registry.load(model).model.module
    return list_sites(module, *example_inputs(module.config))


def _classes(classifier: str, path: pathlib.Path, batch: int = 64) -> np.ndarray:
    images = load_arrays(path, Samples).x
    classify = registry.classifier(classifier)
    logits = [np.asarray(classify(images[i : i + batch])[0]) for i in range(0, len(images), batch)]
    return np.concatenate(logits).argmax(axis=1)


def _optional(key: str, write) -> Any:
    def cell(row: Row, reference: Row) -> str:
        del reference
        if key in row.get("nonfinite", ()):
            return "diverged"
        return tables.ABSENT if row[key] is None else write(row[key])

    return cell


def _with_interval(row: Row) -> str:
    if row["frechet_value"] is None:
        return tables.ABSENT
    value, low, high = (tables.significant(row[f"frechet_{k}"]) for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _times_fewer(row: Row, reference: Row) -> str:
    return f"{reference['bitops'] / row['bitops']:.1f}×"


COLUMNS = (
    Column("Variant", "", "Name of the variant in its config.", lambda r, _: r["label"]),
    Column(
        "Bits",
        "W/A",
        "Target bits of the weights and of the activations.",
        lambda r, _: f"{r['w_bits']:g}/{r['a_bits']:g}",
    ),
    Column(
        "Rollout",
        "MSE",
        "Squared error of the final image, both models sampling from the same noise.",
        _optional("rollout_mse", tables.significant),
    ),
    Column(
        "ε error",
        "rel. MSE",
        "Squared error of the predicted noise over its squared size, on full-precision states.",
        _optional("eps_rel_mse", tables.significant),
    ),
    Column(
        "Features",
        "ratio",
        "Squared distance of paired images in a classifier's features over full precision's spread.",
        _optional("feature_distance", tables.significant),
    ),
    Column(
        "Accuracy",
        "%",
        "Share of images that the classifier takes for the class asked for.",
        _optional("accuracy", lambda v: f"{100 * v:.1f}"),
    ),
    Column(
        "Agreement",
        "%",
        "Share of images that the classifier puts into the class of full precision's image.",
        _optional("agreement", lambda v: f"{100 * v:.1f}"),
    ),
    Column(
        "Fréchet",
        "distance",
        "From real images, in the features of a network, of thousands of samples; 95 % interval.",
        lambda r, _: _with_interval(r),
    ),
    Column(
        "Stored",
        "",
        "Size of the model as stored, scales, zero points and corrections included.",
        lambda r, _: tables.size(r["stored_bytes"]),
    ),
    Column(
        "BitOps",
        "G",
        "Multiply-accumulates x weight bits x activation bits of one network evaluation, in 10^9.",
        lambda r, _: tables.significant(r["bitops"] / 1e9),
    ),
    Column("Fewer", "", "How many times fewer BitOps than full precision.", _times_fewer),
    Column(
        "Calibrate",
        "s",
        "Wall time of measuring ranges and corrections, without compiling.",
        _optional("calibrate_s", tables.significant),
    ),
    Column(
        "Reconstruct",
        "s",
        "Wall time of learning, without compiling.",
        _optional("reconstruct_s", tables.significant),
    ),
)
CSV_KEYS = (
    "model",
    "run",
    "label",
    "w_bits",
    "a_bits",
    "rollout_mse",
    "psnr_db",
    "eps_rel_mse",
    "feature_distance",
    "accuracy",
    "agreement",
    "frechet_value",
    "frechet_low",
    "frechet_high",
    "frechet_floor",
    "temporal_cosine",
    "temporal_mismatch",
    "stored_bytes",
    "macs",
    "bitops",
    "calibrate_s",
    "reconstruct_s",
    "compile_s",
)


def _csv(rows: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_KEYS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        broken = row.get("nonfinite", {})
        writer.writerow({key: broken.get(key, row.get(key)) for key in CSV_KEYS})
    return out.getvalue()


def quality_figure(rows: Sequence[Row]):
    """Rollout error against stored bytes and against BitOps, both axes logarithmic."""
    figure, panels = column((2.4, 2.4))
    shown = [row for row in rows if row["rollout_mse"]]  # full precision has none, and log no zero
    measures = (("stored_bytes", 2**20, "stored (MiB)"), ("bitops", 1e9, "BitOps (10^9)"))
    for axes, (key, unit, label) in zip(panels, measures, strict=True):
        for index, row in enumerate(shown):
            style = {**line_style(index), "linestyle": "", "markersize": 5.0}
            axes.plot(row[key] / unit, row["rollout_mse"], label=row["label"], **style)
        axes.set_xscale("log")
        axes.set_yscale("log")
        dress(axes, label, "rollout MSE")
    if shown:
        legend(panels[0])
    return figure


def _pictures(rows: Sequence[Row], out: pathlib.Path) -> dict[str, pathlib.Path]:
    pictures = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model and row["name"] != "fp32"]
        stem = re.sub(r"\W+", "_", pathlib.Path(model).stem)
        folder = out / "pictures"
        quality = save(quality_figure(mine), folder / f"quality_{stem}")[0]
        pictures[f"Quality against size, {model}"] = quality
        # float: a value that is not finite is stored as null, and leaves a gap.
        curves = {r["label"]: np.asarray(r["eps_rel_mse_by_step"], np.float64) for r in mine}
        steps = np.asarray(mine[0]["timesteps"])
        path = plots.plot_error(steps, curves, folder / f"error_{stem}.png")
        pictures[f"Teacher-forced error by timestep, {model}"] = path
    return pictures


def write_leaderboard(
    out: pathlib.Path, rows: Sequence[Row], command: str = ""
) -> dict[str, pathlib.Path]:
    """leaderboard.md, leaderboard.csv and pictures/ under out, each whole or not at all."""
    pictures = _pictures(rows, out)
    parts = [
        "# Leaderboard",
        "Less is better but for accuracy and agreement. Variants are ordered by bits, then by rollout "
        "error; all on one model were measured on the same noise, states and labels.",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        full = next(row for row in mine if row["name"] == "fp32")
        cells = tables.rows(COLUMNS, mine, full)
        parts.append(f"## {model}\n\n{tables.markdown(COLUMNS, cells)}")
        if full["frechet_floor"] is not None:
            floor = tables.significant(full["frechet_floor"])
            parts.append(f"Floor of the Fréchet distance (as many real images): {floor}.")
    for caption, path in pictures.items():
        parts.append(f"![{caption}](<{os.path.relpath(path, out)}>)\n\n*{caption}*")
    made = f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}"
    parts.append(f"Made by `{command or 'experiments.compare.compare(...)'}` on {made}.")
    return {
        "md": write_atomic(out / "leaderboard.md", "\n\n".join(parts) + "\n"),
        "csv": write_atomic(out / "leaderboard.csv", _csv(rows)),
        **{path.stem: path for path in pictures.values()},
    }
