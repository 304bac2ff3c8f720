"""Whole pipelines in miniature: random weights and vocabularies made in code, for smoke runs and tests.

Every kind of part of the published ones is here: a VQ and a KL first stage, CLIP's and T5's encoders.
"""

from __future__ import annotations

import functools
import hashlib
import types
from typing import NamedTuple

import jax
import numpy as np

from qdiff_jax.models import registry
from qdiff_jax.models.autoencoder import AutoencoderConfig, autoencoder_shapes
from qdiff_jax.models.clip import TextConfig, TowerConfig, text_shapes
from qdiff_jax.models.clip_tokenizer import END, START, ClipTokenizer, byte_symbols
from qdiff_jax.models.pipeline import FirstStage, Pipeline, TextEncoder
from qdiff_jax.models.t5 import T5Config, t5_shapes

_SIZES = {"multipliers": (1, 1), "channels": 4, "res_blocks": 1, "groups": 2, "resolution": 16}
_VQ = AutoencoderConfig(z_channels=1, embed_dim=1, codes=16, **_SIZES)
_KL = AutoencoderConfig(z_channels=4, embed_dim=4, scale_factor=0.18215, **_SIZES)
_FIRST_STAGES = types.MappingProxyType(
    {
        "random:ldm": _VQ,
        "random:dit_latent": _KL,
        "random:sd": _KL,
        "random:pixart": _KL,
    }
)


class ByteVocabulary(NamedTuple):
    """Every byte a token, behind the padding (0) and the end (1): the interface of a sentencepiece model."""

    def encode(self, text: str) -> list[int]:
        return [2 + byte for byte in text.encode("utf-8")]

    def pad_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return 1


@functools.cache
def miniature_pipeline(name: str) -> Pipeline:
    """The pipeline around `registry.miniature(name)`: 8x8 latents to pictures of 16x16 pixels in colour, or
    the model alone where it is one in pixels.

    "random:ldm": classes, VQ. "random:dit_latent": classes, a learned variance, KL. "random:sd": prompts by
    CLIP. "random:pixart": prompts by T5, a learned variance, micro conditions.
    """
    diffusion = registry.miniature(name)
    if name not in _FIRST_STAGES:
        return Pipeline(diffusion)
    config = _FIRST_STAGES[name]
    stage = FirstStage(config, registry.random_params(autoencoder_shapes(config), seed=1))
    source = {"first_stage_sha256": _digest(stage.params)}
    text = None
    if name == "random:sd":
        clip = TextConfig(TowerConfig(width=8, layers=1, heads=2), vocabulary=514, positions=16)
        params = registry.random_params(text_shapes(clip), seed=2)
        text = TextEncoder(clip, params, byte_tokenizer(), clip.positions)
    elif name == "random:pixart":
        t5 = T5Config(
            width=8, layers=1, heads=2, hidden=16, head_width=4, vocabulary=258, buckets=8
        )
        params = registry.random_params(t5_shapes(t5), seed=2)
        text = TextEncoder(t5, params, ByteVocabulary(), diffusion.config["caption_length"])
    if text is not None:
        source["text_sha256"] = _digest(text.params)
    return Pipeline(diffusion, stage, text, source)


def byte_tokenizer() -> ClipTokenizer:
    """CLIP's tokenizer without a single merge: every byte of a word is a token."""
    symbols = [*byte_symbols(), START, END]
    return ClipTokenizer({symbol: i for i, symbol in enumerate(symbols)}, {})


def _digest(params) -> str:
    leaves = (np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))
    return hashlib.sha256(b"".join(leaves)).hexdigest()
