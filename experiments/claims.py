"""The ledger of claims: what each part of a method does to the error here, beside what its paper says.

    python -m experiments.claims --config=configs/claims.py --out=W
    python -m experiments.claims --config=configs/claims.py:model=unet,seed=1 --out=W
    python -m experiments.claims --config=configs/claims.py --out=W --assemble

Every claim is a pair of runs of `experiments.quantize`, with the part and without it, per seed (or two pairs,
one held against the other). Runs lie under OUT/runs, are made once, whatever the words that ask for them, and
resume; seeds come one after the other, so that an early end leaves every claim some. A claim with one seed is a
row, a file under OUT/rows. Several processes may work in one OUT at a time, one for each model and seed say:
`claim=`, `group=`, `model=` and `seed=` choose what a process runs. claims.md and claims.json are made from all
rows of the config's claims whenever one is added, and by `--assemble`, which runs nothing.

A verdict rests on the paired squared errors of the final images, from shared noise, sample by sample and over
seeds (`qdiff_jax.eval.verdicts`). Beside it stand the ratios of the errors of the noise estimate and of the
temporal features. A run that diverges, or is refused, leaves its sentence in the row, and the ledger goes on.
Runs and rows are named by their configs and the weights, not by the code: start, resume and assemble from one
checkout that stays as it is. Every row says the commits that made it.
"""

from __future__ import annotations

import pathlib
import shlex
import sys
from typing import Any

import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments import command_line
from experiments.claim_runs import (
    Claim,
    bitops,
    commit_of,
    definition,
    errors,
    record_of,
    runs_of,
    samples_of,
    shift_share,
)
from experiments.claims_report import OTHER_ERRORS, assemble
from experiments.compare_runs import Run
from experiments.made_once import Made, attempt
from experiments.quantize_job import prepare
from qdiff_jax.config import fingerprint
from qdiff_jax.eval.verdicts import Effect, paired_effect, spread_effect
from qdiff_jax.observe.archive import load_record, save_record
from qdiff_jax.runtime.cache import enable_compile_cache
from qdiff_jax.runtime.progress import log_progress

_SIDES = {
    2: ("with it", "without it"),
    4: ("first pair, with it", "first pair, without it", "second, with it", "second, without it"),
}


def claims_of(config: ConfigDict) -> list[Claim]:
    """All claims of a ledger, whose configs are read: a wrong one is found before the first run."""
    claims = [Claim(*values) for values in config.claims]
    for claim in claims:
        runs_of(claim, config, 0)
    return claims


def row_path(claim: Claim, config: ConfigDict, seed: int, out: pathlib.Path) -> pathlib.Path:
    """The file of a claim's row with one seed; another for another definition of the claim."""
    sides = [definition(run.parsed) for run in runs_of(claim, config, 0)]
    digits = fingerprint({"aim": claim.aim, "sides": sides})[:8]
    return out / "rows" / f"{claim.model}-{claim.name}-{claim.bits}-{digits}-seed{seed}.json"


def measure(
    claim: Claim, config: ConfigDict, seed: int, out: pathlib.Path, command: str
) -> dict[str, Any]:
    """Run what is missing for a claim with one seed; returns its row, with "why" if there is no effect."""
    row = _named(claim, seed)
    runs = runs_of(claim, config, seed)
    made = []
    for run, side in zip(runs, _SIDES[len(runs)], strict=True):
        one = attempt(run, out, command)
        if not (one.why or np.isfinite(samples_of(one.workdir, *run.parsed.variants)).all()):
            one = one._replace(why="its samples are not finite", diverged=True)
        if one.why:
            return {**row, "why": f"{side}: {one.why}", "diverged": one.diverged}
        made.append(one)
    try:
        found = _effect(claim.aim, runs, made)
    except ValueError as error:
        logging.exception("%s, seed %d", claim.name, seed)
        return {**row, "why": str(error), "diverged": False}
    return {**row, "why": "", **found}


def _named(claim: Claim, seed: int) -> dict[str, Any]:
    return {"model": claim.model, "name": claim.name, "bits": claim.bits, "seed": seed}


