"""The DDPM U-Net in the topology and parameter meaning of the CIFAR-10 checkpoint family.

Source: Ho et al. 2020, appendix B, and the released checkpoints: residual blocks with GroupNorm and
SiLU, one-head attention, skips concatenated as [h, skip], asymmetric padding (0, 1) before stride-2
convolutions, nearest upsampling. Every operator goes through `sites.op`; the forward pass is the
block program. Parameter names follow the checkpoint, dots as underscores (`down.0.block.0.conv1` is
`down_0_block_0/conv1`); `temb_proj` of a residual block is a block of its own
(`down_0_block_0_temb_proj/dense`), so that temporal features can be treated as one unit.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from qdiff_jax.models.layers import conv, dense
from qdiff_jax.models.program import Node, run_program, validate
from qdiff_jax.operators import PV, QK, Operator
from qdiff_jax.sites import op

_GN_EPS = 1e-6
_DOWNSAMPLE = Operator("conv", (2, 2), ((0, 1), (0, 1)))


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Sizes of the network. The published CIFAR-10 model is `UNetConfig.cifar10()`.

    multipliers: channel multiplier per resolution, highest first; a fraction where the product is a whole
    number. attention_resolutions: side lengths
    with attention after each residual block (the middle always has one). num_classes: None for an
    unconditional model; otherwise classes 0..num_classes-1 and the null class num_classes.
    dtype: "float32" or "bfloat16", the compute type; parameters are float32.
    """

    channels: int = 128
    multipliers: tuple[int | float, ...] = (1, 2, 2, 2)
    res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    resolution: int = 32
    in_channels: int = 3
    out_channels: int = 3
    groups: int = 32
    dropout: float = 0.1
    num_classes: int | None = None
    dtype: str = "float32"

    @property
    def null_class(self) -> int | None:
        """The label of the unconditional branch, None for an unconditional model."""
        return self.num_classes

    @staticmethod
    def cifar10() -> UNetConfig:
        return UNetConfig()

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels per resolution, highest first."""
        return tuple(round(self.channels * multiplier) for multiplier in self.multipliers)

    def __post_init__(self):
        for multiplier, width in zip(self.multipliers, self.widths):
            if abs(self.channels * multiplier - width) > 1e-6:
                raise ValueError(
                    f"channels={self.channels} times the multiplier {multiplier} is no whole number."
                )
        for width in (self.channels, *self.widths):
            if width % self.groups:
                raise ValueError(
                    f"groups={self.groups} must divide every width, and {width} is not divisible by it."
                )
        if self.resolution % 2 ** (len(self.multipliers) - 1):
            raise ValueError(
                f"resolution={self.resolution} must be divisible by "
                f"{2 ** (len(self.multipliers) - 1)}, one halving per level below the first."
            )


def timestep_embedding(t: jax.Array, dim: int) -> jax.Array:
    """Sinusoidal embedding [B, dim] of (fractional) timesteps t [B], as in the DDPM checkpoints.

    f_k = exp(-ln(10000) k / (dim/2 - 1)), order [sin, cos].
    """
    half = dim // 2
    freqs = jnp.exp(jnp.arange(half, dtype=jnp.float32) * (-math.log(10000.0) / (half - 1)))
    args = t.astype(jnp.float32)[:, None] * freqs[None, :]
    return jnp.concatenate([jnp.sin(args), jnp.cos(args)], axis=1)


def group_norm(name, groups, x, epsilon=_GN_EPS):
    """In float32 whatever x is, as Flax does inside; cast here, for it promotes implicitly."""
    norm = nn.GroupNorm(num_groups=groups, epsilon=epsilon, use_fast_variance=False, name=name)
    return norm(x.astype(jnp.float32)).astype(x.dtype)


class TimeEmbedding(nn.Module):
    """h(t): sinusoid -> dense_0 -> SiLU -> dense_1, plus the class embedding where there is one."""

    channels: int
    num_classes: int | None
    dtype: str

    @nn.compact
    def __call__(self, t, y=None, train=False):
        emb = timestep_embedding(t, self.channels).astype(self.dtype)
        emb = dense(self, "dense_0", emb, 4 * self.channels)
        emb = dense(self, "dense_1", nn.silu(emb), 4 * self.channels)
        if self.num_classes is not None:
            table = nn.Embed(self.num_classes + 1, 4 * self.channels, name="class_embed")
            emb = emb + table(y).astype(self.dtype)
        return emb


class TimeProjection(nn.Module):
    """g_i: SiLU -> dense, the temporal feature [B, features] of one residual block: what is added to its
    channels, or (latent and guided diffusion) their scales and then their shifts."""

    features: int

    @nn.compact
    def __call__(self, temb, train=False):
        return dense(self, "dense", nn.silu(temb), self.features)


class ConvIn(nn.Module):
    """The first 3x3 convolution, [B, H, W, C] to [B, H, W, features] in the compute type."""

    features: int
    dtype: str

    @nn.compact
    def __call__(self, x, train=False):
        return conv(self, "conv", x.astype(self.dtype), self.features)


class ResBlock(nn.Module):
    """GN-SiLU-conv1, + temporal feature, GN-SiLU-dropout-conv2, + (1x1) shortcut.

    Called with one or two feature maps (the second a skip, concatenated behind) and the projected
    temporal feature [B, features].
    """

    features: int
    groups: int
    dropout: float

    @nn.compact
    def __call__(self, *inputs, train=False):
        *maps, temb = inputs
        x = maps[0] if len(maps) == 1 else jnp.concatenate(maps, axis=-1)
        h = nn.silu(group_norm("norm1", self.groups, x))
        h = conv(self, "conv1", h, self.features)
        h = h + temb[:, None, None, :]
        h = nn.silu(group_norm("norm2", self.groups, h))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv(self, "conv2", h, self.features)
        if x.shape[-1] != self.features:
            x = conv(self, "nin_shortcut", x, self.features, size=1)
        return x + h


class AttnBlock(nn.Module):
    """One-head self-attention over positions with residual; softmax in float32, scale C^-1/2."""

    groups: int

    @nn.compact
    def __call__(self, x, train=False):
        batch, height, width, channels = x.shape
        h = group_norm("norm", self.groups, x).reshape(batch, height * width, channels)
        q, k, v = (dense(self, name, h, channels) for name in ("q", "k", "v"))
        logits = op(self, "qk", QK, q, k).astype(jnp.float32) * channels**-0.5
        weights = nn.softmax(logits, axis=-1).astype(x.dtype)
        h = dense(self, "proj_out", op(self, "pv", PV, weights, v), channels)
        return x + h.reshape(x.shape)


class Downsample(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return conv(self, "conv", x, x.shape[-1], operator=_DOWNSAMPLE)


class Upsample(nn.Module):
    """Nearest neighbour, then a 3x3 convolution: [B, H, W, C] to [B, 2 H, 2 W, C]."""

    @nn.compact
    def __call__(self, x, train=False):
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return conv(self, "conv", x, x.shape[-1])


class ConvOut(nn.Module):
    features: int
    groups: int

    @nn.compact
    def __call__(self, x, train=False):
        h = nn.silu(group_norm("norm_out", self.groups, x))
        return conv(self, "conv_out", h, self.features).astype(jnp.float32)


@functools.cache
def unet_program(config: UNetConfig) -> tuple[Node, ...]:
    """The block program of the U-Net: inputs "x" [B,H,W,C], "t" [B] and, conditional, "y" [B]."""
    c = config
    body: list[Node] = []
    projections: list[Node] = []

    def res_block(name, features, *maps):
        projection = f"{name}_temb_proj"
        projections.append(Node(projection, TimeProjection(features, parent=None), ("temb",)))
        module = ResBlock(features, c.groups, c.dropout, parent=None)
        body.append(Node(name, module, (*maps, projection)))
        return name

    def block(name, module, *reads):
        body.append(Node(name, module, reads))
        return name

    def attention(name, h):
        return block(name, AttnBlock(c.groups, parent=None), h)

    h = block("conv_in", ConvIn(c.channels, c.dtype, parent=None), "x")
    skips = [h]
    side = c.resolution
    levels = len(c.widths)
    for level, features in enumerate(c.widths):
        for i in range(c.res_blocks):
            h = res_block(f"down_{level}_block_{i}", features, h)
            if side in c.attention_resolutions:
                h = attention(f"down_{level}_attn_{i}", h)
            skips.append(h)
        if level != levels - 1:
            h = block(f"down_{level}_downsample", Downsample(parent=None), h)
            skips.append(h)
            side //= 2
    width = c.widths[-1]
    h = res_block("mid_block_1", width, h)
    h = attention("mid_attn_1", h)
    h = res_block("mid_block_2", width, h)
    for level in reversed(range(levels)):
        for i in range(c.res_blocks + 1):
            h = res_block(f"up_{level}_block_{i}", c.widths[level], h, skips.pop())
            if side in c.attention_resolutions:
                h = attention(f"up_{level}_attn_{i}", h)
        if level:
            h = block(f"up_{level}_upsample", Upsample(parent=None), h)
            side *= 2
    block("out", ConvOut(c.out_channels, c.groups, parent=None), h)

    reads = ("t",) if c.num_classes is None else ("t", "y")
    time = Node("temb", TimeEmbedding(c.channels, c.num_classes, c.dtype, parent=None), reads)
    program = (time, *projections, *body)
    validate(program, ("x", "t", "y"))
    return program


class UNetDDPM(nn.Module):
    """eps_prediction [B, H, W, out_channels] float32 from x [B, H, W, C], t [B], y [B] or None."""

    config: UNetConfig

    @nn.compact
    def __call__(self, x, t, y=None, train=False):
        c = self.config
        if c.num_classes is not None and y is None:
            raise ValueError(
                f"This U-Net is conditional on {c.num_classes} classes: pass y [B] int32, "
                f"with {c.num_classes} for the null class."
            )
        env = {"x": x, "t": t, "y": y}
        return run_program(self, unet_program(c), env, train=train)
