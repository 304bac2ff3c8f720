"""A run of `experiments.quantize` among many: made once, by whoever comes first, and remembered if it fails.

Ledger, leaderboard and benches keep their runs under OUT/runs, a folder each; what full precision drew lies
under OUT/shared for all that measure alike. Several processes may work in one OUT.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import NamedTuple

from absl import logging

from experiments.compare_runs import Run, protocol
from experiments.quantize import quantize
from experiments.quantize_report import commit
from qdiff_jax.config import fingerprint
from qdiff_jax.models import registry
from qdiff_jax.observe.archive import load_record, save_record
from qdiff_jax.runtime.programs import release_programs

# Recorded with as many trajectories as are calibrated on; the others are the same for any number.
OF_CALIBRATION = ("trajectories/calibration.json", "trajectories/calibration.npz")
SHARED_FILES = (
    *OF_CALIBRATION,
    "trajectories/held_out.json",
    "trajectories/held_out.npz",
    "variants/fp32/samples.npz",
)
FAILED = "failed.json"


class Made(NamedTuple):
    """The workdir of a run, and why it has no result; "" where it has one. diverged: whether for numbers that
    are not finite, or for bad input of whatever kind; commit: of the code that found so."""

    workdir: pathlib.Path
    why: str = ""
    diverged: bool = False
    commit: str = ""


def share(out: pathlib.Path, run: Run, workdir: pathlib.Path) -> None:
    """Full precision's files from the runs before this one, and for those after it.

    They belong to weights, not to the name of a model. Files are whole or absent, so that a link to one can be
    made at any moment.
    """
    measured = {"weights": weights_of(run.parsed.model), **protocol(run.parsed)}
    calibrated = {**measured, "calibration.samples": run.parsed.calibration.samples}
    name = re.sub(r"\W+", "-", pathlib.Path(run.parsed.model).stem)
    for file in SHARED_FILES:
        key = fingerprint(calibrated if file in OF_CALIBRATION else measured)[:16]
        common, own = out / "shared" / f"{name}-{key}" / file, workdir / file
        for source, target in ((common, own), (own, common)):
            if source.exists() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(source, target)
                except FileExistsError:  # made by another process since
                    continue
                except OSError:  # a file system without hard links
                    draft = target.with_name(f".{target.name}.draft")
                    shutil.copyfile(source, draft)
                    os.replace(draft, target)


@functools.lru_cache(maxsize=8)
def weights_of(model: str) -> str:
    """The digest of a model's weights."""
    return registry.load(model).source["sha256"]


def is_finished(run: Run, workdir: pathlib.Path) -> bool:
    """Whether the report of exactly this config is there."""
    path = workdir / "report.json"
    if not path.exists():
        return False
    made = json.loads(path.read_text("utf-8"))["provenance"]
    return made["config_fingerprint"] == fingerprint(run.parsed)


def run_once(run: Run, out: pathlib.Path, command: str) -> pathlib.Path:
    """The workdir of a run, finished: nothing is done again, and full precision is made once for all.

    A run has no pictures of its own. A second process that wants the same run waits for the first. Raises as
    `quantize` does.
    """
    with locked(out / "locks" / run.name):
        return _made(run, out, command)


def _made(run: Run, out: pathlib.Path, command: str) -> pathlib.Path:
    workdir = out / "runs" / run.name
    share(out, run, workdir)
    if not is_finished(run, workdir):
        try:
            quantize(run.config, workdir, f"{command}, run {run.name}", pictures=False)
        finally:
            release_programs()  # dozens of runs compile more than a process may map
            share(out, run, workdir)
    return workdir


def attempt(run: Run, out: pathlib.Path, command: str) -> Made:
    """The run, finished or ended without a result, now or when it was tried before.

    What diverged (FloatingPointError), or was refused in its midst (ValueError), stops no other: its sentence
    is kept in OUT/runs/NAME/failed.json, and only other code tries again, or any when that file is gone.
    """
    workdir = out / "runs" / run.name
    failed = workdir / FAILED
    with locked(
        out / "locks" / run.name
    ):  # a process that waited for it finds what the first one found
        if failed.exists() and (held := load_record(failed))["commit"] == commit():
            return Made(workdir, **held)
        try:
            _made(run, out, command)
        except (FloatingPointError, ValueError) as error:
            logging.exception("%s ended without a result", run.name)
            made = Made(workdir, str(error), isinstance(error, FloatingPointError), commit())
            held = made._asdict()
            held.pop("workdir")
            save_record(failed, held)
            return made
        failed.unlink(missing_ok=True)
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
