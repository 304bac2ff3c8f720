"""The columns of the leaderboard of `experiments.compare`, and its CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from experiments.compare_rows import SECONDS, Row
from qdiff_jax.eval import tables
from qdiff_jax.eval.tables import Column

Cell = Callable[[Row, Row], str]


def _optional(key: str, write: Callable) -> Cell:
    def cell(row: Row, reference: Row) -> str:
        del reference
        if key in row.get("nonfinite", ()):
            return "diverged"
        return tables.ABSENT if row[key] is None else write(row[key])

    return cell


def _frechet(row: Row, reference: Row) -> str:
    def with_interval(value: float) -> str:
        ends = (tables.significant(row[f"frechet_{end}"]) for end in ("low", "high"))
        return f"{tables.significant(value)} [{', '.join(ends)}]"

    return _optional("frechet_value", with_interval)(row, reference)


def _times_fewer(row: Row, reference: Row) -> str:
    return _optional("bitops", lambda bitops: f"{reference['bitops'] / bitops:.1f}×")(row, row)


def _seconds(kind: str) -> Cell:
    def cell(row: Row, reference: Row) -> str:
        del reference
        both = [row[f"{kind}_{clock}"] for clock in ("s", "cpu_s")]
        if both == [None, None]:
            return tables.ABSENT
        return " / ".join(tables.ABSENT if v is None else tables.significant(v) for v in both)

    return cell


def commits_of(row: Row) -> list[str]:
    """Of its records, each once; "unknown" for a record from before they had one."""
    return list(dict.fromkeys(commit or "unknown" for commit in row["commits"]))


COLUMNS = (
    Column("#", "", "Number of the point in the picture.", lambda r, _: str(r["number"])),
    Column("Variant", "", "Name of the variant in its config.", lambda r, _: r["label"]),
    Column(
        "Bits",
        "W/A",
        "Target bits of the weights and of the activations.",
        lambda r, _: f"{r['w_bits']:g}/{r['a_bits']:g}",
    ),
    Column(
        "Policy",
        "",
        "Who is quantized, and at how many bits; errors compare under one policy only.",
        _optional("policy", str),
    ),
    Column(
        "Sampler",
        "bits",
        "Of the sampler's own tensors, where they are quantized too.",
        _optional("tensor_bits", str),
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
        "From real images, in the features of a network, of hundreds of samples or more; 95 % interval.",
        _frechet,
    ),
    Column(
        "Stored",
        "",
        "Size of the model as stored, scales, zero points and corrections included.",
        _optional("stored_bytes", tables.size),
    ),
    Column(
        "BitOps",
        "G",
        "Multiply-accumulates x weight bits x activation bits of one network evaluation, in 10^9.",
        _optional("bitops", lambda v: tables.significant(v / 1e9)),
    ),
    Column("Fewer", "", "How many times fewer BitOps than full precision.", _times_fewer),
    Column(
        "Record",
        "wall / CPU s",
        "Sampling the full-precision trajectories to calibrate on, without compiling; once for all runs that "
        "take as many.",
        _seconds("record"),
    ),
    Column(
        "Calibrate",
        "wall / CPU s",
        "Measuring ranges and corrections, without compiling.",
        _seconds("calibrate"),
    ),
    Column("Reconstruct", "wall / CPU s", "Learning, without compiling.", _seconds("reconstruct")),
    Column(
        "Commit",
        "",
        "Of the code that made the row's records: quantizing, measuring, judging.",
        lambda r, _: ", ".join(commits_of(r)) or tables.ABSENT,
    ),
)
CSV_KEYS = (
    "number",
    "model",
    "run",
    "label",
    "w_bits",
    "a_bits",
    "policy",
    "tensor_bits",
    "calibration_samples",
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
    *SECONDS,
    "compile_s",
    "commit",
)


def as_csv(rows: Sequence[Row]) -> str:
    """All rows under `CSV_KEYS`; what was not measured is empty, what was not finite says so."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_KEYS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        row = {**row, "commit": " ".join(commits_of(row))}
        broken = row.get("nonfinite", {})
        writer.writerow({key: broken.get(key, row.get(key)) for key in CSV_KEYS})
    return out.getvalue()
