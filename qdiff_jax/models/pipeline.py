"""A whole pipeline: text encoder, diffusion network and first stage, and the pure functions between them.

What the network is conditioned on is made before sampling (`conditions`, `null_condition`), what it draws
becomes images afterwards (`decode`); sampling itself sees latents and the pytree y alone. A model in pixels
is a pipeline without first stage, a class-conditional one has no text encoder.

Sources: Rombach et al. 2022, arXiv 2112.10752; the sampling scripts of latent diffusion, Stable Diffusion
v1 and PixArt. In the unconditional branch stands the null class, the empty prompt, or, from PixArt's own files,
a caption that their code reads under the mask of each sample's prompt (alpha's learned, sigma's empty).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.models import first_stage as stage_one
from qdiff_jax.models.autoencoder import AutoencoderConfig
from qdiff_jax.models.clip import TextConfig, TextTower
from qdiff_jax.models.clip_tokenizer import tokenize
from qdiff_jax.models.registry import DiffusionModel
from qdiff_jax.models.t5 import T5Config, T5Encoder
from qdiff_jax.models.t5_tokenizer import tokenize_t5

_TEXTS_AT_ONCE = 16


class FirstStage(NamedTuple):
    """config (with the scale factor of this model) and params of `models.first_stage`."""

    config: AutoencoderConfig
    params: Mapping


class TextEncoder(NamedTuple):
    """CLIP's text tower or the encoder of T5, by the type of `config`. tokenizer: of
    `clip_tokenizer.load_tokenizer` or `t5_tokenizer.load_t5_tokenizer`. length: tokens of every prompt."""

    config: TextConfig | T5Config
    params: Mapping
    tokenizer: Any
    length: int


class Pipeline(NamedTuple):
    """diffusion: the network, its schedule and origin. first_stage: None for a model in pixels. text: None
    for a model conditioned on classes or on nothing. source: JSON, "sha256" of each further part by name.
    null_caption: [L, D], what the unconditional branch reads under each sample's own mask and sizes."""

    diffusion: DiffusionModel
    first_stage: FirstStage | None = None
    text: TextEncoder | None = None
    source: Mapping = {}
    null_caption: np.ndarray | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[H, W, C] of what the network sees."""
        return self.diffusion.image_shape

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[H, W, C] of the pictures."""
        height, width, channels = self.latent_shape
        if self.first_stage is None:
            return height, width, channels
        config = self.first_stage.config
        return height * config.factor, width * config.factor, config.in_channels

    @property
    def takes(self) -> str | None:
        """What a sample is asked for by: "prompts", "labels", or None."""
        if self.text is not None:
            return "prompts"
        return None if self.diffusion.classes is None else "labels"


def conditions(pipeline: Pipeline, wanted: Sequence[str] | np.ndarray | None) -> Any:
    """y of the samples that are wanted, as NumPy arrays with a row for each.

    Args:
      wanted: N prompts for a pipeline with a text encoder; labels [N], the null class included, for one
        with classes; None without either.

    Returns:
      int32 [N] of labels; the context [N, L, D] float32 of prompts; for PixArt a dict of "context", "mask"
      [N, L] and, with micro conditions, "resolution" [N, 2] and "aspect_ratio" [N, 1]; or None.

    Raises ValueError for the wrong kind of condition, labels that are no classes, or an empty list.
    """
    takes = pipeline.takes
    if takes is None:
        if wanted is not None:
            raise ValueError("this model is unconditional: it takes neither labels nor prompts.")
        return None
    if wanted is None or not len(wanted):
        raise ValueError(f"this model is conditional: give it {takes}, one for each sample.")
    if any(isinstance(one, str) for one in wanted) != (takes == "prompts"):
        raise ValueError(f"this model is conditional on {takes}, and was given {wanted[0]!r}.")
    if takes == "labels":
        return _labels(pipeline, wanted)
    hidden, mask = _encode_texts(pipeline.text, [str(prompt) for prompt in wanted])
    if isinstance(pipeline.text.config, TextConfig):
        return hidden
    y = {"context": hidden, "mask": mask.astype(np.float32)}
    if pipeline.diffusion.config.get("micro_conditions"):
        height, width, _ = pipeline.image_shape
        rows = np.ones((len(wanted), 1), np.float32)
        y |= {"resolution": rows * np.float32([[height, width]])}
        y |= {"aspect_ratio": rows * np.float32(height / width)}
    return y


def null_condition(pipeline: Pipeline) -> Any:
    """What the unconditional branch reads, as `guidance.classifier_free` takes it: the null class, the row of
    the empty prompt (every leaf [1, ...]), the null caption alone, or None where there is no such branch."""
    if pipeline.null_caption is not None:
        return {"context": pipeline.null_caption[None]}
    if pipeline.text is not None:
        return conditions(pipeline, [""])
    null = pipeline.diffusion.null_class
    return None if null is None else np.int32(null)


def decode(pipeline: Pipeline, latents: Any, batch_size: int | None = None) -> np.ndarray:
    """Images [N, H, W, C] float32, about [-1, 1] and not clipped, of what the network drew [N, h, w, c].

    The first stage takes the scale factor out and, in a VQ model, quantizes to its codebook. batch_size:
    images decoded at a time, None for all. Without a first stage the samples are the images.
    """
    latents = np.asarray(latents, np.float32)
    if pipeline.first_stage is None:
        return latents
    config, params = pipeline.first_stage
    run = functools.partial(_decoded, config, params)
    return _in_batches(run, latents, batch_size or len(latents))


@functools.partial(jax.jit, static_argnums=0)
def _decoded(config: AutoencoderConfig, params: Mapping, latents: jax.Array) -> jax.Array:
    return stage_one.decode(config, params, latents)


@functools.partial(jax.jit, static_argnums=0)
def _clip_hidden(config: TextConfig, params: Mapping, ids: jax.Array) -> jax.Array:
    return TextTower(config).apply({"params": params}, ids)["hidden"]


@functools.partial(jax.jit, static_argnums=0)
def _t5_hidden(config: T5Config, params: Mapping, ids: jax.Array) -> jax.Array:
    tokens, mask = ids[..., 0], ids[..., 1] > 0
    return T5Encoder(config).apply({"params": params}, tokens, mask)


def _encode_texts(text: TextEncoder, prompts: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Hidden states [N, L, D] and, of T5, the mask [N, L] of tokens that are no padding."""
    if isinstance(text.config, TextConfig):
        ids, mask, hidden = tokenize(text.tokenizer, prompts, text.length), None, _clip_hidden
    else:
        ids, mask = tokenize_t5(text.tokenizer, prompts, text.length)
        ids, hidden = np.stack([ids, mask.astype(ids.dtype)], axis=-1), _t5_hidden
    run = functools.partial(hidden, text.config, text.params)
    return _in_batches(run, ids, _TEXTS_AT_ONCE), mask


def _in_batches(run, rows: np.ndarray, size: int) -> np.ndarray:
    """run(rows) by batches of one size, so that it compiles once; the last is filled up by its last row."""
    found = []
    for first in range(0, len(rows), size):
        take = np.minimum(np.arange(first, first + size), len(rows) - 1)
        found.append(np.asarray(run(jnp.asarray(rows[take])))[: len(rows) - first])
    return np.concatenate(found)


def _labels(pipeline: Pipeline, wanted: Any) -> np.ndarray:
    labels = np.asarray(wanted)
    null = pipeline.diffusion.null_class
    last = pipeline.diffusion.classes - 1 if null is None else null
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > last:
        raise ValueError(f"labels are whole numbers [N] from 0 to {last}, got {wanted!r}.")
    return labels.astype(np.int32)
