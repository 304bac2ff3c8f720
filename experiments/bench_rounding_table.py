"""The table of the rounding bench: means over seeds, what nothing beats, pictures, where figures come from."""

from __future__ import annotations

import collections
import csv
import io
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from qdiff_jax.analysis.column import column, dress, legend_below, line_style, plain_log, save
from qdiff_jax.eval.curves import COLOURS, MARKERS
from qdiff_jax.eval.files import write_atomic
from qdiff_jax.eval.tables import ABSENT, significant

WHICH = ("model", "bits", "recipe", "seed")
FIGURES = ("eps_rel_mse", "rollout_mse", "cpu_s", "compile_s")
MADE = ("command", "commit", "machine", "jax_version")
COLUMNS = (*WHICH, *FIGURES, "fell_back", "units", *MADE, "notes")
NOT_KEPT = "not recorded"
SHARES = {"eps_rel_mse": "eps_share", "rollout_mse": "rollout_share"}
NEAREST = "nearest"  # the recipe that all others are held against, seed by seed
LEAD = (
    "Mean over seeds ± half the range. Seeds may differ by more than recipes, and not all recipes have as "
    "many: shares are of the error of rounding to nearest with the same seed, their geometric mean over "
    "seeds. Recipes are sorted by that of the eps error, and * marks those that no other beats in both it "
    "and CPU seconds. CPU seconds are of all threads in the stages that decide codes and learned scales, "
    "without compiling and without calibrating activation ranges. Compile seconds are of the wall, in a "
    "cell's first run; they depend on how much of its programs the disk cache held, and on who else "
    "used the core.",
    "With quantized activations rounding is not all that differs. Closed form and GPTQ calibrate activation "
    "ranges first, on the network in full precision, and round in a stream that carries the activation "
    'quantizers, so that weights make up for them too (not where a recipe says "blind"). AdaRound\'s stream '
    "has none, and its ranges, like those of nearest, are calibrated afterwards, on the network with quantized "
    'weights, as in the papers; "+ scales" then trains the scales of activations.',
)


def read_rows(path: pathlib.Path) -> list[dict]:
    """The rows that `write_results` left in a rounding.csv. Raises ValueError, naming file and line, for a file
    that lacks a column or has something else where a number should be."""
    numbers = {"seed": int, "fell_back": int, "units": int, **dict.fromkeys(FIGURES, float)}
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := set(COLUMNS) - set(reader.fieldnames or ()):
            raise ValueError(f"{path} is no table of this bench: it lacks {sorted(missing)}.")
        for held in reader:
            row = {key: held[key] for key in COLUMNS}
            try:
                row |= {key: kind(row[key]) if row[key] else None for key, kind in numbers.items()}
                row["notes"] = row["notes"].splitlines()
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}.") from error
            rows.append(row)
    return rows


def merged(kept: Iterable[Mapping], rows: Iterable[Mapping]) -> list[Mapping]:
    """Both, sorted by cell; of a cell that both have, the row of the second."""
    found = {tuple(row[key] for key in WHICH): row for given in (kept, rows) for row in given}
    return [found[which] for which in sorted(found)]


def summaries(rows: Iterable[Mapping]) -> list[dict]:
    """Mean and spread (largest - smallest over seeds) of each (model, bits, recipe), best eps error first.

    eps_share, rollout_share: `shares`. A recipe that diverged with any seed has None for its error and comes
    last, one without shares before it by its error. fell_back and units are sums.
    """
    rows = list(rows)
    groups: dict[tuple, list[Mapping]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in WHICH[:3]), []).append(row)
    nearest = {(r["model"], r["bits"], r["seed"]): r for r in rows if r["recipe"] == NEAREST}
    found = []
    for (model, bits, recipe), held in groups.items():
        entry = {"model": model, "bits": bits, "recipe": recipe, "seeds": len(held)}
        for key in FIGURES:
            values = [row[key] for row in held]
            sound = None not in values
            entry[key] = float(np.mean(values)) if sound else None
            entry[f"{key}_spread"] = float(np.ptp(values)) if sound else None
        entry |= shares(held, [nearest.get((model, bits, row["seed"])) for row in held])
        for key in ("fell_back", "units"):
            values = [row[key] for row in held]
            entry[key] = None if None in values else sum(values)
        found.append(entry)

    def place(e):
        own = [np.inf if e[key] is None else e[key] for key in ("eps_share", "eps_rel_mse")]
        return e["model"], e["bits"], *own

    return sorted(found, key=place)


def shares(rows: Sequence[Mapping], nearest: Sequence[Mapping | None]) -> dict[str, float | None]:
    """{"eps_share", "rollout_share"}: errors over those of rounding to nearest with the same seeds, geometric
    means; None where either is missing, diverged, or 0."""
    found = {}
    for error, name in SHARES.items():
        pairs = [(row[error], other and other[error]) for row, other in zip(rows, nearest)]
        sound = all(a and b for a, b in pairs)
        found[name] = float(np.exp(np.mean([np.log(a / b) for a, b in pairs]))) if sound else None
    return found


def compared(entries: Sequence[Mapping], error: str) -> str:
    """The key to compare this error by: shares where all that did not diverge have them, else the error."""
    name = SHARES[error]
    return name if all(e[name] for e in entries if e[error] is not None) else error


def pareto(entries: Sequence[Mapping], error: str = "eps_rel_mse") -> set[str]:
    """Recipes that no other beats in both this error, as `compared`, and CPU seconds."""
    error = compared(entries, error)
    sound = [e for e in entries if e[error] is not None]
    return {
        e["recipe"]
        for e in sound
        if not any(o[error] <= e[error] and o["cpu_s"] < e["cpu_s"] for o in sound if o is not e)
    }


