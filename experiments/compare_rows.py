"""The rows of a leaderboard, from finished runs: errors, costs, seconds, and the commit of each record."""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from experiments.quantize_config import QuantizeConfig
from experiments.quantize_report import full_precision, is_measured
from qdiff_jax.eval.cost import Cost, network_cost
from qdiff_jax.eval.samples import FIRST_INDEX, Samples, labels
from qdiff_jax.export.bundle import load_bundle
from qdiff_jax.methods.run import seconds_of
from qdiff_jax.models import registry
from qdiff_jax.models.families import example_inputs
from qdiff_jax.observe.archive import load_arrays, load_record
from qdiff_jax.sites import list_sites

Row = dict[str, Any]
FULL = "fp32"
SECONDS = tuple(
    f"{kind}_{clock}" for kind in ("record", "calibrate", "reconstruct") for clock in ("s", "cpu_s")
)
# What a record of a variant has and one that diverged has not.
_MEASURED = (
    "stored_bytes",
    "eps_rel_mse",
    "rollout_mse",
    "psnr_db",
    "feature_distance",
    "temporal_cosine",
    "temporal_mismatch",
    "calibrate_s",
    "reconstruct_s",
    "compile_s",
)


class Finished(NamedTuple):
    """A workdir of `experiments.quantize` that has run `config`. words: what sets it apart from other runs of
    its method. diverged: {"why", "commit"} of a run that did."""

    name: str
    config: QuantizeConfig
    workdir: pathlib.Path
    words: str = ""
    diverged: Mapping[str, str] = MappingProxyType({})
    # {variant: metrics of its evaluation by many samples, with the "commit" that made it, or "diverged": why}.
    judged: Mapping[str, Mapping] = MappingProxyType({})


def collect(runs: Sequence[Finished]) -> list[Row]:
    """One row for full precision of each model, one for each variant of each run, numbered in each model.

    Models in the order given, and in each the variants from many bits to few, by policy, and under one policy
    by rollout error.
    """
    rows: list[Row] = []
    for run in runs:
        model = run.config.model
        if not any(row["model"] == model for row in rows):
            first = next((r for r in runs if r.config.model == model and FULL in r.judged), run)
            rows.append(_full_row(first))
        rows += [_row(run, name) for name in run.config.variants]
    models = list(dict.fromkeys(row["model"] for row in rows))
    policies = list(dict.fromkeys(["common", *(run.config.policy for run in runs)]))

    def place(row):
        if row["name"] == FULL:
            return models.index(row["model"]), 0
        error = math.inf if row["rollout_mse"] is None else row["rollout_mse"]
        bits = (-row["w_bits"], -row["a_bits"])
        return models.index(row["model"]), 1, *bits, policies.index(row["policy"]), error

    ordered = sorted(rows, key=place)
    for model in models:
        mine = [row for row in ordered if row["model"] == model]
        named = _counts(row["name"] for row in mine)
        for row in mine:
            apart = row["words"] and named[row["name"]] > 1
            row["label"] = f"{row['name']} ({row['words']})" if apart else row["name"]
        labelled = _counts(row["label"] for row in mine)
        for number, row in enumerate(mine):
            row["number"] = number
            if labelled[row["label"]] > 1:
                row["label"] = f"{row['name']} ({row['run']})"
    return ordered


def _counts(names) -> dict[str, int]:
    names = list(names)
    return {name: names.count(name) for name in names}


def _full_row(run: Finished) -> Row:
    diffusion = registry.load(run.config.model)
    row = {**full_precision(diffusion), "model": run.config.model, "run": run.name, "words": ""}
    row |= {"policy": None, "tensor_bits": None, "calibration_samples": None}
    row |= {"commits": [], "diverged": ""}
    row |= dict.fromkeys(SECONDS)
    return row | _cost(run, {}) | _frechet(run, FULL, row) | _classified(run, FULL)


