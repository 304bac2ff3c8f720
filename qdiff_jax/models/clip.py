"""CLIP's two towers: captions to what conditions Stable Diffusion, both to the vectors of the CLIP score.

Radford et al. 2021, arXiv 2103.00020. The activation is x sigmoid(1.702 x), as in OpenAI's weights.
Weights that others trained under the same names with the exact GELU (most of LAION's) have the same
shapes, cannot be told apart, and give wrong features here.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

_PRECISION = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """A transformer: width, number of layers and of heads; `hidden` of the perceptron, 0: 4 x width."""

    width: int
    layers: int
    heads: int
    hidden: int = 0


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text tower. `embedding_dim` 0: without a projection, as Stable Diffusion has it.

    vocabulary: number of token ids; the last one ends a caption. positions: the longest caption, in
    tokens.
    """

    tower: TowerConfig
    embedding_dim: int = 0
    vocabulary: int = 49408
    positions: int = 77


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Both towers.

    Attributes:
      vision, text: the transformers.
      embedding_dim: size of the space that both are projected into.
      patch: side length of a patch; `size` (of the image) is a multiple of it.
      vocabulary: number of token ids; the last one ends a caption.
      positions: the longest caption, in tokens.
    """

    vision: TowerConfig
    text: TowerConfig
    embedding_dim: int
    patch: int
    size: int = 224
    vocabulary: int = 49408
    positions: int = 77

    @property
    def text_config(self) -> TextConfig:
        return TextConfig(self.text, self.embedding_dim, self.vocabulary, self.positions)


# The published sizes, with which OpenAI's weights come.
VIT_B32 = ClipConfig(TowerConfig(768, 12, 12), TowerConfig(512, 12, 8), embedding_dim=512, patch=32)
VIT_L14 = ClipConfig(
    TowerConfig(1024, 24, 16), TowerConfig(768, 12, 12), embedding_dim=768, patch=14
)
# What Stable Diffusion 1.x is conditioned on: the text tower of ViT-L/14 without its projection.
SD_TEXT = TextConfig(VIT_L14.text)


def _norm(name, x):
    # Flax's own defaults are eps 1e-6 and the variance as a difference of means of squares.
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)(x)


def _dense(name, x, features, bias=True):
    return nn.Dense(features, use_bias=bias, precision=_PRECISION, name=name)(x)


class Block(nn.Module):
    """x [B, N, width] -> the same shape: attention, then a perceptron."""

    tower: TowerConfig
    causal: bool

    @nn.compact
    def __call__(self, x):
        batch, length, width = x.shape
        heads = self.tower.heads
        h = _norm("norm1", x)
        query, key, value = (
            _dense(name, h, width).reshape(batch, length, heads, -1)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, precision=_PRECISION)
        scores = scores * (width // heads) ** -0.5
        if self.causal:
            visible = jnp.tril(jnp.ones((1, 1, length, length), bool))
            scores = jnp.where(visible, scores, -jnp.inf)
        h = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value, precision=_PRECISION)
        x = x + _dense("out", h.reshape(x.shape), width)
        h = _dense("fc1", _norm("norm2", x), self.tower.hidden or 4 * width)
        return x + _dense("fc2", h * jax.nn.sigmoid(1.702 * h), width)


class VisionTower(nn.Module):
    """Images [B, size, size, 3], preprocessed -> {"pool" [B, width], "embedding" [B, embedding_dim]}.

    "pool" is the class token after the last normalization, "embedding" its projection, of any length.
    """

    config: ClipConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        config, tower = self.config, self.config.vision
        if x.shape[1:] != (config.size, config.size, 3):
            raise ValueError(
                f"this CLIP takes images [B, {config.size}, {config.size}, 3], got {x.shape}; "
                "resize and crop them first."
            )
        side = (config.patch, config.patch)
        x = nn.Conv(
            tower.width, side, side, "VALID", use_bias=False, precision=_PRECISION, name="patch"
        )(x)
        x = x.reshape(len(x), -1, tower.width)
        normal = nn.initializers.normal(tower.width**-0.5)
        token = self.param("class_embedding", normal, (tower.width,))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, tower.width)), x], axis=1)
        x = x + self.param("position_embedding", normal, x.shape[1:])[None]
        x = _norm("pre_norm", x)
        for i in range(tower.layers):
            x = Block(tower, causal=False, name=f"block_{i}")(x)
        pool = _norm("post_norm", x[:, 0])
        return {
            "pool": pool,
            "embedding": _dense("projection", pool, config.embedding_dim, bias=False),
        }


class TextTower(nn.Module):
    """Token ids [B, N] int32, N <= positions -> {"hidden" [B, N, width], "pool" [B, width], and, with a
    projection, "embedding" [B, embedding_dim]}.

    "hidden" are all positions after the last normalization. Padding is attended to by later positions,
    as in the published models, so that "hidden" behind the caption's end depends on what it is filled up
    with. "pool" is "hidden" at the first token that ends the caption, the largest id of the vocabulary;
    no padding, of either convention, has influence on it.
    """

    config: TextConfig

    @nn.compact
    def __call__(self, ids: jax.Array) -> dict[str, jax.Array]:
        config, tower = self.config, self.config.tower
        if ids.ndim != 2 or ids.shape[1] > config.positions:
            raise ValueError(
                f"captions are token ids [B, N] with N <= {config.positions}, got {ids.shape}."
            )
        normal = nn.initializers.normal(0.02)
        tokens = self.param("token_embedding", normal, (config.vocabulary, tower.width))
        positions = self.param("position_embedding", normal, (config.positions, tower.width))
        x = tokens[ids] + positions[None, : ids.shape[1]]
        for i in range(tower.layers):
            x = Block(tower, causal=True, name=f"block_{i}")(x)
        x = _norm("final_norm", x)
        end = jnp.argmax(ids, axis=1)
        pool = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        outputs = {"hidden": x, "pool": pool}
        if config.embedding_dim:
            outputs["embedding"] = _dense("projection", pool, config.embedding_dim, bias=False)
        return outputs


@functools.cache
def text_shapes(config: TextConfig) -> dict:
    """The text tower's parameter shapes; nothing is computed."""
    ids = jax.ShapeDtypeStruct((1, config.positions), jnp.int32)
    return jax.eval_shape(TextTower(config).init, jax.random.key(0), ids)["params"]


@functools.cache
def clip_shapes(config: ClipConfig) -> dict:
    """The parameters' shapes, {"vision": ..., "text": ...}."""
    key = jax.random.key(0)
    image = jax.ShapeDtypeStruct((1, config.size, config.size, 3), jnp.float32)
    return {
        "vision": jax.eval_shape(VisionTower(config).init, key, image)["params"],
        "text": text_shapes(config.text_config),
    }
