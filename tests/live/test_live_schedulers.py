"""Every sampler against the live schedulers of diffusers, call by call, at other lengths than the stored."""

import pytest

from ..diffusion.test_schedulers import LINEAR, SCALED, follow, follow_with_noise, plan
from .references import need, quietly

_, diffusers = need("torch", "diffusers")
from qdiff_jax.diffusion.flow import flow_euler, flow_sigmas  # noqa: E402

from ..parity.make_schedulers import SD, run  # noqa: E402 - it imports torch


def ddim(**options):
    return diffusers.DDIMScheduler(clip_sample=False, **options)


_PNDM = dict(skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
# name: (plan, their scheduler, number of steps)
DETERMINISTIC = {
    "ddim": (lambda: plan("ddim", LINEAR, "uniform", 25), lambda: ddim(), 25),
    "ddim of latent diffusion": (
        lambda: plan("ddim", SCALED, "uniform", 20, offset=1, final="first"),
        lambda: ddim(**SD, set_alpha_to_one=False, steps_offset=1),
        20,
    ),
    "ddim of v": (
        lambda: plan("ddim", SCALED, "trailing", 8, prediction="v"),
        lambda: ddim(**SD, prediction_type="v_prediction", timestep_spacing="trailing"),
        8,
    ),
    "ddim by strides": (
        lambda: plan("ddim", LINEAR, "trailing", 7, stride=142),
        lambda: ddim(timestep_spacing="trailing"),
        7,
    ),
    "ddim by strides on linspace": (
        lambda: plan("ddim", LINEAR, "linspace", 10, stride=100),
        lambda: ddim(timestep_spacing="linspace"),
        10,
    ),
    "plms of v": (
        lambda: plan("plms", SCALED, "uniform", 25, offset=1, prediction="v"),
        lambda: diffusers.PNDMScheduler(**SD, **_PNDM, prediction_type="v_prediction"),
        25,
    ),
    "plms": (
        lambda: plan("plms", SCALED, "uniform", 20, offset=1),
        lambda: diffusers.PNDMScheduler(**SD, **_PNDM),
        20,
    ),
    "dpm-solver": (
        lambda: plan("dpmpp_2m", SCALED, "solver_linspace", 25),
        lambda: diffusers.DPMSolverMultistepScheduler(**SD),
        25,
    ),
    "dpm-solver of few steps": (
        lambda: plan("dpmpp_2m", LINEAR, "trailing", 6),
        lambda: diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing"),
        6,
    ),
    "euler": (
        lambda: plan("euler", SCALED, "linspace_fractional", 30),
        lambda: diffusers.EulerDiscreteScheduler(**SD),
        30,
    ),
    "flow": (
        lambda: flow_euler(flow_sigmas(28, shift=1.5)),
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=1.5),
        28,
    ),
}
STOCHASTIC = {
    "ddpm": (
        lambda: plan("ddpm", LINEAR, "uniform", 20, variance="fixed_small"),
        lambda: diffusers.DDPMScheduler(clip_sample=False, variance_type="fixed_small"),
        {},
    ),
    "ddpm clipped": (
        lambda: plan("ddpm", LINEAR, "uniform", 20, variance="fixed_large", clip_x0=1.0),
        lambda: diffusers.DDPMScheduler(variance_type="fixed_large"),
        {},
    ),
    "ddim at eta 1": (
        lambda: plan("ddim", LINEAR, "uniform", 20, eta=1.0),
        lambda: ddim(),
        {"eta": 1.0},
    ),
}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_deterministic_sampler(name):
    ours, theirs, steps = DETERMINISTIC[name]
    with quietly():
        reference = run(theirs(), steps)
    follow(ours(), reference)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_sampler(name):
    ours, theirs, options = STOCHASTIC[name]
    with quietly():
        reference = run(theirs(), 20, stochastic=True, **options)
    follow_with_noise(ours(), reference)
