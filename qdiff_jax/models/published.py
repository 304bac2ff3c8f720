"""The published pipelines by name: network, schedule, first stage and text encoder of each.

Sources: the configs that come with the checkpoints (pytorch_diffusion, latent diffusion, Stable Diffusion
v1, guided diffusion, DiT, PixArt). `load_pipeline` reads their files.
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple

from qdiff_jax.models.autoencoder import AutoencoderConfig
from qdiff_jax.models.clip import SD_TEXT, TextConfig
from qdiff_jax.models.first_stage import FIRST_STAGES
from qdiff_jax.models.port.dit import PUBLISHED as DITS
from qdiff_jax.models.port.pixart import PUBLISHED as PIXARTS
from qdiff_jax.models.unet_ddpm import UNetConfig
from qdiff_jax.models.unet_ldm_published import PUBLISHED as UNETS

T5 = "t5"  # its sizes are read from the folder of its weights


class Published(NamedTuple):
    """network: config of a family. schedule: JSON, as `schedule_of` takes it. origin: where the file comes
    from, for messages. first_stage: of `models.first_stage`, None for a model in pixels; the file's own
    `scale_factor` goes before the one here. text: CLIP's sizes, `T5`, or None. null_caption: what its
    own code reads in the unconditional branch under the mask of each prompt, "learned" (a caption in the
    network's file) or "empty" (the empty prompt); "" for the null condition as a whole. scale_in_file: the
    first stage's factor is known from the file alone."""

    network: Any
    schedule: dict
    origin: str
    first_stage: AutoencoderConfig | None = None
    text: TextConfig | str | None = None
    null_caption: str = ""
    scale_in_file: bool = False


def _linear(name: str = "linear", **options) -> dict:
    return {"schedule": name, "timesteps": 1000, **({"options": options} if options else {})}


def _latent(name: str, origin: str, first_stage: str, last_beta: float = 0.0195) -> Published:
    schedule = _linear("scaled_linear", beta_start=0.0015, beta_end=last_beta)
    # Latents of a KL stage are scaled to unit variance, those of a VQ stage are left as they are.
    measured = first_stage.startswith("kl")
    return Published(
        UNETS[name], schedule, origin, FIRST_STAGES[first_stage], scale_in_file=measured
    )


_LDM = "ommer-lab.com/files/latent-diffusion"
_DDPM_256 = UNetConfig(multipliers=(1, 1, 2, 2, 4, 4), resolution=256, dropout=0.0)

PUBLISHED = types.MappingProxyType(
    {
        "ddpm_cifar10": Published(
            UNetConfig.cifar10(),
            _linear(),
            "ema_diffusion_cifar10_model/model-790000.ckpt of pytorch_diffusion, or "
            "hub:google/ddpm-cifar10-32",
        ),
        "ddpm_256": Published(
            _DDPM_256,
            _linear(),
            "ema_diffusion_lsun_bedroom_model/model-2388000.ckpt of pytorch_diffusion, or "
            "hub:google/ddpm-ema-celebahq-256",
        ),
        "lsun_beds256": _latent("lsun_beds256", f"{_LDM}/lsun_bedrooms.zip", "vq-f4"),
        "lsun_churches256": _latent(
            "lsun_churches256", f"{_LDM}/lsun_churches.zip", "kl-f8", 0.0155
        ),
        "celeba256": _latent("celeba256", f"{_LDM}/celeba.zip", "vq-f4"),
        "ffhq256": _latent("ffhq256", f"{_LDM}/ffhq.zip", "vq-f4"),
        "cin256-v2": _latent("cin256-v2", f"{_LDM}/nitro/cin/model.ckpt", "vq-f4"),
        "sd-v1-4": Published(
            UNETS["sd-v1-4"],
            _linear("scaled_linear"),
            "sd-v1-4.ckpt of CompVis/stable-diffusion-v-1-4-original, or "
            "hub:CompVis/stable-diffusion-v1-4",
            FIRST_STAGES["sd"],
            SD_TEXT,
        ),
        **{
            name: Published(
                config,
                _linear(),
                f"dl.fbaipublicfiles.com/DiT/models/{name}.pt",
                FIRST_STAGES["sd"],
            )
            for name, config in DITS.items()
        },
        **{
            name: Published(
                config,
                _linear(),
                f"{name}.pth of PixArt-alpha/PixArt-{'Sigma' if 'Sigma' in name else 'alpha'}",
                FIRST_STAGES["sdxl" if "Sigma" in name else "sd"],
                T5,
                null_caption="empty" if "Sigma" in name else "learned",
            )
            for name, config in PIXARTS.items()
        },
        **{
            name: Published(
                config,
                _linear("cosine" if name == "adm_imagenet64" else "linear"),
                "the releases of openai/guided-diffusion",
            )
            for name, config in UNETS.items()
            if name.startswith("adm_")
        },
    }
)
