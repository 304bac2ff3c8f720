"""The ledger of claims: what each part of a method does to the error here, beside what its paper says.

    python -m experiments.claims --config=configs/claims.py --out=W

Every claim is a pair of runs of `experiments.quantize`, with the part and without it, per seed; runs lie under
OUT/runs, are made once and resume. A verdict rests on the paired squared errors of the final images, from
shared noise: *holds* if the part lowers them beyond the 95 % interval with every seed, *reversed* if it
raises them with every seed, else *no effect*. Beside it stand the ratios of the errors of the noise estimate
and of the temporal features. Writes claims.md and claims.json.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from experiments import command_line
from experiments.compare import Run, make_run, run_once
from experiments.quantize_config import read_config
from qdiff_jax.eval.files import write_atomic
from qdiff_jax.eval.report import read_report
from qdiff_jax.eval.samples import Samples
from qdiff_jax.eval.tables import ABSENT, significant
from qdiff_jax.eval.verdicts import Effect, overall, paired_effect, verdict
from qdiff_jax.observe.archive import load_arrays
from qdiff_jax.runtime.cache import enable_compile_cache
from qdiff_jax.runtime.progress import log_progress

OTHER_ERRORS = {"eps_rel_mse": "eps error", "temporal_cosine": "temporal features"}


class Claim(NamedTuple):
    """name, model, method, part: of the claim; with_it, without: config files with their words."""

    name: str
    model: str
    method: str
    part: str
    with_it: str
    without: str
    bits: str
    published: str


def runs_of(claim: Claim, config: ConfigDict) -> list[tuple[Run, Run]]:
    """(with the part, without it) for every seed. Raises ValueError for a config that is wrong."""
    pairs = []
    for seed in config.seeds:
        overrides = {
            "evaluation.samples": int(config.samples),
            "sampler.guidance_scale": float(config.guidance_scale),
            "seed": int(seed),
        }
        pair = (make_run(path, overrides) for path in (claim.with_it, claim.without))
        pairs.append(tuple(_alone(run, f"{run.name}-seed{seed}") for run in pair))
    return pairs


def _alone(run: Run, name: str) -> Run:
    """A config's method without the round-to-nearest beside it, which no claim reads."""
    own = run.config.copy_and_resolve_references()
    with own.unlocked():
        # In the order of the report, where a config's method comes last; a ConfigDict sorts by name.
        method = list(run.parsed.variants)[-1]
        own.variants = ConfigDict({method: own.variants[method]})
    return Run(name, run.given, own, read_config(own))


def errors(workdir: pathlib.Path, name: str) -> np.ndarray:
    """[N] mean squared error of each final image from full precision's."""
    ours, full = (
        load_arrays(workdir / "variants" / which / "samples.npz", Samples).x.astype(np.float64)
        for which in (name, "fp32")
    )
    return np.square(ours - full).reshape(len(ours), -1).mean(axis=1)


def measure(
    claim: Claim, pairs: list[tuple[Run, Run]], config: ConfigDict, out: pathlib.Path
) -> dict[str, Any]:
    """Run what is missing for a claim, whose `runs_of` are `pairs`; returns its row of the ledger."""
    effects: list[Effect] = []
    ratios: dict[str, list[float]] = {key: [] for key in OTHER_ERRORS}
    for pair in pairs:
        seen, found = [], []
        for run in pair:
            (name,) = run.parsed.variants
            workdir = run_once(run, out, f"python -m experiments.claims ({run.given})")
            seen.append(errors(workdir, name))
            records = read_report(workdir / "report.json")["variants"]
            found.append(next(record for record in records if record["name"] == name))
        effects.append(paired_effect(*seen))
        for key, values in ratios.items():
            top, bottom = (record[key] for record in found)
            if top is not None and bottom:
                values.append(top / bottom)
    ratio, smallest, largest = overall(effects)
    return {
        **claim._asdict(),
        "verdict": verdict(effects),
        "rollout_ratio": ratio,
        "smallest": smallest,
        "largest": largest,
        "effects": [effect._asdict() for effect in effects],
        "seeds": [int(seed) for seed in config.seeds],
        "samples": int(config.samples),
        "guidance_scale": float(config.guidance_scale),
        **{key: float(np.exp(np.mean(np.log(v)))) if v else None for key, v in ratios.items()},
    }


def write_ledger(rows: list[dict], out: pathlib.Path, command: str) -> pathlib.Path:
    """claims.md and claims.json under out."""
    write_atomic(out / "claims.json", json.dumps(rows, indent=1) + "\n")
    lines = [
        "| model | method | part | bits | rollout error, with / without (range over seeds) | "
        + " | ".join(OTHER_ERRORS.values())
        + " | verdict | published |",
        "|---|---|---|---|---|" + "---|" * len(OTHER_ERRORS) + "---|---|",
    ]
    for row in rows:
        others = (ABSENT if row[key] is None else significant(row[key]) for key in OTHER_ERRORS)
        spread = f"{significant(row['smallest'])} to {significant(row['largest'])}"
        lines.append(
            f"| {row['model']} | {row['method']} | {row['part']} | {row['bits']} | "
            f"{significant(row['rollout_ratio'])} ({spread}) | {' | '.join(others)} | "
            f"**{row['verdict']}** | {row['published']} |"
        )
    seeds = sorted({len(row["seeds"]) for row in rows})
    scales = sorted({row["guidance_scale"] for row in rows})
    guidance = ", ".join("none" if scale < 0 else significant(scale) for scale in scales)
    parts = [
        "# Claims of the papers, measured here",
        "Ratios below 1 mean that the part lowers the error. A verdict asks of every seed that the 95 % "
        f"interval of the paired rollout error leaves 1 out; seeds: {', '.join(map(str, seeds))}, samples: "
        f"{rows[0]['samples'] if rows else 0}, guidance: {guidance}.",
        "\n".join(lines),
        f"Made by `{command}` on {platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}.",
    ]
    return write_atomic(out / "claims.md", "\n\n".join(parts) + "\n")


def ledger(
    config: ConfigDict, out: pathlib.Path, command: str = "experiments.claims"
) -> pathlib.Path:
    """Measure every claim of a config and write the ledger, again after each claim."""
    # All configs first: a wrong one is found before the first run.
    todo = [(claim, runs_of(claim, config)) for claim in (Claim(*v) for v in config.claims)]
    path, rows = out / "claims.json", {}
    if path.exists():
        held = json.loads(path.read_text("utf-8"))
        # Those of other settings are measured again: one table has one rule.
        same = {"samples": int(config.samples), "guidance_scale": float(config.guidance_scale)}
        rows = {
            (row["model"], row["name"], row["bits"]): row
            for row in held
            if all(row.get(key) == value for key, value in same.items())
        }
    for claim, pairs in todo:
        rows[claim.model, claim.name, claim.bits] = measure(claim, pairs, config, out)
        write_ledger(list(rows.values()), out, command)
    return out / "claims.md"


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    log_progress()
    enable_compile_cache(flags.FLAGS.compile_cache)
    command = "python -m experiments.claims --config=configs/claims.py"
    print(ledger(flags.FLAGS.config, pathlib.Path(flags.FLAGS.out), command).read_text("utf-8"))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file, path:arg.", lock_config=True)
    flags.DEFINE_string("out", None, "Runs and ledger go here; the same again resumes.")
    flags.DEFINE_string("compile_cache", None, "Folder for compiled programs.")
    flags.mark_flags_as_required(["config", "out"])
    command_line.run(main)
