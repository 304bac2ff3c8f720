"""How the published figures were sampled: schedule, sampler, guidance and rule to bytes of each, as data.

Sources: the sampling scripts of DDIM (Song et al. 2021), latent diffusion, Stable Diffusion, DiT and
PixArt, with the settings of the quantization papers that use them (Q-Diffusion, TFMQ-DM, PTQ4DiT,
ViDiT-Q). `methods.run.make_sampler(p.schedule, p.sampler)` makes the plan.
"""

from __future__ import annotations

import types
from typing import NamedTuple


class Protocol(NamedTuple):
    """schedule, sampler: JSON configs as `methods.run.make_sampler` takes them. calls: of the network for
    one batch, guided or not. guidance_scale: None for a model without conditions. guided_channels: leading
    channels that are guided, None for all of the noise estimate. uint8: of `data.images.to_uint8`."""

    schedule: dict
    sampler: dict
    calls: int
    guidance_scale: float | None
    guided_channels: int | None
    uint8: str


def _latent(
    steps, eta, last_beta, *, scale=None, uint8="trunc_127.5", spacing="uniform", calls=None
):
    """DDIM of the latent diffusion code: timesteps from 1, down to alpha_bar of timestep 0."""
    betas = {"beta_start": 0.0015, "beta_end": last_beta}
    schedule = {"schedule": "scaled_linear", "timesteps": 1000, "options": betas}
    options = {"eta": eta, "final": "first"}
    sampler = _sampler("ddim", spacing, steps, options, grid={"offset": 1})
    return Protocol(schedule, sampler, calls or steps, scale, None, uint8)


def _sampler(name, spacing, steps, options, **more):
    return {"name": name, "spacing": spacing, "steps": steps, "options": options, **more}


_LINEAR = {"schedule": "linear", "timesteps": 1000}


def _dit(steps):
    sampler = _sampler("ddpm", "spaced", steps, {"variance": "learned_range"})
    return Protocol(_LINEAR, sampler, steps, 1.5, 3, "dit")


PROTOCOLS = types.MappingProxyType(
    {
        # Repeats timesteps 0 (four times) and 2 (twice) and starts at 800: all 100 are network calls.
        "cifar10_ddim100_quad": Protocol(
            _LINEAR, _sampler("ddim", "quad", 100, {"eta": 0.0}), 100, None, None, "round"
        ),
        "lsun_bedrooms_200_eta1": _latent(200, 1.0, 0.0195),
        "lsun_churches_500_eta0": _latent(500, 0.0, 0.0155),
        # The same under the number that its command asks for.
        "lsun_churches_400_runs_500": _latent(400, 0.0, 0.0155, spacing="uniform_floor", calls=500),
        "celebahq_200_eta0": _latent(200, 0.0, 0.0195),
        "ffhq_200_eta1": _latent(200, 1.0, 0.0195),
        "imagenet_20_cfg3": _latent(20, 0.0, 0.0195, scale=3.0, uint8="trunc_255"),
        "sd14_plms50_cfg7p5": Protocol(
            {"schedule": "scaled_linear", "timesteps": 1000},
            _sampler("plms", "uniform", 50, {"final": "first"}, grid={"offset": 1}),
            51,
            7.5,
            None,
            "trunc_255",
        ),
        "dit_50_cfg1p5": _dit(50),
        "dit_100_cfg1p5": _dit(100),
        "dit_250_cfg1p5": _dit(250),
        # The released code's solver; diffusers' pipeline visits "solver_linspace" and ends at "one".
        "pixart_dpm20_cfg4p5": Protocol(
            _LINEAR,
            _sampler("dpmpp_2m", "solver_linspace_fractional", 20, {"final": "first"}),
            20,
            4.5,
            None,
            "round",
        ),
    }
)
