"""What `experiments.evaluate` judges: a model or a bundle, and the sampler that fits it."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.evaluate_config import EvaluateConfig
from experiments.prompts import prompts_digest, read_prompts
from qdiff_jax.eval.samples import labels
from qdiff_jax.eval.shards import FIRST_INDEX, claim_shards
from qdiff_jax.methods.run import load_for_sampling
from qdiff_jax.models import registry
from qdiff_jax.models.families import parse_model
from qdiff_jax.models.load_pipeline import load_pipeline
from qdiff_jax.models.pipeline import Pipeline, conditions, decode, null_condition
from qdiff_jax.models.published import PUBLISHED
from qdiff_jax.models.registry import RANDOM
from qdiff_jax.observe.archive import load_record

# What of a bundle's manifest decides its samples; library versions and notes do not.
_DECIDING = ("model", "schedule", "trees", "tensors")
# What of an origin decides its samples besides the network.
_FURTHER = ("first_stage_sha256", "text_sha256", "prompts_sha256")


class Subject(NamedTuple):
    """What is judged. variables: {"params", "quant"}; origin: JSON for the report. pipeline: the network with
    its first stage and text encoder; prompts: what it is asked for, where it reads prompts. correction: of a
    bundle's sampling, and sampler: the one that it was made for, with "tensors" if it quantizes them too."""

    module: Any
    variables: dict
    schedule: dict
    origin: dict
    pipeline: Pipeline
    prompts: tuple[str, ...] = ()
    correction: Any = None
    sampler: dict | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the images."""
        return self.pipeline.image_shape

    @property
    def classes(self) -> int | None:
        return self.pipeline.diffusion.classes

    def wanted(self, indices: range) -> np.ndarray | None:
        """What the samples of these global indices are asked for by: classes or prompts in turn, int32."""
        if not self.prompts:
            return labels(self.classes, indices)
        return (np.arange(len(indices)) + indices.start - FIRST_INDEX).astype(np.int32) % np.int32(
            len(self.prompts)
        )

    def sampling(self, scale: float, batch: int) -> dict:
        """The arguments of `sample_shards` that say what is drawn and how it becomes images."""
        found: dict[str, Any] = {"shape": self.pipeline.latent_shape, "classes": self.classes}
        found["wanted"] = self.wanted
        if self.pipeline.first_stage is not None:
            found["decode"] = lambda x: decode(self.pipeline, x, batch)
        if self.prompts:
            found["condition"] = self._encoded
            found["null"] = null_condition(self.pipeline) if scale >= 0 else None
        return found

    def _encoded(self, numbers: np.ndarray) -> Any:
        return conditions(self.pipeline, [self.prompts[number] for number in numbers])


def load_subject(config: EvaluateConfig) -> Subject:
    """The model, or the bundle where one is named, with the rest of its pipeline and its prompts.

    Raises ValueError or BundleError as they do, and for prompts that are missing or not read.
    """
    prompts = read_prompts(config.prompts)
    if config.parts.network in PUBLISHED:  # before gigabytes are read
        _check_prompts(config, PUBLISHED[config.parts.network].text is not None)
    subject = _network(config, prompts)
    _check_prompts(config, subject.pipeline.takes == "prompts")
    return subject


def _check_prompts(config: EvaluateConfig, reads: bool) -> None:
    name = config.bundle or config.model
    if reads and not config.prompts:
        raise ValueError(
            f"config.prompts is '', and {name} reads prompts: name a text file with one a line."
        )
    if config.prompts and not reads:
        raise ValueError(
            f"config.prompts is {config.prompts}, and {name} reads none; leave it empty."
        )


def _network(config: EvaluateConfig, prompts: tuple[str, ...]) -> Subject:
    further = {}
    if prompts:
        further["prompts_sha256"] = prompts_digest(prompts)
    if config.bundle:
        loaded = load_for_sampling(pathlib.Path(config.bundle))
        manifest, extra = loaded.manifest, dict(loaded.manifest["extra"] or {})
        pipeline_of = extra.pop("pipeline", None)
        if pipeline_of and not config.parts.network and not config.model.startswith(RANDOM):
            raise ValueError(
                f"{config.bundle} draws latents, and config.parts names no network whose first stage decodes "
                f"them: take the config of its pipeline (it was made of {pipeline_of['model']} with the parts "
                f"{pipeline_of['parts']})."
            )
        origin = {
            "bundle": config.bundle,
            **manifest["source"],
            **extra,
            "bundle_sha256": _bundle_digest(manifest),
        }
        model = parse_model(manifest["model"])
        source = {**manifest["source"], "schedule": manifest["schedule"]}
        diffusion = registry.assembled(model, loaded.variables["params"], source)
        pipeline = load_pipeline(config.model, config.parts, diffusion)
        return Subject(
            loaded.module,
            loaded.variables,
            manifest["schedule"],
            {**origin, **pipeline.source, **further},
            pipeline,
            prompts,
            loaded.correction,
            manifest["sampler"],
        )
    pipeline = load_pipeline(config.model, config.parts)
    diffusion = pipeline.diffusion
    origin = {"name": diffusion.source["name"], "sha256": diffusion.source["sha256"]}
    return Subject(
        diffusion.model.module,
        {"params": diffusion.model.params, "quant": {}},
        diffusion.source["schedule"],
        {**origin, **pipeline.source, **further},
        pipeline,
        prompts,
    )


def _bundle_digest(manifest: Mapping) -> str:
    content = {name: manifest[name] for name in _DECIDING}
    content["tensors_of_sampler"] = manifest["sampler"].get("tensors")
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def subject_digest(origin: Mapping) -> str | None:
    """sha256 of what was judged, from a result's "subject": of the network's weights, and of the first stage,
    text encoder and prompts where there are any. None for a bundle of an earlier version, whose "sha256" is
    that of the model it was made from."""
    digest = origin.get("bundle_sha256", None if "bundle" in origin else origin.get("sha256"))
    further = [origin[name] for name in _FURTHER if name in origin]
    if digest is None or not further:
        return digest
    return hashlib.sha256(" ".join((digest, *further)).encode()).hexdigest()


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
            "a model or bundle was remade at the same path, or other prompts were written there; use a new "
            "workdir, or delete this one."
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