def _effect(aim: str, runs: tuple[Run, ...], made: list[Made]) -> dict[str, Any]:
    places = [(one.workdir, *run.parsed.variants) for run, one in zip(runs, made, strict=True)]
    seen = [errors(*place) for place in places]
    if aim == "spread":
        samples = [samples_of(*place) for place in places]
        effect = spread_effect(*samples, samples_of(places[0][0], "fp32"))
    else:
        effect = _ratio([whole for whole, _ in seen])
    found = {"effect": effect._asdict(), "commits": sorted({commit_of(*p) for p in places})}
    found["shift_shares"] = [shift_share(*pair) for pair in seen]
    records = [
        {**record_of(*place), "rollout_about_shift": float(about.mean())}
        for place, (_, about) in zip(places, seen, strict=True)
    ]
    for key in OTHER_ERRORS:
        values = [record[key] for record in records]
        # None where features are not compared; 0 where an error has vanished: neither has a ratio.
        found[key] = _quotient(values) if all(values) else None
    if aim == "cheaper":
        costs = [bitops(run, one.workdir) for run, one in zip(runs, made, strict=True)]
        found["bitops"] = costs
    return found


def _ratio(seen: list) -> Effect:
    if len(seen) == 2:
        return paired_effect(*seen)
    return paired_effect([seen[0], seen[3]], [seen[1], seen[2]])


def _quotient(values: list[float]) -> float:
    first = values[0] / values[1]
    return first if len(values) == 2 else first / (values[2] / values[3])


def ledger(
    config: ConfigDict, out: pathlib.Path, command: str = "experiments.claims"
) -> pathlib.Path:
    """Measure the claims that a config chooses, seed by seed, and write the ledger again after each.

    Raises ValueError, before anything runs, for a run whose model or settings cannot be; RuntimeError, after
    all others, for claims that ended in an error nobody foresaw, whose rows say so.
    """
    claims = claims_of(config)
    chosen = {tuple(pair) for pair in config.chosen}
    todo = []
    for seed in config.only_seeds or range(max(claim.seeds for claim in claims)):
        for claim in claims:
            if not claim.sides or (claim.model, claim.name) not in chosen or seed >= claim.seeds:
                continue
            path = row_path(claim, config, seed, out)
            if not path.exists() or load_record(path)["why"]:
                todo.append((claim, seed, path))
    wanted = {run.name: run for claim, _, _ in todo for run in runs_of(claim, config, 0)}
    for run in wanted.values():
        prepare(run.config)
    broken = []
    for claim, seed, path in todo:
        logging.info("claim %s on %s, seed %d", claim.name, claim.model, seed)
        try:
            row = measure(claim, config, seed, out, command)
        except Exception as error:  # hours of other claims wait behind this one
            logging.exception("%s, seed %d", claim.name, seed)
            why = f"{type(error).__name__}: {error}"
            row = {**_named(claim, seed), "why": why, "diverged": False}
            broken.append(f"{claim.name} of {claim.model} with seed {seed} ({row['why']})")
        save_record(path, row)
        assembled(config, out, command, claims)
    written = assembled(config, out, command, claims)
    if broken:
        raise RuntimeError(
            f"these claims have no result, and {written} says so: {'; '.join(broken)}; the tracebacks are in "
            "the log, and the same command tries them again."
        )
    return written


def assembled(
    config: ConfigDict, out: pathlib.Path, command: str, claims: list[Claim] | None = None
) -> pathlib.Path:
    """claims.md and claims.json from the rows that are there; runs nothing."""
    rows: dict[tuple[str, str], list[dict]] = {}
    claims = claims_of(config) if claims is None else claims
    for claim in claims:
        # Of all seeds that are there, however many this config asks for.
        first = row_path(claim, config, 0, out)
        paths = first.parent.glob(first.name.replace("-seed0.json", "-seed*.json"))
        found = [load_record(path) for path in paths]
        rows[claim.model, claim.name] = sorted(found, key=lambda row: row["seed"])
    return assemble(claims, rows, config, out, command)


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    log_progress()
    enable_compile_cache(flags.FLAGS.compile_cache)
    command = shlex.join(["python", "-m", "experiments.claims", *sys.argv[1:]])
    write = assembled if flags.FLAGS.assemble else ledger
    print(write(flags.FLAGS.config, pathlib.Path(flags.FLAGS.out), command).read_text("utf-8"))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file, path:arg.", lock_config=True)
    flags.DEFINE_string("out", None, "Runs and ledger go here; the same again resumes.")
    flags.DEFINE_boolean("assemble", False, "Only write the ledger of the rows that are there.")
    flags.DEFINE_string("compile_cache", None, "Folder for compiled programs.")
    flags.mark_flags_as_required(["config", "out"])
    command_line.run(main)
