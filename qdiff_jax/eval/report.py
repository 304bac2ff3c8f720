"""The report of a comparison: report.json for programs, report.md and report.html for people.

report.json is strict JSON: {"format", "reference", "variants", "provenance", "pictures"}. A metric
that is nan or inf is stored as null, and the record's "nonfinite" map says which it was, e.g.
{"psnr_db": "inf"} for images that agree exactly; null with no such entry means not measured.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Group

from qdiff_jax.eval import page, tables
from qdiff_jax.eval.files import write_atomic

FORMAT = 1

# Every variant has these; more are welcome and are kept in report.json.
# key: (smallest value, largest value, may be null)
_NUMBERS = {
    "w_bits": (1, 64, False),
    "a_bits": (1, 64, False),
    "stored_bytes": (1, math.inf, False),
    "eps_rel_mse": (0, math.inf, True),
    "rollout_mse": (0, math.inf, True),
    "psnr_db": (-math.inf, math.inf, True),
    "feature_distance": (0, math.inf, True),
    "temporal_cosine": (0, 2, True),
    "temporal_mismatch": (0, 1, True),
    "calibrate_s": (0, math.inf, True),
    "reconstruct_s": (0, math.inf, True),
    "compile_s": (0, math.inf, True),
}
VARIANT_KEYS = ("name", *_NUMBERS)
PROVENANCE_KEYS = (
    "command",
    "commit",
    "machine",
    "jax_version",
    "config_fingerprint",
    "source_checkpoint_hash",
)


def reference_metrics() -> dict[str, float | None]:
    """The agreement of full precision with itself: no error, and a PSNR that no number can hold."""
    return {
        "eps_rel_mse": 0.0,
        "rollout_mse": 0.0,
        "psnr_db": None,
        "feature_distance": 0.0,
        "temporal_cosine": 0.0,
        "temporal_mismatch": 0.0,
    }


def _plain(value: Any, where: str, nonfinite: dict[str, str]) -> Any:
    """`value` as strict JSON can hold it; names of nan and inf are added to `nonfinite`."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where}: JSON keys are strings, not {key!r}.")
        inner = f"{where}." if where else ""
        return {key: _plain(item, f"{inner}{key}", nonfinite) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return _plain(np.asarray(value).tolist(), where, nonfinite)
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]", nonfinite) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[where] = str(value)
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{where}: the report cannot store a {type(value).__name__}; pass plain data.")


def _check_variant(record: Mapping[str, Any], position: int) -> dict[str, Any]:
    nonfinite = dict(record.get("nonfinite", {}))
    found: dict[str, str] = {}
    plain = _plain({k: v for k, v in record.items() if k != "nonfinite"}, "", found)
    name = plain.get("name")
    who = f"variant {name!r}" if isinstance(name, str) and name else f"variant number {position}"
    missing = [key for key in VARIANT_KEYS if key not in plain]
    if missing:
        raise ValueError(
            f"report: {who} lacks {missing}; give every key, with None for what was not measured."
        )
    if not isinstance(name, str) or not name:
        raise ValueError(f"report: {who} needs a name that is a string, got {name!r}.")
    nonfinite |= found
    for key, (least, most, nullable) in _NUMBERS.items():
        value = plain[key]
        if value is None and nullable:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            got = nonfinite.get(key, repr(value))
            raise ValueError(f"report: {key} of {who} must be a number, got {got}.")
        if not least <= value <= most:
            raise ValueError(f"report: {key} of {who} is {value}, outside [{least}, {most}].")
    if not isinstance(plain["stored_bytes"], int):
        raise ValueError(f"report: stored_bytes of {who} must be an integer number of bytes.")
    return plain | ({"nonfinite": nonfinite} if nonfinite else {})


