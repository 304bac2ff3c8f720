"""A leaderboard of methods at several bits: runs what has not been run, and sets all of it side by side.

    python -m experiments.compare --method=configs/methods/ptqd.py:laptop \
        --method=configs/methods/ptqd.py:base=brecq,laptop --bits=w8a8,w4a8 \
        --config=configs/quickstart.py --out=/tmp/leaderboard

Every `--method` (a config file, its words behind a colon) is run at each of `--bits` that its config lists,
alone; at those of `--closed_form`, a method that rounds weights block by block also runs solved.
Round-to-nearest stands beside them, once for each model, site policy and width: errors compare under one policy
only. Every `--config` is run as it is. Each run is a workdir of experiments.quantize under OUT/runs, named by
its config; killed at any moment, the same command goes on where it was, and more methods or bits join those
there are. A run that diverges, or is refused in its midst, is a row that says so (OUT/runs/NAME/failed.json;
delete it to try again, or change the code). Several processes of one checkout may work in one OUT, one for each
model say; the whole command writes the whole board after them.
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

import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags, logging

from experiments import command_line
from experiments.compare_images import Judging, check_judging, judge_variants
from experiments.compare_report import write_leaderboard
from experiments.compare_rows import Finished, collect
from experiments.compare_runs import (
    check_alike,
    make_run,
    marked,
    method_runs,
    parse_overrides,
)
from experiments.made_once import attempt, is_finished
from experiments.quantize_job import prepare
from qdiff_jax.runtime.cache import enable_compile_cache
from qdiff_jax.runtime.progress import log_progress


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
        made = attempt(run, out, command)
        why = {"why": made.why, "commit": made.commit} if made.why else {}
        finished.append(Finished(run.name, run.parsed, made.workdir, run.words, why))
    if judging is not None:
        write_leaderboard(out, collect(finished), command)
        finished = judge_variants(finished, judging, out / "judged")
    return write_leaderboard(out, collect(finished), command)


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
