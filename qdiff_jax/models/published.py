"""The published architectures of every family by name: sizes alone, without weights.

Sources of the sizes: with each family (`unet_ldm_published`, `port.dit`, `port.pixart`); of the DDPM U-Nets
Ho et al. 2020, appendix B, and, of CelebA at 64, the config that comes with DDIM's code (Song et al. 2021).
"""

from __future__ import annotations

import types

from qdiff_jax.models.port import dit, pixart
from qdiff_jax.models.unet_ddpm import UNetConfig
from qdiff_jax.models.unet_ldm_published import PUBLISHED as LATENT_AND_GUIDED

# Bedrooms, churches and cats of LSUN and CelebA-HQ, all at 256, have one size.
_DDPM256 = UNetConfig(multipliers=(1, 1, 2, 2, 4, 4), resolution=256, dropout=0.0)
DDPM = types.MappingProxyType(
    {
        "ddpm-cifar10-32": UNetConfig.cifar10(),
        "ddpm-celeba-64": UNetConfig(multipliers=(1, 2, 2, 2, 4), resolution=64),
        "ddpm-bedroom-256": _DDPM256,
        "ddpm-church-256": _DDPM256,
        "ddpm-cat-256": _DDPM256,
        "ddpm-celebahq-256": _DDPM256,
    }
)

PUBLISHED = types.MappingProxyType(
    {**DDPM, **LATENT_AND_GUIDED, **dit.PUBLISHED, **pixart.PUBLISHED}
)