def curves(entries: Iterable[Mapping]) -> dict[str, list[Mapping]]:
    """{label: entries by CPU seconds}: AdaRound's lengths at one rate are one curve, all others points."""
    found: dict[str, list[Mapping]] = {}
    for entry in sorted(entries, key=lambda e: np.inf if e["cpu_s"] is None else e["cpu_s"]):
        label = re.sub(r"^adaround \d+ at (.*)", r"adaround at \1", entry["recipe"])
        found.setdefault(label, []).append(entry)
    return dict(sorted(found.items()))


def _draw(entries: Sequence[Mapping], labels: Sequence[str], stem: pathlib.Path) -> pathlib.Path:
    """Both errors, as `compared`, over CPU seconds. labels: of all pictures, so that a recipe looks the same
    in each."""
    titles = {"eps_rel_mse": "eps error (relative MSE)", "eps_share": "eps error / nearest's"}
    titles |= {"rollout_mse": "rollout MSE", "rollout_share": "rollout MSE / nearest's"}
    figure, panels = column((2.1, 2.1))
    for axes, error in zip(panels, SHARES, strict=True):
        sound = [e for e in entries if e[error]]
        front = pareto(sound, error)
        error = compared(sound, error)
        for label, held in curves(sound).items():
            position = labels.index(label)
            style = {**line_style(position), "markersize": 4.0, "linewidth": 0.8}
            if len(held) == 1:
                style["linestyle"] = "none"
            again = position // len(COLOURS)
            if again:  # colours begin again: hollow, and then with other markers
                style["markerfacecolor"] = "white"
                style["marker"] = MARKERS[(position + again - 1) % len(MARKERS)]
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
        dress(axes, "CPU seconds (compiling apart)" if axes is panels[-1] else "", titles[error])
        plain_log(axes)
    legend_below(figure, panels[0])
    return save(figure, stem)[0]


def write_results(out: pathlib.Path, rows: Sequence[Mapping]) -> pathlib.Path:
    """rounding.md, rounding.csv and pictures under out. rows: of all cells there."""
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({**row, "notes": "\n".join(row["notes"])} for row in rows)
    write_atomic(out / "rounding.csv", table.getvalue())
    parts = ["# Rounding weights: error against CPU seconds", *LEAD]
    entries = summaries(rows)
    labels = list(curves(entries))
    for model, bits in dict.fromkeys((e["model"], e["bits"]) for e in entries):
        mine = [e for e in entries if (e["model"], e["bits"]) == (model, bits)]
        stem = re.sub(r"\W+", "_", f"rounding_{pathlib.Path(model).stem}_{bits}")
        own = [row for row in rows if (row["model"], row["bits"]) == (model, bits)]
        parts += [f"## {model}, {bits}", _table(mine), *_notes(own)]
        if all(any(e[error] for e in mine) for error in SHARES):  # not all of them diverged
            picture = _draw(mine, labels, out / "pictures" / stem)
            parts.append(f"![]({picture.relative_to(out)})")
    parts += _origins(rows)
    return write_atomic(out / "rounding.md", "\n\n".join(parts) + "\n")


def _table(entries: Sequence[Mapping]) -> str:
    """Of one model and width, with a column of fallbacks if there are any."""
    front = pareto(entries)
    heads = ["recipe", "eps error", "share", "rollout MSE", "share", "CPU s", "compile s", "seeds"]
    fallen = any(e["fell_back"] for e in entries)
    if fallen:
        heads.append("fell back to nearest, of units")

    def cell(entry, key):
        if entry[key] is None:
            return "diverged" if key in ("eps_rel_mse", "rollout_mse") else ABSENT
        spread = entry[f"{key}_spread"]
        return significant(entry[key]) + (f" ± {significant(spread / 2)}" if spread else "")

    lines = [_line(heads), "|---|" + "---:|" * (len(heads) - 1)]
    for e in entries:
        shown = [e["recipe"] + (" *" if e["recipe"] in front else "")]
        for key, share in SHARES.items():
            shown += [cell(e, key), ABSENT if e[share] is None else f"{e[share]:.3f}"]
        shown += [cell(e, key) for key in FIGURES[2:]] + [str(e["seeds"])]
        if fallen:
            shown.append(ABSENT if e["units"] is None else f"{e['fell_back']}/{e['units']}")
        lines.append(_line(shown))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _notes(rows: Iterable[Mapping]) -> list[str]:
    """What is to be said of single cells, each remark once behind its cells; without any, no paragraph."""
    found = collections.defaultdict(list)
    for row in rows:
        for note in row["notes"]:
            found[note].append(f"{row['recipe']} (seed {row['seed']})")
    lines = [f"- {', '.join(where)}: {note}." for note, where in found.items()]
    return ["\n".join(lines)] if lines else []


def _origins(rows: Sequence[Mapping]) -> list[str]:
    """Where all cells come from, by commit, machine and version, and the commands."""
    places = collections.Counter(tuple(row[key] for key in MADE[1:]) for row in rows)
    commands = collections.Counter(row["command"] for row in rows)
    lines = [f"- commit {c}, {m}, jax {v}: {_cells(n)}" for (c, m, v), n in places.items()]
    for command, n in commands.items():
        told = f"`{command}`"
        if command == NOT_KEPT:
            told = "a command that was not recorded (cells made earlier; commit and machine by their reports)"
        lines.append(f"- {told}: {_cells(n)}")
    parts = ["## Made by", "\n".join(lines)]
    if len(places) > 1:
        parts.append(
            "**Not all cells were made at one commit, on one machine, with one version of JAX: their seconds, "
            "and perhaps their errors, do not compare in full.** `rounding.csv` says which is which."
        )
    return parts


def _cells(count: int) -> str:
    return "1 cell" if count == 1 else f"{count} cells"
