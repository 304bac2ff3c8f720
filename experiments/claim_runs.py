"""The runs that a claim is measured on: their configs and folders, each made once by whoever comes first."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from experiments.compare import Run, is_finished, make_run, parse_overrides, share
from experiments.quantize import quantize
from experiments.quantize_config import read_config
from experiments.quantize_report import commit
from qdiff_jax.config import fingerprint
from qdiff_jax.eval.cost import network_cost
from qdiff_jax.eval.report import read_report
from qdiff_jax.eval.samples import Samples
from qdiff_jax.export.bundle import load_bundle
from qdiff_jax.models import registry
from qdiff_jax.models.families import example_inputs
from qdiff_jax.observe.archive import load_arrays, load_record, save_record
from qdiff_jax.runtime.programs import release_programs
from qdiff_jax.sites import list_sites

# "error": the part lowers the rollout error. "no_worse": it raises it by less than MARGIN. "cheaper": that, at
# fewer bit operations. "spread": it brings the variance of the samples nearer to full precision's.
AIMS = ("error", "no_worse", "cheaper", "spread")
MARGIN = 1.05


class Claim(NamedTuple):
    """name, group, model, method, part, bits: of the claim. sides: (config file with its words, changes
    "key=value") with the part and without it; or four, whose first pair is held against the second. aim: of
    AIMS. seeds: how many. of: the claims that this one needs all of, in place of sides."""

    name: str
    group: str
    model: str
    method: str
    part: str
    bits: str
    sides: tuple[tuple[str, tuple[str, ...]], ...]
    aim: str
    seeds: int
    published: str
    of: tuple[str, ...]


class Made(NamedTuple):
    """The workdir of a run, and why it has no result; "" where it has one. diverged: whether for numbers that
    are not finite, or for bad input of whatever kind."""

    workdir: pathlib.Path
    why: str = ""
    diverged: bool = False


def runs_of(claim: Claim, config: ConfigDict, seed: int) -> tuple[Run, ...]:
    """The runs of a claim's sides with one seed. Raises ValueError for a config that is wrong."""
    return tuple(_run(*side, int(seed), _measured(config)) for side in claim.sides)


def _measured(config: ConfigDict) -> tuple[tuple[str, Any], ...]:
    """What every run of a ledger is measured by."""
    return (
        ("evaluation.samples", int(config.samples)),
        ("sampler.guidance_scale", float(config.guidance_scale)),
    )


@functools.cache  # as the file was when the ledger began, whatever happens to it in the hours after
def _given(given: str) -> Run:
    return make_run(given, {})


@functools.lru_cache(maxsize=1024)
def _run(given: str, changes: tuple[str, ...], seed: int, measured: tuple) -> Run:
    run = _given(given)
    overrides = {**parse_overrides(changes), **dict(measured), "seed": seed}
    own = run.config.copy_and_resolve_references()
    with own.unlocked():
        # In the order of the report, where a config's method comes last; a ConfigDict sorts by name. The
        # round-to-nearest beside it is read by no claim.
        method = list(run.parsed.variants)[-1]
        own.variants = ConfigDict({method: own.variants[method]})
        for key, value in overrides.items():
            # A key that the file does not write is one all the same: reading it refuses a misspelt one.
            *folders, last = key.split(".")
            place = own
            for folder in folders:
                if folder not in place:
                    place[folder] = ConfigDict()
                place = place[folder]
            place[last] = value
    parsed = read_config(own)
    digits = definition(parsed)[:8]
    name = f"{parsed.model}-{method}-seed{seed}-{digits}".replace(":", "-")
    return Run(name, given, own, parsed)


def definition(parsed: Any) -> str:
    """What a run is, by its config and the weights of its model: equal for the same run under other words."""
    return fingerprint({"config": fingerprint(parsed), "weights": _weights(parsed.model)})


@functools.lru_cache(maxsize=8)
def _weights(model: str) -> str:
    return registry.load(model).source["sha256"]


def make(run: Run, out: pathlib.Path, command: str = "experiments.claims") -> Made:
    """The run, finished or failed; nothing is done again, and full precision is made once for all.

    A second process that wants the same run waits for the first. What diverged, or was refused, is remembered
    with its sentence, and tried again only by other code.
    """
    workdir = out / "runs" / run.name
    failed = workdir / "failed.json"
    # What full precision drew belongs to its weights, whatever they are called.
    weights = _weights(run.parsed.model)[:8]
    kept = run._replace(
        parsed=dataclasses.replace(run.parsed, model=f"{run.parsed.model}-{weights}")
    )
    with locked(out / "locks" / run.name):
        if failed.exists() and (held := load_record(failed))["commit"] == commit():
            return Made(workdir, held["why"], held["diverged"])
        share(out, kept, workdir)
        if not is_finished(run, workdir):
            try:
                quantize(run.config, workdir, f"{command}, run {run.name}", pictures=False)
            except (FloatingPointError, ValueError) as error:
                logging.exception("%s ended without a result", run.name)
                made = Made(workdir, str(error), isinstance(error, FloatingPointError))
                held = {"why": made.why, "diverged": made.diverged, "commit": commit()}
                save_record(failed, held)
                return made
            finally:
                release_programs()  # dozens of runs compile more than a process may map
        failed.unlink(missing_ok=True)
        share(out, kept, workdir)
    return Made(workdir)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Hold a file that one process at a time can hold; the system lets go of it when the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.info("%s is being made by another process: waiting for it", path.name)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def samples_of(workdir: pathlib.Path, name: str) -> np.ndarray:
    """[N, H, W, C] final images of a variant."""
    path = workdir / "variants" / name / "samples.npz"
    return load_arrays(path, Samples).x.astype(np.float64)


def errors(workdir: pathlib.Path, name: str) -> np.ndarray:
    """[N] mean squared error of each final image from full precision's."""
    difference = samples_of(workdir, name) - samples_of(workdir, "fp32")
    return np.square(difference).reshape(len(difference), -1).mean(axis=1)


def record_of(workdir: pathlib.Path, name: str) -> dict:
    """The variant's record in the report."""
    records = read_report(workdir / "report.json")["variants"]
    return next(record for record in records if record["name"] == name)


def commit_of(workdir: pathlib.Path, name: str) -> str:
    """Of the code that quantized the variant; of its report where the former was not kept."""
    held = load_record(workdir / "variants" / name / "quantize.json").get("commit")
    return held or read_report(workdir / "report.json")["provenance"]["commit"]


def bitops(run: Run, workdir: pathlib.Path) -> float:
    """Bit operations of one evaluation of the quantized network."""
    (name,) = run.parsed.variants
    module = registry.load(run.parsed.model).model.module
    sites = list_sites(module, *example_inputs(module.config))
    return network_cost(sites, load_bundle(workdir / "variants" / name / "bundle").quant).bitops
