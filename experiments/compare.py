"""A leaderboard of methods at several bits: runs what has not been run, and sets all of it side by side.

    python -m experiments.compare --method=configs/methods/ptqd.py:laptop \
        --method=configs/methods/ptqd.py:base=brecq,laptop --bits=w8a8,w4a8 \
        --config=configs/damage.py --out=/tmp/leaderboard

Every `--method` (a config file, its words behind a colon) is run at each of `--bits` that its config lists,
alone; at those of `--closed_form`, a method that rounds weights block by block also runs solved.
Round-to-nearest stands beside them, once for each model, site policy and width: errors compare under one policy
only. Every `--config` is run as it is. Each run is a workdir of experiments.quantize under OUT/runs, named by
its config; killed at any moment, the same command goes on where it was, and more methods or bits join those
there are. A run that diverges, or is refused in its midst, is a row that says so (OUT/runs/NAME/diverged.json;
delete it to try again). One process at a time works in one OUT, at one commit: other code names runs anew.
Full-precision trajectories and samples are made once for all runs that measure alike (OUT/shared). Runs on one
model must measure alike (sampler, seed, evaluation sizes): what differs is named before anything runs, and
`--set=evaluation.samples=32` sets a key in every config (`--set=policy=common`: all methods under one policy).
Writes leaderboard.md, leaderboard.csv and pictures.

With `--judge=configs/evaluate.py:board20 --judge_set=data.source=idx:DIR`, variants of `--judge_bits` (and full
precision, once a model) are also judged by 512 samples, for their Frechet distance from real images.

The board of the six U-Net methods and the baselines on both shipped models (bash):

    M=configs/methods; python -m experiments.compare --bits=w8a8,w4a8,w4a4 --closed_form=w4a8,w4a4 \
        --method=$M/baseline.py:laptop,method={brecq,tfmq,closed_form},model={unet,dit} \
        --method=$M/{ptq4dm,qdiffusion,tdq,tcaq,ptqd}.py:laptop,model={unet,dit} \
        --method=$M/ptq4dm.py:laptop,plain,model={unet,dit} \
        --method=$M/ptqd.py:laptop,base=brecq,model={unet,dit} \
        --judge=configs/evaluate.py:board20 --judge_set=data.source=idx:DIR --out=W

That is 96 runs, 18 of each model at W4A8 and W4A4 and 12 at W8A8, and 38 evaluations: about 2.5 CPU hours, an
estimate from the seconds of single runs. Of one U-Net run a BRECQ reconstruction takes 57 s, a closed form 27,
64 rollouts and 16 held-out trajectories 20, and an evaluation by 512 samples 130; an evaluation of the DiT's
network takes half as long.
"""

from __future__ import annotations

import ast
import json
import os
import pathlib
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags, logging

from experiments import command_line
from experiments.compare_images import Judging, check_judging, judge_variants
from experiments.compare_report import write_leaderboard
from experiments.compare_rows import Finished, collect
from experiments.compare_runs import Run, check_alike, make_run, marked, method_runs, protocol
from experiments.quantize import prepare, quantize
from experiments.quantize_report import commit
from qdiff_jax.config import fingerprint
from qdiff_jax.observe.archive import load_record, save_record
from qdiff_jax.runtime.cache import enable_compile_cache
from qdiff_jax.runtime.programs import release_programs
from qdiff_jax.runtime.progress import log_progress

# Recorded with as many trajectories as are calibrated on; the others are the same for any number.
OF_CALIBRATION = ("trajectories/calibration.json", "trajectories/calibration.npz")
SHARED_FILES = (
    *OF_CALIBRATION,
    "trajectories/held_out.json",
    "trajectories/held_out.npz",
    "variants/fp32/samples.npz",
)
DIVERGED = "diverged.json"


def share(out: pathlib.Path, run: Run, workdir: pathlib.Path) -> None:
    """Full precision's files from the runs before this one, and for those after it.

    Files are whole or absent, so that a link to one can be made at any moment.
    """
    measured = {"model": run.parsed.model, **protocol(run.parsed)}
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


def is_finished(run: Run, workdir: pathlib.Path) -> bool:
    """Whether the report of exactly this config is there."""
    path = workdir / "report.json"
    if not path.exists():
        return False
    made = json.loads(path.read_text("utf-8"))["provenance"]
    return made["config_fingerprint"] == fingerprint(run.parsed)


def run_once(run: Run, out: pathlib.Path, command: str) -> pathlib.Path:
    """The workdir of a run, finished: nothing is done again, and full precision is made once for all. A run
    has no pictures of its own."""
    workdir = out / "runs" / run.name
    share(out, run, workdir)
    if not is_finished(run, workdir):
        quantize(run.config, workdir, f"{command}, run {run.name}", pictures=False)
        release_programs()  # dozens of runs compile more than a process may map
        share(out, run, workdir)
    return workdir


