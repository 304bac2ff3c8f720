"""What a config of `experiments.evaluate` holds, and the protocol two results must share to compare."""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.quantize_config import SamplerConfig
from qdiff_jax.config import to_dataclass
from qdiff_jax.observe.archive import load_record


@dataclasses.dataclass(frozen=True)
class RealConfig:
    """Real images. source, pad_to (0: as they are), limit (0: all): see `data.images`. reference: the
    split that samples are compared with; floor: the one that is compared with it as a yardstick."""

    source: str
    pad_to: int = 0
    reference: str = "test"
    floor: str = "train"
    limit: int = 0


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """model: shipped name or .safetensors path; bundle: a folder that is judged instead. paired: the
    workdir of another evaluation whose samples come from the same noise ("" for none). samples, shard,
    batch: how many, per file and per network call. network: see `eval.backends`; tool: whose resizing
    ("" where the network needs none). neighbours: k of precision and recall. extrapolate: also report the
    Frechet distance at infinitely many samples."""

    model: str
    seed: int
    samples: int
    shard: int
    batch: int
    sampler: SamplerConfig
    data: RealConfig
    bundle: str = ""
    paired: str = ""
    network: str = "classifier_fashion"
    network_weights: str = ""
    tool: str = ""
    neighbours: int = 3
    extrapolate: bool = False


# Sizes of files and batches, and what a result is set beside, leave the samples as they are.
FREE_TO_CHANGE = (
    "paired",
    "samples",
    "network",
    "network_weights",
    "tool",
    "neighbours",
    "data",
    "extrapolate",
)


def read_config(config: Any) -> EvaluateConfig:
    """A ConfigDict as dataclasses. Raises ValueError naming the key that is wrong."""
    config = to_dataclass(EvaluateConfig, config)
    if config.samples % config.shard:
        raise ValueError(
            f"config.samples is {config.samples}; choose a multiple of config.shard={config.shard}."
        )
    if config.batch < 1 or config.neighbours < 1:
        raise ValueError("config.batch and config.neighbours must be at least 1.")
    return config


def protocol(config: EvaluateConfig, fingerprint: str, origin: str, schedule: Mapping) -> dict:
    """All that decides a figure but the model itself: two results compare only if it is equal.

    fingerprint: of the feature network. origin: digest of the reference images.
    """
    return {
        "sampler": config.sampler.as_json(),
        "schedule": dict(schedule),
        "samples": config.samples,
        "seed": config.seed,
        "network": config.network,
        "network_sha256": fingerprint,
        "tool": config.tool,
        "neighbours": config.neighbours,
        "reference": config.data.reference,
        "reference_sha256": origin,
    }


def check_alike(results: Sequence[tuple[str, Mapping]]) -> None:
    """Raise ValueError unless all (name, protocol) are equal; the message names the first difference."""
    (first, expected), *others = results
    for name, found in others:
        for key in sorted(set(expected) | set(found)):
            if expected.get(key) != found.get(key):
                raise ValueError(
                    f"{first} and {name} were not measured alike: {key} is {expected.get(key)!r} in "
                    f"the one and {found.get(key)!r} in the other; evaluate both by one config."
                )


def read_result(path: str | pathlib.Path) -> dict:
    """metrics.json of an evaluation (the file or its workdir). Raises ValueError if it is none."""
    path = pathlib.Path(path)
    file = path / "metrics.json" if path.is_dir() else path
    if not file.exists():
        there = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, there, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"there is no evaluation {file}; run experiments.evaluate with that workdir first.{hint}"
        )
    result = load_record(file)
    if "protocol" not in result or "metrics" not in result:
        raise ValueError(f"{file} is no result of experiments.evaluate.")
    return result
