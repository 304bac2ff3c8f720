"""The published sizes of the U-Nets of latent diffusion, Stable Diffusion 1 and guided diffusion.

Sources: the configs that come with the checkpoints of Rombach et al. 2022 and Stable Diffusion v1; the
model flags in guided-diffusion's README (Dhariwal and Nichol 2021).
"""

from __future__ import annotations

import types

from qdiff_jax.models.unet_ldm import UNetLDMConfig

# LDM-4 without condition: CelebA-HQ, FFHQ and LSUN bedrooms at 256 have one size.
_LDM4 = UNetLDMConfig()


def _guided(resolution: int, classes: int | None, **sizes) -> UNetLDMConfig:
    """Guided diffusion in pixels; attention at sides 32, 16 and 8."""
    return UNetLDMConfig(
        **{
            "channels": 256,
            "resolution": resolution,
            "attention_downsampling": tuple(resolution // side for side in (32, 16, 8)),
            "out_channels": 6,
            "head_channels": 64,
            "scale_shift_norm": True,
            "resblock_updown": True,
            "num_classes": classes,
            **sizes,
        }
    )


PUBLISHED = types.MappingProxyType(
    {
        "lsun_beds256": _LDM4,
        "celeba256": _LDM4,
        "ffhq256": _LDM4,
        "lsun_churches256": UNetLDMConfig(
            channels=192,
            multipliers=(1, 2, 2, 4, 4),
            attention_downsampling=(1, 2, 4, 8),
            resolution=32,
            in_channels=4,
            out_channels=4,
            heads=8,
            head_channels=None,
            scale_shift_norm=True,
            resblock_updown=True,
        ),
        "cin256-v2": UNetLDMConfig(
            channels=192,
            multipliers=(1, 2, 3, 5),
            heads=1,
            head_channels=None,
            num_classes=1000,
            context_dim=512,
            context_length=1,
        ),
        "sd-v1-4": UNetLDMConfig(
            channels=320,
            multipliers=(1, 2, 4, 4),
            attention_downsampling=(4, 2, 1),
            in_channels=4,
            out_channels=4,
            heads=8,
            head_channels=None,
            context_dim=768,
        ),
        "adm_imagenet64": _guided(
            64,
            1000,
            channels=192,
            multipliers=(1, 2, 3, 4),
            res_blocks=3,
            new_attention_order=True,
            dropout=0.1,
        ),
        "adm_imagenet128": _guided(
            128, 1000, multipliers=(1, 1, 2, 3, 4), heads=4, head_channels=None
        ),
        "adm_imagenet256": _guided(256, 1000, multipliers=(1, 1, 2, 2, 4, 4)),
        "adm_imagenet256_uncond": _guided(256, None, multipliers=(1, 1, 2, 2, 4, 4)),
        "adm_imagenet512": _guided(512, 1000, multipliers=(0.5, 1, 1, 2, 2, 4, 4)),
        "adm_lsun256": _guided(256, None, multipliers=(1, 1, 2, 2, 4, 4), dropout=0.1),
    }
)
