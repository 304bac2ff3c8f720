"""Nearness to real images for the leaderboard: many samples of some of its variants, by `experiments.evaluate`.

Rollout errors need few samples; a Frechet distance needs thousands, so that it is taken at chosen bits only. An
evaluation lies beside its run, and is resumed or read back like any other.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments.compare_report import Finished
from experiments.evaluate import evaluate
from experiments.evaluate_config import read_config, read_result
from experiments.quantize_config import QuantizeConfig, VariantConfig
from qdiff_jax.config import fingerprint, load_config
from qdiff_jax.eval.files import write_atomic


class Judging(NamedTuple):
    """judge: a config file of `experiments.evaluate`, with its words. bits: of the variants that it judges,
    such as "w4a8". overrides: {key: value} set in it."""

    judge: str
    bits: Sequence[str]
    overrides: Mapping[str, Any]


def bits_of(variant: VariantConfig) -> str:
    """Such as "w4a8"."""
    return f"w{variant.w_bits}a{variant.a_bits}"


def evaluation(config: QuantizeConfig, bundle: str, judging: Judging) -> ConfigDict:
    """The config that judges a bundle ("" for the model in full precision) under its run's own sampler.

    Raises ValueError for a judge that is wrong.
    """
    made = load_config(judging.judge, judging.overrides)
    with made.unlocked():
        made.model, made.bundle, made.seed = config.model, bundle, config.seed
        made.sampler = dataclasses.asdict(config.sampler)
        made.parts, made.prompts = dataclasses.asdict(config.parts), config.prompts
    read_config(made)
    return made


def check_judging(runs: Sequence[Any], judging: Judging) -> None:
    """Raise ValueError, before anything runs, for a judge that is wrong or bits that no run has.

    runs: with `parsed`, their configs.
    """
    configs = [run.parsed for run in runs]
    there = {bits_of(variant) for config in configs for variant in config.variants.values()}
    unknown = sorted(set(judging.bits) - there)
    if unknown:
        raise ValueError(
            f"no variant has the bits {unknown[0]!r} to be judged; there are {sorted(there)}."
        )
    for config in configs:
        evaluation(config, "", judging)


def judge_variants(runs: Sequence[Finished], judging: Judging) -> list[Finished]:
    """The runs with the metrics of every variant of those bits, and of full precision in the first of each
    model that has one."""

    def chosen(run: Finished) -> list[str]:
        variants = run.config.variants.items()
        return [name for name, variant in variants if bits_of(variant) in judging.bits]

    models = {run.config.model for run in runs if chosen(run)}
    told = []
    for run in runs:
        names = chosen(run)
        if run.config.model in models:
            models.remove(run.config.model)
            names = ["fp32", *names]
        told.append(run._replace(judged={name: _metrics(run, name, judging) for name in names}))
    return told


def _metrics(run: Finished, name: str, judging: Judging) -> Mapping:
    """Of one variant, read back if this very evaluation has been made."""
    bundle = "" if name == "fp32" else str(run.workdir / "variants" / name / "bundle")
    config = evaluation(run.config, bundle, judging)
    workdir = run.workdir / "judged" / name
    # Where features are cached changes no figure.
    wanted = fingerprint(dataclasses.replace(read_config(config), cache=""))
    mark = workdir / "fingerprint"
    if mark.exists() and mark.read_text("utf-8") == wanted:
        return read_result(workdir)["metrics"]
    logging.info("many samples of %s of %s", name, run.name)
    metrics = evaluate(config, workdir)["metrics"]
    write_atomic(mark, wanted)
    return metrics
