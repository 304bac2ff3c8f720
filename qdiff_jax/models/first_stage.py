"""First stages of latent diffusion: latents of images, and images of latents.

Source: Rombach et al. 2022, arXiv 2112.10752, section 3.1; Esser et al. 2021, arXiv 2012.09841, for the
codebook. A KL model has a Gaussian posterior; a VQ model's latent is quantized to the nearest entries of
a codebook **inside the decoder**, so that the diffusion model sees the continuous one. Diffusion models
see latents times `config.scale_factor`; these functions multiply and divide by it.

`params` are {"encoder", "decoder"} and, of a VQ model, "codebook"; decoding does not look at the encoder.
The published models and their files: `models.port.first_stage`.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from qdiff_jax.models.autoencoder import AutoencoderConfig, Decoder, Encoder

_F4 = {"multipliers": (1, 2, 4), "z_channels": 3, "embed_dim": 3}
_F8 = {"z_channels": 4, "embed_dim": 4}
_KL_F8 = AutoencoderConfig(**_F8, multipliers=(1, 2, 4, 4))
_VQ_F8 = {**_F8, "multipliers": (1, 2, 2, 4), "attention_resolutions": (32,)}

# By the names of the published zips. Of KL models the scale belongs to the diffusion model: LDM's own
# ones keep it in their file, Stable Diffusion and PixArt-sigma (the SDXL autoencoder) in their configs.
FIRST_STAGES = types.MappingProxyType(
    {
        "vq-f4": AutoencoderConfig(**_F4, codes=8192),
        "vq-f4-noattn": AutoencoderConfig(**_F4, codes=8192, mid_attention=False),
        "vq-f8": AutoencoderConfig(**_VQ_F8, codes=16384),
        "vq-f8-n256": AutoencoderConfig(**_VQ_F8, codes=256),
        "kl-f4": AutoencoderConfig(**_F4),
        "kl-f8": _KL_F8,
        "sd": dataclasses.replace(_KL_F8, scale_factor=0.18215),
        "sdxl": dataclasses.replace(_KL_F8, scale_factor=0.13025),
    }
)


def posterior(
    config: AutoencoderConfig, params: Mapping, images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean and log-variance, each [B, h, w, embed_dim], of a KL model, without the scale factor.

    images: [B, H, W, 3] in [-1, 1]. The log-variance is clipped to [-30, 20] as in the official code.

    Raises ValueError for a VQ model, or for images of another shape.
    """
    if config.codes is not None:
        raise ValueError("a VQ model has no posterior: use encode, which gives its latent.")
    moments = Encoder(config).apply({"params": params["encoder"]}, images)
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)


def encode(
    config: AutoencoderConfig, params: Mapping, images: jax.Array, key: jax.Array | None = None
) -> jax.Array:
    """The latent [B, h, w, embed_dim] float32 that a diffusion model is trained on, scale included.

    Args:
      images: [B, H, W, 3] in [-1, 1], sides divisible by `config.factor`.
      key: of a KL model, to draw from the posterior; None: its mean. A VQ model draws nothing.

    Raises ValueError for images of another shape, or for a key given to a VQ model.
    """
    if config.codes is not None:
        if key is not None:
            raise ValueError("a VQ model's latent is not random: encode it without a key.")
        return config.scale_factor * Encoder(config).apply({"params": params["encoder"]}, images)
    mean, logvar = posterior(config, params, images)
    if key is not None:
        mean = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    return config.scale_factor * mean


def nearest_codes(codebook: jax.Array, z: jax.Array) -> jax.Array:
    """argmin_k |z - e_k|^2, the first of equal ones: z [B, h, w, C], codebook [K, C] -> int32 [B, h, w].

    As |e|^2 - 2 z e; the official code adds |z|^2, which all k share, so that the two differ on ties by
    rounding only. One image at a time: a batch's distances to 16,384 codes are the largest array of all.
    """
    square = jnp.sum(jnp.square(codebook), axis=-1)

    def of_one(z):
        # Rounded factors (bfloat16, TF32) would choose other codes.
        product = jnp.einsum("hwc,kc->hwk", z, codebook, precision=lax.Precision.HIGHEST)
        return jnp.argmin(square[None, None, :] - 2 * product, axis=-1).astype(jnp.int32)

    return lax.map(of_one, z)


def quantize(codebook: jax.Array, z: jax.Array) -> jax.Array:
    """The codebook's entries nearest to z [B, h, w, C]."""
    return codebook[nearest_codes(codebook, z)]


def decode(
    config: AutoencoderConfig, params: Mapping, latents: jax.Array, requantize: bool = True
) -> jax.Array:
    """Images [B, f h, f w, 3] float32, about [-1, 1] and not clipped, of a diffusion model's latents.

    Args:
      latents: [B, h, w, embed_dim], scale included.
      requantize: of a VQ model, quantize to the codebook first, as LDM's sampling does.

    Raises ValueError for latents of another shape.
    """
    z = latents.astype(jnp.float32) / config.scale_factor
    if config.codes is not None and requantize:
        z = quantize(params["codebook"], z)
    return Decoder(config).apply({"params": params["decoder"]}, z)
