"""Multi-head attention of the latent-diffusion U-Nets: over positions, and from positions to a context.

Sources: `AttentionBlock` of OpenAI's diffusion models (Dhariwal and Nichol 2021); the spatial transformer
of Rombach et al. 2022, section 3.3. Softmax in float32, logits scaled by d^-1/2 with d channels a head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from qdiff_jax.models.layers import dense
from qdiff_jax.models.unet_ddpm import group_norm
from qdiff_jax.operators import PV, QK
from qdiff_jax.sites import op

_GN_EPS = 1e-5
_TRANSFORMER_GN_EPS = 1e-6  # the norm before a transformer has another eps than all others
_LN_EPS = 1e-5


def attend(module: nn.Module, prefix: str, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v with sites `<prefix>qk` and `<prefix>pv` of the module.

    q: [B, heads, N, d]; k, v: [B, heads, M, d]. Returns [B, N, heads * d].
    """
    logits = op(module, f"{prefix}qk", QK, q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    weights = nn.softmax(logits, axis=-1).astype(v.dtype)
    h = op(module, f"{prefix}pv", PV, weights, v).swapaxes(1, 2)
    return h.reshape(*h.shape[:2], -1)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """[B, N, heads * d] -> [B, heads, N, d]."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def split_qkv(qkv: jax.Array, heads: int, new_order: bool) -> tuple[jax.Array, ...]:
    """q, k, v [B, heads, N, d] of one layer's output [B, N, 3 heads d].

    Its channels are ordered (head, [q, k, v], d), as all published models have them but those trained
    with `new_order`: ([q, k, v], head, d).
    """
    split = (*qkv.shape[:2], 3, heads, -1) if new_order else (*qkv.shape[:2], heads, 3, -1)
    return tuple(
        part.swapaxes(1, 2) for part in jnp.moveaxis(qkv.reshape(split), 2 if new_order else 3, 0)
    )


class AttentionBlock(nn.Module):
    """Self-attention over positions with residual, one dense layer for q, k and v (see `split_qkv`)."""

    heads: int
    groups: int
    new_order: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        batch, height, width, channels = x.shape
        h = group_norm("norm", self.groups, x, _GN_EPS).reshape(batch, height * width, channels)
        q, k, v = split_qkv(dense(self, "qkv", h, 3 * channels), self.heads, self.new_order)
        h = dense(self, "proj_out", attend(self, "", q, k, v), channels)
        return x + h.reshape(x.shape)


class TransformerIn(nn.Module):
    """The door of a spatial transformer: GroupNorm and a 1x1 layer, [B, H, W, C] to tokens [B, HW, C]."""

    groups: int

    @nn.compact
    def __call__(self, x, train=False):
        h = group_norm("norm", self.groups, x, _TRANSFORMER_GN_EPS)
        return dense(self, "proj_in", h.reshape(x.shape[0], -1, x.shape[-1]), x.shape[-1])


class TransformerBlock(nn.Module):
    """Self-attention, attention to a context and a gated MLP, each behind a LayerNorm and with residual.

    Called with tokens [B, N, C] and the context [B, L, D]; the MLP is four times as wide as the tokens.
    """

    heads: int

    @nn.compact
    def __call__(self, x, context, train=False):
        h = layer_norm("norm1", x)
        x = x + self._attention("attn1", h, h)
        x = x + self._attention("attn2", layer_norm("norm2", x), context.astype(x.dtype))
        h = dense(self, "ff_net_0_proj", layer_norm("norm3", x), 8 * x.shape[-1])
        return x + dense(self, "ff_net_2", geglu(h), x.shape[-1])

    def _attention(self, name, x, context):
        width = x.shape[-1]
        q, k, v = (
            split_heads(dense(self, f"{name}_to_{part}", read, width, use_bias=False), self.heads)
            for part, read in (("q", x), ("k", context), ("v", context))
        )
        return dense(self, f"{name}_to_out_0", attend(self, f"{name}_", q, k, v), width)


class TransformerOut(nn.Module):
    """A 1x1 layer on the tokens [B, HW, C], put back as a map and added to the map x [B, H, W, C] that
    the transformer has read."""

    @nn.compact
    def __call__(self, tokens, x, train=False):
        return x + dense(self, "proj_out", tokens, x.shape[-1]).reshape(x.shape)


def geglu(h: jax.Array) -> jax.Array:
    """[..., 2 D] -> [..., D]: the first half times the exact GELU of the second."""
    value, gate = jnp.split(h, 2, axis=-1)
    return value * nn.gelu(gate, approximate=False)


def layer_norm(name: str, x: jax.Array) -> jax.Array:
    """LayerNorm over channels with scale and bias, in float32 whatever x is."""
    norm = nn.LayerNorm(epsilon=_LN_EPS, use_fast_variance=False, name=name)
    return norm(x.astype(jnp.float32)).astype(x.dtype)