def check_variants(variants: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records as plain strict-JSON data, with nan and inf moved into "nonfinite".

    Array scalars become Python numbers. Checking twice changes nothing.

    Raises ValueError when there are none, two have one name, or one lacks a key of `VARIANT_KEYS`
    or holds a value of the wrong type or outside its range; TypeError for data JSON cannot hold.
    """
    checked = [_check_variant(record, position) for position, record in enumerate(variants)]
    names = [record["name"] for record in checked]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        raise ValueError(f"report: needs variants with different names; repeated: {twice}.")
    return checked


def _reference(variants: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    for record in variants:
        if record["name"] == name:
            return record
    names = [record["name"] for record in variants]
    raise ValueError(f"report: the reference {name!r} is not among the variants {names}.")


def terminal_table(variants: Sequence[Mapping[str, Any]], reference: str = "fp32") -> Group:
    """The tables for `rich.console.Console().print`. Raises as `check_variants` does, and
    ValueError when no variant is called `reference`."""
    checked = check_variants(variants)
    return tables.terminal(checked, _reference(checked, reference))


def _pictures(pictures: Mapping[str, Any]) -> dict[str, pathlib.Path]:
    paths = {caption: pathlib.Path(path) for caption, path in pictures.items()}
    for caption, path in paths.items():
        if not path.is_file():
            raise FileNotFoundError(f"report: the picture {caption!r} is not at {path}.")
        if path.suffix.lower() != ".png":
            raise ValueError(f"report: the picture {caption!r} must be a PNG, got {path.name}.")
    return paths


def write_report(
    workdir: str | os.PathLike,
    variants: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any],
    pictures: Mapping[str, str | os.PathLike],
    *,
    reference: str = "fp32",
    title: str = "Quantized diffusion: agreement with full precision",
) -> dict[str, pathlib.Path]:
    """Writes report.json, report.md and report.html into `workdir`, each whole or not at all.

    Args:
      workdir: made if need be.
      variants: a record for each model, shown in this order, with the keys `VARIANT_KEYS`; see
        `check_variants`. Further keys (per-step errors, thirds) go to report.json only.
      provenance: at least `PROVENANCE_KEYS`; what is needed to run this again.
      pictures: caption -> PNG; embedded in the page, linked from the others by relative path.
      reference: the variant that sizes are compared with.
      title: the heading.

    Returns {"json", "md", "html"} -> path.

    Raises ValueError or TypeError naming the variant and the key when a record is unusable, and
    FileNotFoundError for a missing picture; nothing is written then.
    """
    workdir = pathlib.Path(workdir)
    checked = check_variants(variants)
    base = _reference(checked, reference)
    missing = [key for key in PROVENANCE_KEYS if key not in provenance]
    if missing:
        raise ValueError(f"report: the provenance lacks {missing}.")
    broken: dict[str, str] = {}
    origin = _plain(provenance, "provenance", broken)
    if broken:
        raise ValueError(f"report: the provenance holds numbers that are not finite: {broken}.")
    paths = _pictures(pictures)
    links = {caption: os.path.relpath(path, workdir) for caption, path in paths.items()}

    shown = [(name, cols, tables.rows(cols, checked, base)) for name, cols in tables.TABLES]
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in origin.items()}
    lead = (
        f"{len(checked)} models sampled from the same noise and compared with {reference}. "
        f"Except for PSNR, less is better in the first table and 0 is full precision itself."
    )
    document = {
        "format": FORMAT,
        "reference": reference,
        "variants": checked,
        "provenance": origin,
        "pictures": links,
    }
    parts = [f"# {title}", lead]
    parts += [f"## {name}\n\n{tables.markdown(cols, cells)}" for name, cols, cells in shown]
    if links:
        images = [f"![{caption}](<{link}>)\n\n*{caption}*" for caption, link in links.items()]
        parts.append("\n\n".join(["## Pictures", *images]))
    parts.append("## Provenance\n\n" + "\n".join(f"- {k}: `{v}`" for k, v in texts.items()))
    return {
        "json": write_atomic(
            workdir / "report.json",
            json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n",
        ),
        "md": write_atomic(workdir / "report.md", "\n\n".join(parts) + "\n"),
        "html": write_atomic(workdir / "report.html", page.page(title, lead, shown, paths, texts)),
    }


def read_report(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a report.json back and checks it.

    Raises ValueError when it is not strict JSON, is of another format version, or a variant is
    unusable.
    """

    def refuse(literal: str) -> None:
        raise ValueError(f"report: {path} holds {literal}, which is not JSON.")

    document = json.loads(pathlib.Path(path).read_text("utf-8"), parse_constant=refuse)
    if document.get("format") != FORMAT:
        raise ValueError(
            f"report: {path} has format {document.get('format')!r}; this version reads {FORMAT}."
        )
    document["variants"] = check_variants(document["variants"])
    return document
