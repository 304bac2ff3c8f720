"""The encoder of T5 v1.1: captions to hidden states, as PixArt, SD3 and OpenSora use them.

Raffel et al. 2020, arXiv 1910.10683, and Shazeer 2020, arXiv 2002.05202, for the gated perceptron of
version 1.1: no bias anywhere, RMS normalization before each part, learned biases by relative position
(those of the first block serve all), no scaling of the scores, tanh-approximate GELU.
"""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of the encoder: `hidden` of the perceptron, `buckets` and `max_distance` of the position bias.

    vocabulary: rows of the embedding, more than the tokenizer has symbols. dtype: "float32" or "bfloat16",
    the compute type, but for normalizations and softmax, which are float32;
    parameters are float32.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    head_width: int = 64
    vocabulary: int = 32128
    buckets: int = 32
    max_distance: int = 128
    dtype: str = "float32"


# The encoders of the published v1.1 models; PixArt and SD3 use the last.
T5_SIZES = types.MappingProxyType(
    {
        "t5-v1_1-small": T5Config(width=512, layers=8, heads=6, hidden=1024),
        "t5-v1_1-base": T5Config(width=768, layers=12, heads=12, hidden=2048),
        "t5-v1_1-large": T5Config(width=1024, layers=24, heads=16, hidden=2816),
        "t5-v1_1-xl": T5Config(width=2048, layers=24, heads=32, hidden=5120),
        "t5-v1_1-xxl": T5Config(width=4096, layers=24, heads=64, hidden=10240),
    }
)


def position_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket [N, N] int32 of (query, key): half of them for keys behind the query, half for those before.

    Of each half, one half counts single steps and the rest grows as the logarithm up to `max_distance`,
    in float32 as the published code rounds it.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    growth = np.log(ratio) / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + growth.astype(np.int32), half - 1)
    return (np.where(offset > 0, half, 0) + np.where(distance < exact, distance, far)).astype(
        np.int32
    )


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, over the last axis, in float32."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:])
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + _EPS)
        return (h * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


class T5Block(nn.Module):
    """x [B, N, width], bias [B or 1, heads, N, N] added to the scores -> x."""

    config: T5Config

    @nn.compact
    def __call__(self, x, bias):
        c = self.config

        def dense(name, x, features):
            return nn.Dense(features, use_bias=False, dtype=c.dtype, name=name)(x)

        h = RMSNorm(name="norm1")(x)
        query, key, value = (
            dense(name, h, c.heads * c.head_width).reshape(*x.shape[:2], c.heads, c.head_width)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32) + bias
        weights = jax.nn.softmax(scores).astype(x.dtype)
        h = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        x = x + dense("out", h.reshape(*x.shape[:2], -1), c.width)
        h = RMSNorm(name="norm2")(x)
        h = jax.nn.gelu(dense("gate", h, c.hidden), approximate=True) * dense("up", h, c.hidden)
        return x + dense("down", h, c.width)


class T5Encoder(nn.Module):
    """Token ids [B, N] int32 and mask [B, N] (True: a token, False: padding) -> [B, N, width] float32.

    Padding is not attended to; its own rows are still computed, and of no use. mask None: no padding.

    Raises ValueError for another shape of ids or mask.
    """

    config: T5Config

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        c = self.config
        if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
            shape = None if mask is None else mask.shape
            raise ValueError(
                f"T5 takes ids [B, N] and a mask of that shape, got {ids.shape}, {shape}."
            )
        normal = nn.initializers.normal(1.0)
        tokens = self.param("token_embedding", normal, (c.vocabulary, c.width))
        table = self.param("position_bias", normal, (c.buckets, c.heads))
        buckets = position_buckets(ids.shape[1], c.buckets, c.max_distance)
        bias = jnp.transpose(table[buckets], (2, 0, 1))[None].astype(jnp.float32)
        if mask is not None:
            # The lowest finite number, not -inf: a row without any token stays finite.
            lowest = jnp.finfo(jnp.float32).min
            bias = jnp.where(mask.astype(bool)[:, None, None, :], bias, lowest)
        x = tokens[ids].astype(c.dtype)
        for i in range(c.layers):
            x = T5Block(c, name=f"block_{i}")(x, bias)
        return RMSNorm(name="final_norm")(x).astype(jnp.float32)


@functools.cache
def t5_shapes(config: T5Config) -> dict:
    """The parameters' shapes; nothing is computed."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(T5Encoder(config).init, jax.random.key(0), ids)["params"]
