"""Encoder and decoder of the first stages of latent diffusion: images to latents and back.

Source: Rombach et al. 2022, arXiv 2112.10752, appendix G, and the released checkpoints, whose topology is
that of the DDPM U-Net without skips and without time: residual blocks with GroupNorm (eps 1e-6) and SiLU,
one-head attention in the middle, asymmetric padding (0, 1) before stride-2 convolutions, nearest
upsampling. Parameter names follow the checkpoint, dots as underscores (`down.0.block.0.conv1` is
`down_0_block_0/conv1`); in the decoder, `up_0` is the highest resolution and runs last. The 1x1
convolutions on the latent (`quant_conv`, `post_quant_conv`) belong to the encoder and the decoder here.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from qdiff_jax.models.layers import conv
from qdiff_jax.models.unet_ddpm import AttnBlock, Downsample, Upsample, group_norm

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of a first stage. The published ones are in `models.first_stage`.

    Attributes:
      multipliers: channel multiplier per resolution, highest first; the last one is that of the latent.
      z_channels: of the encoder's features; embed_dim: of the latent, behind a 1x1 convolution.
      codes: size of the codebook (a VQ model), or None: a Gaussian posterior (a KL model).
      scale_factor: what latents are multiplied by for the diffusion model.
      attention_resolutions: side lengths, at images of `resolution`, with attention behind each residual
        block. The place is fixed by `resolution` and does not move with the images given.
      mid_attention: attention between the two middle blocks.
      dtype: "float32" or "bfloat16", the compute type; parameters are float32.
    """

    multipliers: tuple[int, ...]
    z_channels: int
    embed_dim: int
    codes: int | None = None
    scale_factor: float = 1.0
    channels: int = 128
    res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = ()
    mid_attention: bool = True
    resolution: int = 256
    in_channels: int = 3
    groups: int = 32
    dtype: str = "float32"

    def __post_init__(self):
        for multiplier in self.multipliers:
            if self.channels * multiplier % self.groups:
                raise ValueError(
                    f"groups={self.groups} must divide every width; "
                    f"{self.channels} * {multiplier} is not divisible by it."
                )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is none of {DTYPES}.")
        if not self.scale_factor > 0:
            raise ValueError(f"scale_factor={self.scale_factor} must be positive.")

    @property
    def factor(self) -> int:
        """Pixels per side of one latent position: the f in VQ-f4."""
        return 2 ** (len(self.multipliers) - 1)


class CoderBlock(nn.Module):
    """GN-SiLU-conv1-GN-SiLU-conv2, + (1x1) shortcut: x [B, H, W, C] -> [B, H, W, features]."""

    features: int
    groups: int

    @nn.compact
    def __call__(self, x):
        h = conv(self, "conv1", nn.silu(group_norm("norm1", self.groups, x)), self.features)
        h = conv(self, "conv2", nn.silu(group_norm("norm2", self.groups, h)), self.features)
        if x.shape[-1] != self.features:
            x = conv(self, "nin_shortcut", x, self.features, size=1)
        return x + h


def _middle(config: AutoencoderConfig, h: jax.Array) -> jax.Array:
    h = CoderBlock(h.shape[-1], config.groups, name="mid_block_1")(h)
    if config.mid_attention:
        h = AttnBlock(config.groups, name="mid_attn_1")(h)
    return CoderBlock(h.shape[-1], config.groups, name="mid_block_2")(h)


class Encoder(nn.Module):
    """Images [B, H, W, in_channels] in [-1, 1] -> moments [B, H/f, W/f, 2 embed_dim] (mean, then log of the
    variance) of a KL model, or the unquantized latent [B, H/f, W/f, embed_dim] of a VQ model; float32."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        if (
            x.ndim != 4
            or x.shape[-1] != c.in_channels
            or x.shape[1] % c.factor
            or x.shape[2] % c.factor
        ):
            raise ValueError(
                f"this encoder takes images [B, H, W, {c.in_channels}] with sides divisible by "
                f"{c.factor}, got {x.shape}."
            )
        h = conv(self, "conv_in", x.astype(c.dtype), c.channels)
        last = len(c.multipliers) - 1
        for level, multiplier in enumerate(c.multipliers):
            for i in range(c.res_blocks):
                block = CoderBlock(
                    c.channels * multiplier, c.groups, name=f"down_{level}_block_{i}"
                )
                h = block(h)
                if c.resolution >> level in c.attention_resolutions:
                    h = AttnBlock(c.groups, name=f"down_{level}_attn_{i}")(h)
            if level != last:
                h = Downsample(name=f"down_{level}_downsample")(h)
        h = nn.silu(group_norm("norm_out", c.groups, _middle(c, h)))
        moments = 2 if c.codes is None else 1
        h = conv(self, "conv_out", h, moments * c.z_channels)
        return conv(self, "quant_conv", h, moments * c.embed_dim, size=1).astype(jnp.float32)


class Decoder(nn.Module):
    """Latents [B, h, w, embed_dim] -> images [B, f h, f w, in_channels] float32, about [-1, 1], not clipped.

    Takes latents without their scale factor and, in a VQ model, after the quantization to the codebook.
    """

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, z):
        c = self.config
        if z.ndim != 4 or z.shape[-1] != c.embed_dim:
            raise ValueError(f"this decoder takes latents [B, h, w, {c.embed_dim}], got {z.shape}.")
        h = conv(self, "post_quant_conv", z.astype(c.dtype), c.z_channels, size=1)
        h = conv(self, "conv_in", h, c.channels * c.multipliers[-1])
        h = _middle(c, h)
        for level in reversed(range(len(c.multipliers))):
            width = c.channels * c.multipliers[level]
            for i in range(c.res_blocks + 1):
                h = CoderBlock(width, c.groups, name=f"up_{level}_block_{i}")(h)
                if c.resolution >> level in c.attention_resolutions:
                    h = AttnBlock(c.groups, name=f"up_{level}_attn_{i}")(h)
            if level:
                h = Upsample(name=f"up_{level}_upsample")(h)
        h = nn.silu(group_norm("norm_out", c.groups, h))
        return conv(self, "conv_out", h, c.in_channels).astype(jnp.float32)


@functools.cache
def autoencoder_shapes(config: AutoencoderConfig) -> dict:
    """The parameters' shapes, {"encoder", "decoder"} and, of a VQ model, "codebook" [codes, embed_dim]."""
    key, side = jax.random.key(0), config.factor
    image = jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32)
    z = jax.ShapeDtypeStruct((1, 1, 1, config.embed_dim), jnp.float32)
    shapes = {
        "encoder": jax.eval_shape(Encoder(config).init, key, image)["params"],
        "decoder": jax.eval_shape(Decoder(config).init, key, z)["params"],
    }
    if config.codes is not None:
        shapes["codebook"] = jax.ShapeDtypeStruct((config.codes, config.embed_dim), jnp.float32)
    return shapes