def _row(run: Finished, name: str) -> Row:
    """Of one variant; without figures if it diverged."""
    config, folder = run.config, run.workdir / "variants" / name
    variant = config.variants[name]
    row: Row = {
        "model": config.model,
        "run": run.name,
        "words": run.words,
        "policy": config.policy,
        "tensor_bits": config.sampler.tensor_bits or None,
        "calibration_samples": config.calibration.samples,
        "diverged": "",
    }
    recorded = load_record(run.workdir / "trajectories" / "calibration.json")
    row |= {"record_s": recorded["seconds"], "record_cpu_s": recorded["cpu_seconds"]}
    if run.diverged and not is_measured(folder):
        row |= {"name": name, "w_bits": variant.w_bits or 32, "a_bits": variant.a_bits or 32}
        row |= dict.fromkeys(_MEASURED)
        row |= {"calibrate_cpu_s": None, "reconstruct_cpu_s": None, "macs": None, "bitops": None}
        row |= {"nonfinite": {"rollout_mse": "diverged"}, "diverged": run.diverged["why"]}
        row |= {"accuracy": None, "agreement": None, "commits": [run.diverged["commit"]]}
        return row | _frechet(run, name, row)
    made = load_record(folder / "quantize.json")
    row |= load_record(folder / "metrics.json")
    row |= _cpu_seconds(made["stages"]) | _cost(run, load_bundle(folder / "bundle").quant)
    row["commits"] = [made.get("commit"), row.get("commit")]
    return row | _frechet(run, name, row) | _classified(run, name)


def _cpu_seconds(stages: Mapping[str, Mapping]) -> Row:
    """CPU seconds by kind of stage, None where a record has none or not all."""
    found: Row = {"calibrate_cpu_s": 0.0, "reconstruct_cpu_s": 0.0}
    for name, stage in stages.items():
        key = seconds_of(name.partition("_")[2]).replace("_s", "_cpu_s")
        spent = None if stage.get("uncounted") else stage.get("cpu_seconds")
        found[key] = None if spent is None or found[key] is None else found[key] + spent
    return found


def _cost(run: Finished, quant: Mapping) -> Row:
    cost: Cost = network_cost(_sites(run.config.model), quant)
    return {"macs": cost.macs, "bitops": cost.bitops}


def _frechet(run: Finished, name: str, row: Row) -> Row:
    judged = run.judged.get(name, {})
    frechet = judged.get("frechet", {})
    found: Row = {f"frechet_{key}": frechet.get(key) for key in ("value", "low", "high", "floor")}
    found["commits"] = [*row["commits"], *([judged["commit"]] if "commit" in judged else [])]
    if "diverged" in judged:
        found["nonfinite"] = {**row.get("nonfinite", {}), "frechet_value": "diverged"}
        found["diverged"] = row["diverged"] or judged["diverged"]
    return found


def _classified(run: Finished, name: str) -> Row:
    """Classes of a variant's samples against those asked for, and against full precision's."""
    if not run.config.classifier:
        return {"accuracy": None, "agreement": None}
    mine, theirs = (
        _classes(run.config.classifier, run.workdir / "variants" / which / "samples.npz")
        for which in (name, FULL)
    )
    indices = range(FIRST_INDEX, FIRST_INDEX + len(mine))
    asked = labels(registry.load(run.config.model).classes, indices)
    return {
        "accuracy": None if asked is None else float((mine == asked).mean()),
        "agreement": float((mine == theirs).mean()),
    }


@functools.lru_cache(maxsize=8)
def _sites(model: str):
    module = registry.load(model).model.module
    return list_sites(module, *example_inputs(module.config))


def _classes(classifier: str, path: pathlib.Path) -> np.ndarray:
    """[N]: by content, because one file of full precision stands in the folder of every run."""
    images = load_arrays(path, Samples).x
    return _classes_of(classifier, images.tobytes(), images.shape)


@functools.lru_cache(maxsize=8)
def _classes_of(classifier: str, content: bytes, shape: tuple[int, ...], batch: int = 64):
    images = np.frombuffer(content, np.float32).reshape(shape)
    classify = registry.classifier(classifier)
    logits = [np.asarray(classify(images[i : i + batch])[0]) for i in range(0, len(images), batch)]
    return np.concatenate(logits).argmax(axis=1)
