"""What `experiments.evaluate` judges: a model or a bundle, and the sampler that fits it."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.evaluate_config import EvaluateConfig
from qdiff_jax.eval.shards import claim_shards
from qdiff_jax.methods.run import load_for_sampling
from qdiff_jax.models import registry
from qdiff_jax.observe.archive import load_record

# What of a bundle's manifest decides its samples; library versions and notes do not.
_DECIDING = ("model", "schedule", "trees", "tensors")


class Subject(NamedTuple):
    """What is judged. variables: {"params", "quant"}; origin: JSON for the report. correction: of a bundle's
    sampling, and sampler: the one that it was made for, with "tensors" if it quantizes them too."""

    module: Any
    variables: dict
    model_config: dict
    schedule: dict
    origin: dict
    correction: Any = None
    sampler: dict | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        model = self.model_config
        return (model["resolution"], model["resolution"], model["in_channels"])

    @property
    def classes(self) -> int | None:
        return self.model_config.get("num_classes")


def load_subject(config: EvaluateConfig) -> Subject:
    """The model, or the bundle where one is named. Raises ValueError or BundleError as they do."""
    if config.bundle:
        loaded = load_for_sampling(pathlib.Path(config.bundle))
        manifest = loaded.manifest
        origin = {
            "bundle": config.bundle,
            **manifest["source"],
            **(manifest["extra"] or {}),
            "bundle_sha256": _bundle_digest(manifest),
        }
        return Subject(
            loaded.module,
            loaded.variables,
            manifest["model"],
            manifest["schedule"],
            origin,
            loaded.correction,
            manifest["sampler"],
        )
    diffusion = registry.load(config.model)
    return Subject(
        diffusion.model.module,
        {"params": diffusion.model.params, "quant": {}},
        diffusion.config,
        diffusion.source["schedule"],
        {"name": diffusion.source["name"], "sha256": diffusion.source["sha256"]},
    )


def _bundle_digest(manifest: Mapping) -> str:
    content = {name: manifest[name] for name in _DECIDING}
    content["tensors_of_sampler"] = manifest["sampler"].get("tensors")
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def subject_digest(origin: Mapping) -> str | None:
    """sha256 of what was judged, from a result's "subject"; None for a bundle of an earlier version,
    whose "sha256" is that of the model it was made from."""
    return origin.get("bundle_sha256", None if "bundle" in origin else origin.get("sha256"))


def check_unchanged(workdir: pathlib.Path, subject: Subject) -> None:
    """Raises ValueError if the workdir has samples of other weights."""
    digest, shards = subject_digest(subject.origin), workdir / "shards"
    claim_shards(shards, digest, write=False)
    finished = workdir / "metrics.json"
    if (shards / "subject.json").exists() or not finished.exists():
        return
    known = subject_digest(load_record(finished).get("subject", {}))
    if known is not None and known != digest:
        raise ValueError(
            f"{workdir} was finished with other weights ({known[:12]}..., and these are {digest[:12]}...): "
            "a model or bundle was remade at the same path; use a new workdir, or delete this one."
        )


def sampler_of(config: EvaluateConfig, subject: Subject) -> dict:
    """The config's sampler, with the quantized tensors of the bundle's. Raises ValueError where a bundle's
    measured tables belong to another one."""
    asked, made_for = config.sampler.as_json(), subject.sampler or {}
    tensors = made_for.get("tensors")
    if config.sampler.tensor_bits and (tensors or {}).get("bits") != config.sampler.tensor_bits:
        raise ValueError(
            f"config.sampler.tensor_bits is {config.sampler.tensor_bits}, and what is judged holds no "
            "ranges for that: they come with a bundle of experiments.quantize."
        )
    scale = made_for.get("guidance_scale")
    if subject.correction is not None and scale != asked["guidance_scale"]:
        raise ValueError(
            f"the bundle corrects estimates at guidance {scale}, and the config samples at "
            f"{asked['guidance_scale']:g}: set config.sampler.guidance_scale to the bundle's, or "
            "calibrate one at the config's."
        )
    if tensors is None:
        return asked
    other = [name for name, value in asked.items() if made_for.get(name) != value]
    if other:
        raise ValueError(
            f"the bundle quantizes the sampler's own tensors by ranges of another sampler "
            f"({', '.join(f'{n}: {made_for.get(n)!r}' for n in other)}): evaluate it with that one."
        )
    return {**asked, "tensors": tensors}
