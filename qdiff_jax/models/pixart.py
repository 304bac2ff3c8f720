"""PixArt-alpha and -sigma: a diffusion transformer that reads captions by cross-attention.

Source: Chen et al. 2023 (alpha, section 2.3) and 2024 (sigma), and the released weights. Against DiT
(`dit`): the six modulation vectors of all blocks are one projection of the timestep ("adaLN-single") to
which each block adds a table of its own,

    beta_1, gamma_1, alpha_1, beta_2, gamma_2, alpha_2 = E_i + silu(t_emb) A + a
    x <- x + alpha_1 attention(LN(x) (1 + gamma_1) + beta_1)
    x <- x + cross_attention(x, caption)
    x <- x + alpha_2 mlp(LN(x) (1 + gamma_2) + beta_2)

and positions are scaled so that every size of image spans the places of the base size. The 1024-pixel
alpha models also embed the size and shape of the training image. Every operator goes through `sites.op`;
the forward pass is the block program. Parameter names follow the released files as those of DiT do.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qdiff_jax.models.dit import AdaLN, modulate, sincos_positions, timestep_embedding, unpatchify
from qdiff_jax.models.layers import conv, dense
from qdiff_jax.models.program import Node, run_program, validate
from qdiff_jax.operators import PV, QK, Operator
from qdiff_jax.sites import op

_FREQUENCIES = 256  # width of the sinusoids of timestep and sizes
# Added to the logits of caption tokens that are padding, as diffusers does; the released code leaves these
# tokens out of the attention.
_MASKED = -10000.0

# What y holds, without and with micro conditions.
_CONDITIONS = {
    False: {"context", "mask"},
    True: {"context", "mask", "resolution", "aspect_ratio"},
}

_XAVIER = nn.initializers.xavier_uniform()
_NORMAL = nn.initializers.normal(0.02)
_ZERO = nn.initializers.zeros_init()


@dataclasses.dataclass(frozen=True)
class PixArtConfig:
    """Sizes of the network; the defaults are the released 1024-pixel sigma model.

    resolution: side of the latent image trained on; others may be given to the network, rectangular ones
    included. interpolation: of positions, see `positions`. caption_dim, caption_length: of the text
    encoder's output (300 tokens, 120 for alpha). micro_conditions: also conditional on the size and the
    aspect ratio of the image. learn_sigma, dtype: as in `DiTConfig`. num_classes is None: there are none.
    Raises ValueError for sizes that do not divide or an unknown dtype.
    """

    width: int = 1152
    depth: int = 28
    heads: int = 16
    patch: int = 2
    mlp_ratio: float = 4.0
    resolution: int = 128
    interpolation: float = 2.0
    in_channels: int = 4
    caption_dim: int = 4096
    caption_length: int = 300
    micro_conditions: bool = False
    learn_sigma: bool = True
    dtype: str = "float32"
    num_classes: None = None

    @property
    def null_class(self) -> None:
        """There is none: the unconditional branch reads a caption (`port.pixart.null_caption`)."""
        return None

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    def example_condition(self, batch: int = 1) -> dict:
        """y of the shapes and dtypes that the network takes: zeros, every token masked in.

        "context" [batch, L, D] and "mask" [batch, L] float32, 1 for a token and 0 for padding; with micro
        conditions "resolution" [batch, 2], height and width in pixels, and "aspect_ratio" [batch, 1].
        """
        length = self.caption_length
        y = {
            "context": jnp.zeros((batch, length, self.caption_dim)),
            "mask": jnp.ones((batch, length)),
        }
        if self.micro_conditions:
            y |= {"resolution": jnp.zeros((batch, 2)), "aspect_ratio": jnp.ones((batch, 1))}
        return y

    def __post_init__(self):
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"width={self.width} must be divisible by heads={self.heads} and by 4 (the position "
                "table has a sine and a cosine for each of two axes)."
            )
        if self.micro_conditions and self.width % 3:
            raise ValueError(
                f"width={self.width} must be divisible by 3: height, width and aspect ratio share it."
            )
        if self.resolution % self.patch:
            raise ValueError(
                f"resolution={self.resolution} must be divisible by patch={self.patch}."
            )
        if not self.interpolation > 0:
            raise ValueError(f"interpolation must be positive, got {self.interpolation}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {self.dtype!r} is not one of 'float32', 'bfloat16'.")


def positions(width: int, rows: int, columns: int, base: int, interpolation: float) -> np.ndarray:
    """The fixed position embedding [rows * columns, width] float32, tokens in row-major order.

    Token i of n lies at i base / (n interpolation): whatever the size, an axis spans base / interpolation
    places, base being the tokens of the training size.
    """
    places = (np.arange(n, dtype=np.float64) * base / (n * interpolation) for n in (rows, columns))
    return sincos_positions(width, *places)


class PixArtPatchEmbed(nn.Module):
    """Image [B, H, W, C] to tokens [B, N, D]: a convolution of stride `patch`, plus positions."""

    width: int
    patch: int
    base: int
    interpolation: float
    dtype: str

    @nn.compact
    def __call__(self, x, train=False):
        stride = Operator("conv", (self.patch, self.patch))
        x = conv(self, "proj", x.astype(self.dtype), self.width, self.patch, stride)
        batch, rows, columns, width = x.shape
        table = positions(width, rows, columns, self.base, self.interpolation)
        return x.reshape(batch, rows * columns, width) + jnp.asarray(table).astype(x.dtype)[None]


class TimeEmbedder(nn.Module):
    """t_emb [B, D]: sinusoid -> mlp_0 -> SiLU -> mlp_2, with micro conditions plus the embeddings of
    height, width (one network for both) and aspect ratio, a third of the width each."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, t, y=None, train=False):
        embedding = self._embed("", t, self.width)
        if y is None:
            return embedding
        # Height and width stay rows of their sample: ranges and step tables count samples.
        parts = [
            self._embed(name, y[value], self.width // 3).reshape(t.shape[0], -1)
            for name, value in (("csize_", "resolution"), ("ar_", "aspect_ratio"))
        ]
        return embedding + jnp.concatenate(parts, axis=-1)

    def _embed(self, name, values, width):
        h = timestep_embedding(values.reshape(-1), _FREQUENCIES).astype(self.dtype)
        h = h.reshape(*values.shape, _FREQUENCIES)
        h = dense(self, f"{name}mlp_0", h, width, init=_NORMAL)
        return dense(self, f"{name}mlp_2", nn.silu(h), width, init=_NORMAL)


class CaptionEmbedder(nn.Module):
    """Caption tokens y["context"] [B, L, E] to [B, L, D]: fc1 -> GELU -> fc2."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, y, train=False):
        h = dense(self, "fc1", y["context"].astype(self.dtype), self.width, init=_NORMAL)
        return dense(self, "fc2", nn.gelu(h, approximate=True), self.width, init=_NORMAL)


class CaptionMask(nn.Module):
    """What is added to the logits of each caption token: [B, 1, 1, L] float32, 0 or -10000."""

    @nn.compact
    def __call__(self, y, train=False):
        return (1.0 - y["mask"].astype(jnp.float32))[:, None, None, :] * _MASKED


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention and MLP; only the first and last are modulated and gated.

    Called with tokens [B, N, D], the shared modulation [B, 6 D], the caption [B, L, D] and its mask.
    """

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x, modulation, caption, mask, train=False):
        width = x.shape[-1]
        vectors = _with_table(self, modulation, 6, width)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = vectors
        h = dense(self, "attn_qkv", modulate(x, shift_a, scale_a), 3 * width, init=_XAVIER)
        h = self._attend("attn", *jnp.split(h, 3, axis=-1))
        x = x + gate_a[:, None, :] * dense(self, "attn_proj", h, width, init=_XAVIER)
        q = dense(self, "cross_attn_q_linear", x, width, init=_XAVIER)
        k, v = jnp.split(
            dense(self, "cross_attn_kv_linear", caption, 2 * width, init=_XAVIER), 2, axis=-1
        )
        h = self._attend("cross_attn", q, k, v, mask)
        x = x + dense(self, "cross_attn_proj", h, width, init=_ZERO)
        h = dense(self, "mlp_fc1", modulate(x, shift_m, scale_m), self.hidden, init=_XAVIER)
        h = dense(self, "mlp_fc2", nn.gelu(h, approximate=True), width, init=_XAVIER)
        return x + gate_m[:, None, :] * h

    def _attend(self, name, q, k, v, mask=None):
        """softmax(q k^T / sqrt(d) + mask) v, all [B, tokens, D]."""
        batch, tokens, width = q.shape
        q, k, v = (
            a.reshape(batch, -1, self.heads, width // self.heads).swapaxes(1, 2) for a in (q, k, v)
        )
        logits = op(self, f"{name}_qk", QK, q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
        weights = nn.softmax(logits if mask is None else logits + mask, axis=-1).astype(v.dtype)
        h = op(self, f"{name}_pv", PV, weights, v)
        return h.swapaxes(1, 2).reshape(batch, tokens, width)


def _with_table(module, vectors, count, width):
    """`count` vectors [B, D]: the shared ones [B, count * D] plus the block's own table [count, D]."""
    init = nn.initializers.normal(1 / math.sqrt(width))
    table = module.param("scale_shift_table", init, (count, width)).astype(vectors.dtype)
    return jnp.moveaxis(vectors.reshape(-1, count, width) + table[None], 1, 0)


class PixArtFinalLayer(nn.Module):
    """Modulated LayerNorm (t_emb itself plus a table), a dense layer, and patches put back."""

    patch: int
    out_channels: int

    @nn.compact
    def __call__(self, tokens, embedding, x, train=False):
        width = tokens.shape[-1]
        shift, scale = _with_table(self, jnp.tile(embedding, (1, 2)), 2, width)
        features = self.patch * self.patch * self.out_channels
        h = dense(self, "linear", modulate(tokens, shift, scale), features, init=_ZERO)
        return unpatchify(h, x.shape[1] // self.patch, x.shape[2] // self.patch, self.patch)


@functools.cache
def pixart_program(config: PixArtConfig) -> tuple[Node, ...]:
    """The block program: inputs "x" [B, H, W, C], "t" [B] and "y" (`PixArtConfig.example_condition`)."""
    c = config
    embed = PixArtPatchEmbed(
        c.width, c.patch, c.resolution // c.patch, c.interpolation, c.dtype, parent=None
    )
    conditions = ("t", "y") if c.micro_conditions else ("t",)
    nodes = [
        Node("t_embedder", TimeEmbedder(c.width, c.dtype, parent=None), conditions),
        Node("t_block", AdaLN(6 * c.width, parent=None), ("t_embedder",)),
        Node("y_embedder", CaptionEmbedder(c.width, c.dtype, parent=None), ("y",)),
        Node("y_mask", CaptionMask(parent=None), ("y",)),
        Node("x_embedder", embed, ("x",)),
    ]
    block = PixArtBlock(c.heads, int(c.width * c.mlp_ratio), parent=None)
    for i in range(c.depth):
        reads = (nodes[-1].name, "t_block", "y_embedder", "y_mask")
        nodes.append(Node(f"blocks_{i}", block, reads))
    final = PixArtFinalLayer(c.patch, c.out_channels, parent=None)
    nodes.append(Node("final_layer", final, (nodes[-1].name, "t_embedder", "x")))
    validate(nodes, ("x", "t", "y"))
    return tuple(nodes)


class PixArt(nn.Module):
    """Noise estimate [B, H, W, out_channels] float32 from x [B, H, W, C], t [B] and y, a caption.

    With `learn_sigma` the channels are [eps, v]; the published samplers use eps alone.
    Raises ValueError without a caption, or for an image that does not divide into patches.
    """

    config: PixArtConfig

    @nn.compact
    def __call__(self, x, t, y=None, train=False):
        c = self.config
        wanted = _CONDITIONS[c.micro_conditions]
        if not isinstance(y, dict) or set(y) != wanted:
            raise ValueError(
                f"This PixArt is conditional on captions: pass y, a dict of {sorted(wanted)}."
            )
        if x.shape[1] % c.patch or x.shape[2] % c.patch:
            raise ValueError(
                f"an image of {x.shape[1]} x {x.shape[2]} does not divide into patches of {c.patch}."
            )
        return run_program(self, pixart_program(c), {"x": x, "t": t, "y": y}, train=train)
