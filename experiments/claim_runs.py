"""The runs that a claim is measured on: their configs and names, and what is read of finished ones."""

from __future__ import annotations

import functools
import pathlib
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from experiments.compare_runs import Run, make_run, parse_overrides
from experiments.made_once import weights_of
from experiments.quantize_config import read_config
from qdiff_jax.config import fingerprint
from qdiff_jax.eval.cost import network_cost
from qdiff_jax.eval.report import read_report
from qdiff_jax.eval.samples import Samples
from qdiff_jax.export.bundle import load_bundle
from qdiff_jax.models import registry
from qdiff_jax.models.families import example_inputs
from qdiff_jax.observe.archive import load_arrays, load_record
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
    return fingerprint({"config": fingerprint(parsed), "weights": weights_of(parsed.model)})


def samples_of(workdir: pathlib.Path, name: str) -> np.ndarray:
    """[N, H, W, C] final images of a variant."""
    path = workdir / "variants" / name / "samples.npz"
    return load_arrays(path, Samples).x.astype(np.float64)


def errors(workdir: pathlib.Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """([N], [N]) mean squared error of each final image from full precision's, and what is left of it about the
    shift that all samples have in common: their mean difference, pixel by pixel, is taken away from each. Of
    one sample nothing is left."""
    differences = samples_of(workdir, name) - samples_of(workdir, "fp32")
    whole, about = (
        np.square(images).reshape(len(images), -1).mean(axis=1)
        for images in (differences, differences - differences.mean(axis=0))
    )
    return whole, about


def shift_share(whole: np.ndarray, about: np.ndarray) -> float:
    """The share of the error that this common shift has, of `errors`; 0 where there is no error."""
    return float(1 - about.mean() / whole.mean()) if whole.any() else 0.0


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
