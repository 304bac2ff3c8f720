"""Nearness to real images for the leaderboard: many samples of some of its variants, by `experiments.evaluate`.

Rollout errors need few samples; a Frechet distance needs hundreds or thousands, so that it is taken at chosen
bits only. An evaluation lies beside its run, full precision's in a folder of the board, and is resumed or read
back like any other.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging
from ml_collections import ConfigDict

from experiments.compare_rows import FULL, Finished
from experiments.compare_runs import bits_of
from experiments.evaluate import evaluate
from experiments.evaluate_config import FREE_TO_CHANGE, read_config, read_result
from experiments.evaluate_real import load_judge, load_real
from experiments.evaluate_subject import load_subject, sampler_of
from experiments.quantize_config import QuantizeConfig
from experiments.quantize_report import commit
from qdiff_jax.config import fingerprint, load_config
from qdiff_jax.methods.run import make_sampler
from qdiff_jax.observe.archive import load_record, save_record
from qdiff_jax.runtime.programs import release_programs


class Judging(NamedTuple):
    """judge: a config file of `experiments.evaluate`, with its words. bits: of the variants that it judges,
    such as "w4a8". overrides: {key: value} set in it."""

    judge: str
    bits: Sequence[str]
    overrides: Mapping[str, Any]


def evaluation(config: QuantizeConfig, bundle: str, judging: Judging) -> ConfigDict:
    """The config that judges a bundle ("" for the model in full precision, the sampler's own tensors too) under
    its run's own sampler.

    Raises ValueError for a judge that is wrong.
    """
    made = load_config(judging.judge, judging.overrides)
    with made.unlocked():
        made.model, made.bundle, made.seed = config.model, bundle, config.seed
        made.sampler = dataclasses.asdict(config.sampler)
        if not bundle:
            made.sampler.tensor_bits = 0
        made.parts, made.prompts = dataclasses.asdict(config.parts), config.prompts
    read_config(made)
    return made


def check_judging(runs: Sequence[Any], judging: Judging) -> None:
    """Raise ValueError, before anything runs, for a judge that is wrong, bits that no run has, and what full
    precision cannot be judged by: its sampler, the feature network, the real images, which are described here
    for all evaluations that follow.

    runs: with `parsed`, their configs.
    """
    configs = [run.parsed for run in runs]
    there = {bits_of(variant) for config in configs for variant in config.variants.values()}
    unknown = sorted(set(judging.bits) - there)
    if unknown:
        raise ValueError(
            f"no variant has the bits {unknown[0]!r} to be judged; there are {sorted(there)}."
        )
    tried = []
    for config in configs:
        parsed = read_config(evaluation(config, "", judging))
        if parsed in tried:
            continue
        tried.append(parsed)
        if not parsed.network:
            raise ValueError(
                f"{judging.judge} names no network, and the distances of a leaderboard are in the features of "
                "one: set config.network."
            )
        subject = load_subject(parsed)
        make_sampler(subject.schedule, sampler_of(parsed, subject))
        load_real(parsed, load_judge(parsed, subject.shape))


def judge_variants(runs: Sequence[Finished], judging: Judging, out: pathlib.Path) -> list[Finished]:
    """The runs with the metrics of every variant of those bits, and of full precision in the first of each
    model that has one, which lies under `out`."""

    def chosen(run: Finished) -> list[str]:
        variants = run.config.variants.items()
        there = [name for name, variant in variants if bits_of(variant) in judging.bits]
        return [n for n in there if (run.workdir / "variants" / n / "bundle").exists()]

    models = {run.config.model for run in runs if chosen(run)}
    told = []
    for run in runs:
        names, judged = chosen(run), {}
        if run.config.model in models and names:
            models.remove(run.config.model)
            judged[FULL] = _metrics(run, FULL, judging, out)
        judged |= {name: _metrics(run, name, judging, out) for name in names}
        told.append(run._replace(judged=judged))
    return told


def _metrics(run: Finished, name: str, judging: Judging, out: pathlib.Path) -> Mapping:
    """Of one variant, with the commit that measured it, or why it "diverged"; read back if this very evaluation
    has been made."""
    bundle = "" if name == FULL else str(run.workdir / "variants" / name / "bundle")
    config = evaluation(run.config, bundle, judging)
    # Where features are cached changes no figure.
    parsed = dataclasses.replace(read_config(config), cache="")
    wanted = fingerprint(parsed)
    # More samples go on with fewer; what else differs is another evaluation.
    digits = fingerprint(parsed, FREE_TO_CHANGE)[:8]
    workdir = run.workdir / "judged" / f"{name}-{digits}"
    if not bundle:
        workdir = out / f"{pathlib.Path(run.config.model).stem}-{FULL}-{digits}"
    mark = workdir / "judged.json"
    known = load_record(mark) if mark.exists() else {}
    if known.get("fingerprint") != wanted:
        logging.info("many samples of %s of %s", name, run.name)
        known = {"fingerprint": wanted, "commit": commit()}
        try:
            evaluate(config, workdir)
        except (FloatingPointError, ValueError) as error:
            logging.exception("%s of %s ended without a result", name, run.name)
            known["diverged"] = str(error)
        finally:
            release_programs()  # dozens of evaluations compile more than a process may map
        save_record(mark, known)
    return known if "diverged" in known else {**known, **read_result(workdir)["metrics"]}
