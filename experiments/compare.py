"""A leaderboard of methods at several bits: runs what has not been run, and sets all of it side by side.

    python -m experiments.compare --method=configs/methods/ptqd.py:laptop \
        --method=configs/methods/ptqd.py:base=brecq,laptop --bits=w8a8,w4a8 \
        --config=configs/damage.py --out=/tmp/leaderboard

Every `--method` (a config file, its words behind a colon) is run at each of `--bits`; every `--config` as it
is. Each run is a workdir of experiments.quantize under OUT/runs; killed at any moment, the same command goes
on where it was, and more methods or bits join those there are. Full-precision trajectories and samples are
made once for all runs that measure alike (OUT/shared). Runs on one model must measure alike (sampler,
seed, calibration and evaluation sizes): what differs is named before anything runs, and
`--set=calibration.samples=32` sets a key in every config. Writes leaderboard.md, leaderboard.csv and pictures.

With `--judge=configs/evaluate.py:main20 --judge_set=data.source=idx:DIR`, variants of `--judge_bits` (and full
precision) are also judged by many samples, for their Frechet distance from real images.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import app, flags, logging

from experiments import command_line
from experiments.compare_images import Judging, check_judging, judge_variants
from experiments.compare_report import Finished, collect, write_leaderboard
from experiments.prompts import prompts_digest, read_prompts
from experiments.quantize import quantize
from experiments.quantize_config import QuantizeConfig, read_config
from qdiff_jax.config import fingerprint, flatten, load_config
from qdiff_jax.runtime.cache import enable_compile_cache
from qdiff_jax.runtime.programs import release_programs
from qdiff_jax.runtime.progress import log_progress

SHARED_FILES = (
    "trajectories/calibration.npz",
    "trajectories/held_out.npz",
    "variants/fp32/samples.npz",
)


class Run(NamedTuple):
    """One config to be run. name: of its folder. given: as the command named it. config: unread, as
    `quantize` takes it; parsed: the same, read and checked."""

    name: str
    given: str
    config: Any
    parsed: QuantizeConfig


def make_run(path_with_words: str, overrides: Mapping[str, Any]) -> Run:
    """The run of a config file with its words. Raises ValueError as `load_config` and `read_config` do."""
    path, _, words = path_with_words.partition(":")
    config = load_config(path_with_words, overrides)
    name = re.sub(r"[^\w.=-]+", "-", "-".join(filter(None, (pathlib.Path(path).stem, words))))
    return Run(name, path_with_words, config, read_config(config))


def with_bits(method: str, bits: str) -> str:
    """configs/methods/x.py:laptop at w4a8 -> configs/methods/x.py:w4a8,laptop."""
    path, _, words = method.partition(":")
    return f"{path}:" + ",".join(filter(None, (bits, words)))


def protocol(config: QuantizeConfig) -> dict[str, Any]:
    """What two runs on one model must share for their figures to compare."""
    return {
        "seed": config.seed,
        "classifier": config.classifier,
        **{f"parts.{k}": v for k, v in dataclasses.asdict(config.parts).items()},
        "prompts": prompts_digest(read_prompts(config.prompts)),
        **{f"sampler.{k}": v for k, v in flatten(config.sampler.as_json()).items()},
        # Held-out trajectories follow those of calibration.
        "calibration.samples": config.calibration.samples,
        "evaluation.held_out": config.evaluation.held_out,
        "evaluation.samples": config.evaluation.samples,
        "evaluation.batch": config.evaluation.batch,
    }


def check_alike(runs: Sequence[Run]) -> None:
    """Raise ValueError if two runs have one folder, or runs on one model measure differently."""
    first: dict[str, Run] = {}
    names: dict[str, Run] = {}
    for run in runs:
        if run.name in names:
            raise ValueError(
                f"{run.given} and {names[run.name].given} would share the folder {run.name}; give "
                "each config once, or other words."
            )
        names[run.name] = run
        other = first.setdefault(run.parsed.model, run)
        mine, theirs = protocol(run.parsed), protocol(other.parsed)
        odd = [
            f"{k} is {theirs.get(k)!r} and {mine.get(k)!r}"
            for k in sorted(mine | theirs)
            if mine.get(k) != theirs.get(k)
        ]
        if odd:
            raise ValueError(
                f"{other.given} and {run.given} measure {run.parsed.model} differently: "
                f"{'; '.join(odd)}. Set the key in all configs with --set=key=value."
            )


def share(out: pathlib.Path, run: Run, workdir: pathlib.Path) -> None:
    """Full precision's files from the runs before this one, and for those after it.

    Files are whole or absent, so that a link to one can be made at any moment.
    """
    key = fingerprint({"model": run.parsed.model, **protocol(run.parsed)})[:16]
    name = re.sub(r"\W+", "-", pathlib.Path(run.parsed.model).stem)
    for file in SHARED_FILES:
        common, own = out / "shared" / f"{name}-{key}" / file, workdir / file
        for source, target in ((common, own), (own, common)):
            if source.exists() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(source, target)
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
    """The workdir of a run, finished: nothing is done again, and full precision is made once for all."""
    workdir = out / "runs" / run.name
    share(out, run, workdir)
    if not is_finished(run, workdir):
        quantize(run.config, workdir, f"{command} --workdir={workdir}")
        release_programs()  # dozens of runs compile more than a process may map
        share(out, run, workdir)
    return workdir


def compare(
    methods: Sequence[str],
    bits: Sequence[str],
    configs: Sequence[str],
    out: pathlib.Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    judging: Judging | None = None,
    command: str = "",
) -> dict[str, pathlib.Path]:
    """Run what is missing and write the leaderboard; returns its files by kind.

    methods: run at each of bits (such as "w4a8"); configs: run as they are. overrides: keys set in all.
    judging: which variants are compared with real images, by many samples; None for none.
    Raises ValueError, before anything runs, for a config that is wrong or runs that cannot be compared.
    """
    out = pathlib.Path(out)
    given = [with_bits(method, b) for method in methods for b in bits] + list(configs)
    if not given or (methods and not bits):
        raise ValueError("nothing to compare: give methods with bits, or configs.")
    runs = [make_run(path, overrides or {}) for path in given]
    check_alike(runs)
    if judging is not None:
        # Real images are described once for all variants, unless the caller names another folder.
        known = {"cache": str(out / "real"), **judging.overrides}
        judging = judging._replace(overrides=known)
        check_judging(runs, judging)
    finished = []
    for position, run in enumerate(runs):
        logging.info("run %d of %d: %s", position + 1, len(runs), run.name)
        again = shlex.join(["python", "-m", "experiments.quantize", f"--config={run.given}"])
        again += "".join(f" --config.{k}={v}" for k, v in (overrides or {}).items())
        workdir = run_once(run, out, again)
        finished.append(Finished(run.name, run.parsed, workdir))
    if judging is not None:
        finished = judge_variants(finished, judging)
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
    flags.DEFINE_list("bits", ["w8a8", "w4a8"], "Bits of the methods.")
    flags.DEFINE_multi_string("config", [], "Config file, path:arg, run as it is.")
    flags.DEFINE_multi_string("set", [], "key=value, set in every config.")
    flags.DEFINE_string("judge", "", "Config file of experiments.evaluate, path:arg.")
    flags.DEFINE_list("judge_bits", ["w4a8"], "Bits of the variants that are judged by it.")
    flags.DEFINE_multi_string("judge_set", [], "key=value, set in that config.")
    flags.DEFINE_string("out", None, "Runs and leaderboard go here; the same again resumes.")
    flags.DEFINE_string("compile_cache", None, "Folder for compiled programs.")
    flags.mark_flags_as_required(["out"])
    command_line.run(main)
