"""What a config of `experiments.evaluate` holds, and the protocol two results must share to compare."""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.quantize_config import SamplerConfig
from qdiff_jax.config import to_dataclass
from qdiff_jax.data.images import UINT8_RULES
from qdiff_jax.eval.resize import CROPS
from qdiff_jax.models.load_pipeline import Parts
from qdiff_jax.observe.archive import load_record

HALVES = "halves"  # a floor between the halves of one split


@dataclasses.dataclass(frozen=True)
class RealConfig:
    """Real images.

    source, limit (0: all): see `data.images`, and `npz:FILE` with ADM's `arr_0`; "" for none but `published`.
    pad_to: zeros around, or crop ("lsun", "adm") to size: the data set's own preparation (0 and "": as they
    are). reference: the split that samples are compared with; floor: the one that is compared with it as a
    yardstick, "halves" of the reference itself, or "". published: an npz with mu and sigma, which the Frechet
    distance is then taken to, and published_count, of how many images (0: as the file says, if
    `--statistics` wrote it)."""

    source: str
    pad_to: int = 0
    reference: str = "test"
    floor: str = "train"
    limit: int = 0
    crop: str = ""
    size: int = 0
    published: str = ""
    published_count: int = 0

    @property
    def preparation(self) -> dict:
        """The same as arguments of `real_images.image_stream`."""
        if self.pad_to:
            return {"crop": "pad", "size": self.pad_to}
        return {"crop": self.crop or None, "size": self.size or None}


@dataclasses.dataclass(frozen=True)
class LpipsConfig:
    """LPIPS of paired samples. net: "alex" or "vgg", "" for none; trunk and linear: its two files."""

    net: str = ""
    trunk: str = ""
    linear: str = ""


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """CLIP score. captions: a text file with a line for each class, "" for no score. network, weights,
    vocabulary: see `backends.caption_network`; vocabulary "" for the folder of the weights."""

    captions: str = ""
    network: str = "clip-vit-b32"
    weights: str = ""
    vocabulary: str = ""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """model: shipped name or .safetensors path, or the place of a published one; parts: which that is, and
    where its first stage and text encoder are (`models.load_pipeline`). prompts: a text file with one a
    line, for a model that reads them. bundle: a folder whose network is judged instead. paired: the
    workdir of another evaluation whose samples come from the same noise ("" for none). samples, shard,
    batch: how many, per file and per network call; pictures: how many of them also become PNG files.
    network: see `eval.backends`, "" to draw and compare with no real images; tool: whose resizing
    ("" where the network needs none). neighbours: k of precision and recall. extrapolate: also report the
    Frechet distance at infinitely many samples. cache: folder for the features of real images ("" for
    none). uint8: the rule by which samples become bytes, see `data.images.to_uint8`."""

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
    cache: str = ""
    uint8: str = "round"
    lpips: LpipsConfig = LpipsConfig()
    clip: ClipConfig = ClipConfig()
    parts: Parts = Parts()
    prompts: str = ""
    pictures: int = 0


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
    "cache",
    "lpips",
    "clip",
    "pictures",
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
    if not 0 <= config.pictures <= config.samples:
        raise ValueError(
            f"config.pictures is {config.pictures}; it counts some of the {config.samples} samples."
        )
    if config.uint8 not in UINT8_RULES:
        raise ValueError(
            f"config.uint8={config.uint8!r} is not known; use one of {list(UINT8_RULES)}."
        )
    if config.network:
        _check_data(config.data)
    elif config.data.source or config.data.published:
        raise ValueError(
            "config.data names real images and config.network is empty, which compares samples with none; "
            "name a network, or leave data.source and data.published empty."
        )
    lpips = config.lpips
    if lpips.net and not (lpips.trunk and lpips.linear):
        raise ValueError(
            "config.lpips.net needs the files config.lpips.trunk (torchvision's) and "
            "config.lpips.linear (lpips' weights/v0.1)."
        )
    if (lpips.trunk or lpips.linear) and not lpips.net:
        raise ValueError(
            'config.lpips has weights and no net; set config.lpips.net to "alex" or "vgg".'
        )
    if lpips.net and not config.paired:
        raise ValueError(
            "config.lpips compares with the samples of another evaluation; set config.paired to its "
            "workdir."
        )
    if config.clip.captions and config.prompts:
        raise ValueError(
            "config.clip.captions is for classes: the captions of prompts are the prompts; leave it empty."
        )
    if config.clip.captions and not config.clip.weights:
        raise ValueError(
            "config.clip.captions needs config.clip.weights (and config.clip.vocabulary where they are no "
            "folder with both)."
        )
    if config.clip.weights and not (config.clip.captions or config.prompts):
        raise ValueError(
            "config.clip.weights without config.clip.captions, a text file with one line for each class, "
            "would measure nothing."
        )
    return config


def _check_data(data: RealConfig) -> None:
    if not data.source and not data.published:
        raise ValueError(
            "config.data.source is empty; name real images, or config.data.published, or set "
            'config.network="" to draw samples alone.'
        )
    if bool(data.crop) != bool(data.size):
        raise ValueError(
            f"config.data.crop and config.data.size go together: got {data.crop!r} and {data.size}."
        )
    if data.crop and data.crop not in CROPS:
        raise ValueError(f"config.data.crop={data.crop!r} is not known; use one of {CROPS}.")
    if data.crop and data.pad_to:
        raise ValueError("config.data has both pad_to and crop; set pad_to=0 or crop=''.")
    for name in ("pad_to", "size", "limit", "published_count"):
        if getattr(data, name) < 0:
            raise ValueError(
                f"config.data.{name} is {getattr(data, name)}; it must not be negative."
            )
    if data.published_count and not data.published:
        raise ValueError("config.data.published_count counts the images of config.data.published.")


def protocol(config: EvaluateConfig, fingerprint: str, origin: str, schedule: Mapping) -> dict:
    """All that decides a figure but the model itself: two results compare only if it is equal.

    fingerprint: of the feature network. origin: digest of the reference images. What only some
    evaluations have is added to it under further names (the paired model, published statistics, LPIPS,
    captions).
    """
    # Results from before there was a choice say nothing of it.
    rule = {} if config.uint8 == "round" else {"uint8": config.uint8}
    return {
        **rule,
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
