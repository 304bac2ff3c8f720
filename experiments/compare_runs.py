"""The runs of a leaderboard: each method at the widths that its config lists, its twin in closed form, and
round-to-nearest beside it."""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging
from ml_collections import ConfigDict

from experiments.prompts import prompts_digest, read_prompts
from experiments.quantize_config import (
    FREE_TO_CHANGE,
    QuantizeConfig,
    VariantConfig,
    read_config,
)
from qdiff_jax.config import UnknownWordError, fingerprint, flatten, load_config
from qdiff_jax.methods.registry import methods_of

# Methods whose weights the closed form can decide: by default AdaRound does, or nearest codes in SVDQuant.
RECONSTRUCTING = ("brecq", "qdiffusion", "tfmq", "tdq", "tcaq", "ptq4dit", "svdquant")
CLOSED_FORM = "closed_form"
BASELINE = pathlib.Path(__file__).parents[1] / "configs" / "methods" / "baseline.py"
_SIZES = ("smoke", "laptop")


class Run(NamedTuple):
    """One config to be run. name: of its folder. given: as the command named it. config: unread, as
    `quantize` takes it; parsed: the same, read and checked. words: what sets it apart from other runs of its
    method, for a label that must."""

    name: str
    given: str
    config: Any
    parsed: QuantizeConfig
    words: str = ""


def make_run(path_with_words: str, overrides: Mapping[str, Any]) -> Run:
    """The run of a config file with its words. Raises ValueError as `load_config` and `read_config` do."""
    path, _, words = path_with_words.partition(":")
    config = load_config(path_with_words, overrides)
    name = _folder("-".join(filter(None, (pathlib.Path(path).stem, words))))
    return Run(name, path_with_words, config, read_config(config), words)


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


def _folder(text: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", text)


def with_bits(method: str, bits: str) -> str:
    """configs/methods/x.py:laptop at w4a8 -> configs/methods/x.py:w4a8,laptop."""
    path, _, words = method.partition(":")
    return f"{path}:" + ",".join(filter(None, (bits, words)))


def bits_of(variant: VariantConfig) -> str:
    """Such as "w4a8"."""
    return f"w{variant.w_bits}a{variant.a_bits}"


def marked(run: Run) -> Run:
    """The run in a folder that names its config by eight digits, so that a changed setting is another run."""
    return run._replace(name=f"{run.name}-{fingerprint(run.parsed, FREE_TO_CHANGE)[:8]}")


def alone(run: Run) -> Run:
    """A config's own method, without what its config sets beside it."""
    # In the order of the report, where a config's method comes last; a ConfigDict sorts by name.
    name = list(run.parsed.variants)[-1]
    return _changed(run, variants={name: run.config.variants[name]})


def _changed(run: Run, **values: Any) -> Run:
    own = run.config.copy_and_resolve_references()
    with own.unlocked():
        for key, value in values.items():
            own[key] = ConfigDict(value) if isinstance(value, Mapping) else value
    return run._replace(config=own, parsed=read_config(own))


def method_runs(
    methods: Sequence[str],
    bits: Sequence[str],
    overrides: Mapping[str, Any],
    closed_form: Sequence[str] = (),
) -> list[Run]:
    """Each method alone at each of the bits that its config lists, its twin in closed form at those of
    `closed_form`, and for each model, policy and width one run of round-to-nearest, first.

    Raises ValueError for a method without any of the bits, bits of no method, and as `make_run` does.
    """
    runs: list[Run] = []
    listed: set[str] = set()
    for method in methods:
        missing, path = [], method.partition(":")[0]
        for width in bits:
            try:
                run = make_run(with_bits(method, width), overrides)
            except UnknownWordError as error:
                if error.word != width:
                    raise
                missing.append(width)
                continue
            listed.add(width)
            words = [w for w in run.words.split(",") if w not in (width, *_SIZES)]
            run = alone(run)._replace(words=", ".join(w for w in words if "model=" not in w))
            runs.append(run)
            if width in closed_form and _reconstructs(run.parsed):
                runs.append(_solved(run))
        if len(missing) == len(bits):
            raise ValueError(
                f"{path} lists none of the bits {', '.join(bits)}: give it those its docstring names, or "
                "leave it out."
            )
        if missing:
            logging.info("%s lists no %s, which it is left out of", path, ", ".join(missing))
    idle = sorted({*bits, *closed_form} - listed)
    if methods and idle:
        raise ValueError(f"no method lists the bits {idle[0]!r}; correct them, or leave them out.")
    known = {fingerprint(run.parsed) for run in runs}
    nearest: dict[str, Run] = {}
    for run in runs:
        beside = _nearest(run, overrides)
        nearest.setdefault(fingerprint(beside.parsed), beside)
    return [run for key, run in nearest.items() if key not in known] + runs


def _reconstructs(config: QuantizeConfig) -> bool:
    """Whether it rounds weights by steps that the closed form could take the place of."""
    (variant,) = config.variants.values()
    parts = set(methods_of(variant.method, config.ptqd.base)) & set(RECONSTRUCTING)
    otherwise = (config.tdq.mode == "qat" and variant.method == "tdq") or (
        config.svdquant.branch.gptq and "svdquant" in parts
    )
    return bool(parts) and not otherwise and config.rounding != CLOSED_FORM


def _solved(run: Run) -> Run:
    words = ", ".join(filter(None, (run.words, "closed form")))
    twin = _changed(run, rounding=CLOSED_FORM)
    return twin._replace(name=f"{run.name}-{CLOSED_FORM}", words=words)


def _nearest(run: Run, overrides: Mapping[str, Any]) -> Run:
    """Round-to-nearest under the policy, model, width and sampler of a run, calibrated as the baselines are.

    The sampler's own tensors stay in full precision.
    """
    ((_, variant),) = run.parsed.variants.items()
    size = next((s for s in _SIZES if s in run.given.partition(":")[2].split(",")), "")
    config = load_config(f"{BASELINE}:{size}")
    known = set(flatten(config.to_dict())) - {"rounding"}  # which leaves nearest codes nearest
    config.update_from_flattened_dict({k: v for k, v in overrides.items() if k in known})
    parsed, bits = run.parsed, bits_of(variant)
    sampler = {**dataclasses.asdict(parsed.sampler), "tensor_bits": 0}
    values = {
        "model": parsed.model,
        "classifier": parsed.classifier,
        "seed": parsed.seed,
        "policy": parsed.policy,
        "parts": dataclasses.asdict(parsed.parts),
        "prompts": parsed.prompts,
        "sampler": sampler,
        "evaluation": dataclasses.asdict(parsed.evaluation),
        "variants": {f"rtn_{bits}": {**dataclasses.asdict(variant), "method": "rtn"}},
    }
    name = _folder(f"rtn-{bits}-{parsed.policy}-{pathlib.Path(parsed.model).stem}")
    made = Run(name, f"{BASELINE}:{size}", config, run.parsed, parsed.policy)
    return _changed(made, **values)


def protocol(config: QuantizeConfig) -> dict[str, Any]:
    """What two runs on one model must share for their figures to compare."""
    return {
        "seed": config.seed,
        "classifier": config.classifier,
        **{f"parts.{k}": v for k, v in dataclasses.asdict(config.parts).items()},
        "prompts": prompts_digest(read_prompts(config.prompts)),
        **{f"sampler.{k}": v for k, v in flatten(config.sampler.as_json()).items()},
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
