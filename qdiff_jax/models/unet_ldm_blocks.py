"""Residual blocks, resampling and embeddings of the U-Nets of latent diffusion and guided diffusion.

Sources: Dhariwal and Nichol 2021 (scale-shift norm, resampling inside residual blocks), Rombach et al.
2022, and the released checkpoints: GroupNorm with eps 1e-5, stride-2 convolutions padded symmetrically,
nearest upsampling, sinusoids in order [cos, sin] without a shift of the frequencies.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from qdiff_jax.models.dit import timestep_embedding  # the same convention
from qdiff_jax.models.layers import conv, dense
from qdiff_jax.models.unet_ddpm import group_norm
from qdiff_jax.operators import same_conv

_GN_EPS = 1e-5


class TimeEmbedding(nn.Module):
    """h(t): sinusoid -> dense_0 -> SiLU -> dense_2 [B, 4 C], plus the embedding of one of `labels`, or of
    `vector` numbers y [B, vector] by two dense layers of their own."""

    channels: int
    labels: int | None
    vector: int | None
    dtype: str

    @nn.compact
    def __call__(self, t, y=None, train=False):
        emb = timestep_embedding(t, self.channels).astype(self.dtype)
        emb = dense(self, "dense_0", emb, 4 * self.channels)
        emb = dense(self, "dense_2", nn.silu(emb), 4 * self.channels)
        if self.labels is not None:
            table = nn.Embed(self.labels, 4 * self.channels, name="label_emb")
            emb = emb + table(y).astype(self.dtype)
        if self.vector is not None:
            h = dense(self, "label_emb_0", y.astype(self.dtype), 4 * self.channels)
            emb = emb + dense(self, "label_emb_2", nn.silu(h), 4 * self.channels)
        return emb


class ClassEmbedder(nn.Module):
    """Labels [B] as a context [B, 1, D]; row `rows - 1` of the table is the null class."""

    rows: int
    features: int
    dtype: str

    @nn.compact
    def __call__(self, y, train=False):
        table = nn.Embed(self.rows, self.features, name="embedding")
        return table(y)[:, None, :].astype(self.dtype)


class ResBlock(nn.Module):
    """GN-SiLU-conv, the temporal feature, GN-SiLU-dropout-conv, + (1x1) skip_connection.

    Called with one or two feature maps (the second a skip, concatenated behind) and the projected
    temporal feature: [B, features] to be added, or, with `scale_shift`, [B, 2 features] with which the
    second norm becomes GN(h) (1 + scale) + shift. resample: "up" or "down" doubles or halves the side
    of both branches before the first convolution, "" keeps it.
    """

    features: int
    groups: int
    dropout: float
    scale_shift: bool = False
    resample: str = ""

    @nn.compact
    def __call__(self, *inputs, train=False):
        *maps, emb = inputs
        x = maps[0] if len(maps) == 1 else jnp.concatenate(maps, axis=-1)
        h = nn.silu(group_norm("in_layers_0", self.groups, x, _GN_EPS))
        h, x = _resampled(h, self.resample), _resampled(x, self.resample)
        h = conv(self, "in_layers_2", h, self.features)
        emb = emb[:, None, None, :]
        if self.scale_shift:
            scale, shift = jnp.split(emb, 2, axis=-1)
            h = group_norm("out_layers_0", self.groups, h, _GN_EPS) * (1.0 + scale) + shift
        else:
            h = group_norm("out_layers_0", self.groups, h + emb, _GN_EPS)
        h = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(h))
        h = conv(self, "out_layers_3", h, self.features)
        if x.shape[-1] != self.features:
            x = conv(self, "skip_connection", x, self.features, size=1)
        return x + h


class Downsample(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return conv(self, "op", x, x.shape[-1], operator=same_conv(3, stride=2))


class ConvOut(nn.Module):
    features: int
    groups: int

    @nn.compact
    def __call__(self, x, train=False):
        h = nn.silu(group_norm("out_0", self.groups, x, _GN_EPS))
        return conv(self, "out_2", h, self.features).astype(jnp.float32)


def _resampled(x: jax.Array, how: str) -> jax.Array:
    """x [B, H, W, C] repeated ("up") or averaged over 2x2 ("down")."""
    if how == "up":
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    if how == "down":
        batch, height, width, channels = x.shape
        return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))
    return x