def attempt(run: Run, out: pathlib.Path, command: str) -> Finished:
    """The run, finished or ended without a result (diverged, or refused in its midst), now or when it was tried
    before; one such stops no other."""
    workdir = out / "runs" / run.name
    failed = workdir / DIVERGED
    if not failed.exists():
        try:
            run_once(run, out, command)
        except (FloatingPointError, ValueError) as error:
            logging.exception("%s ended without a result", run.name)
            save_record(failed, {"why": str(error), "commit": commit()})
            release_programs()
            share(out, run, workdir)
    found = load_record(failed) if failed.exists() else {}
    return Finished(run.name, run.parsed, workdir, run.words, found)


def compare(
    methods: Sequence[str],
    bits: Sequence[str],
    configs: Sequence[str],
    out: pathlib.Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    closed_form: Sequence[str] = (),
    judging: Judging | None = None,
    command: str = "",
) -> dict[str, pathlib.Path]:
    """Run what is missing and write the leaderboard; returns its files by kind.

    methods: run at each of bits (such as "w4a8") that they list; configs: run as they are. overrides: keys set
    in all. closed_form: bits at which methods that round weights also run solved. judging: which variants are
    compared with real images, by many samples; None for none.
    Raises ValueError, before anything runs, for a config that is wrong or runs that cannot be compared.
    """
    out, overrides = pathlib.Path(out), overrides or {}
    if not (methods or configs) or (methods and not bits):
        raise ValueError("nothing to compare: give methods with bits, or configs.")
    runs = method_runs(methods, bits, overrides, closed_form)
    runs = [marked(run) for run in (*runs, *(make_run(path, overrides) for path in configs))]
    check_alike(runs)
    for run in runs:
        if not is_finished(run, out / "runs" / run.name):
            prepare(run.config)
    if judging is not None:
        # Real images are described once for all variants, unless the caller names another folder.
        known = {"cache": str(out / "real"), **judging.overrides}
        judging = judging._replace(overrides=known)
        check_judging(runs, judging)
    command = command or "experiments.compare.compare(...)"
    finished = []
    for position, run in enumerate(runs):
        logging.info("run %d of %d: %s", position + 1, len(runs), run.name)
        finished.append(attempt(run, out, command))
    if judging is not None:
        write_leaderboard(out, collect(finished), command)
        finished = judge_variants(finished, judging, out / "judged")
    return write_leaderboard(out, collect(finished), command)


def parse_overrides(items: Sequence[str]) -> dict[str, Any]:
    """["calibration.samples=32"] -> {"calibration.samples": 32}; what is no Python literal is text."""
    values = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"--set={item} must be written key=value.")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    return values


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    log_progress()
    enable_compile_cache(flags.FLAGS.compile_cache)
    paths = compare(
        flags.FLAGS.method,
        flags.FLAGS.bits,
        flags.FLAGS.config,
        pathlib.Path(flags.FLAGS.out),
        overrides=parse_overrides(flags.FLAGS.set),
        closed_form=flags.FLAGS.closed_form,
        judging=Judging(
            flags.FLAGS.judge,
            tuple(flags.FLAGS.judge_bits),
            parse_overrides(flags.FLAGS.judge_set),
        )
        if flags.FLAGS.judge
        else None,
        command=shlex.join(["python", "-m", "experiments.compare", *sys.argv[1:]]),
    )
    print(paths["md"].read_text("utf-8"))


if __name__ == "__main__":
    flags.DEFINE_multi_string("method", [], "Config file of a method, run at each of --bits.")
    flags.DEFINE_list("bits", ["w8a8", "w4a8"], "Bits of the methods; each takes those it lists.")
    flags.DEFINE_list("closed_form", [], "Of these: at which methods also run solved, not stepped.")
    flags.DEFINE_multi_string("config", [], "Config file, path:arg, run as it is.")
    flags.DEFINE_multi_string("set", [], "key=value, set in every config.")
    flags.DEFINE_string("judge", "", "Config file of experiments.evaluate, path:arg.")
    flags.DEFINE_list("judge_bits", ["w4a8"], "Bits of the variants that are judged by it.")
    flags.DEFINE_multi_string("judge_set", [], "key=value, set in that config.")
    flags.DEFINE_string("out", None, "Runs and leaderboard go here; the same again resumes.")
    flags.DEFINE_string("compile_cache", None, "Folder for compiled programs.")
    flags.mark_flags_as_required(["out"])
    command_line.run(main)
