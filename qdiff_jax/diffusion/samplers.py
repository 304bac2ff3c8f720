"""The samplers of noise schedules: DDIM, DDPM and DPM-Solver++(2M), and every sampler by its name.

What a sampler and its plan are is said in `plans`. PLMS and Euler have files of their own, and so
have flow-matching models (`flow`), which know no alpha_bar.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax.numpy as jnp
import numpy as np

from qdiff_jax.diffusion.euler import euler
from qdiff_jax.diffusion.plans import (
    SPLITS,
    Sampler,
    SamplerPlan,
    Split,
    alpha_bars,
    eps_slope,
    no_memory,
    plan_of,
    read_plain,
)
from qdiff_jax.diffusion.plms import plms
from qdiff_jax.diffusion.schedule import NoiseSchedule


def ddim_rows(
    schedule: NoiseSchedule,
    timesteps: np.ndarray,
    *,
    eta: float = 0.0,
    final: str = "one",
    prediction: str = "eps",
    stride: int | None = None,
) -> dict[str, np.ndarray]:
    """The coefficients of `ddim` in float64, [S] each."""
    alpha_bar, prev = alpha_bars(schedule, timesteps, final, stride=stride)
    slope = eps_slope(prediction, alpha_bar)
    if eta < 0:
        raise ValueError(f"eta must not be negative, got {eta}.")
    variance = eta**2 * (1 - prev) / (1 - alpha_bar) * (1 - alpha_bar / prev)
    direction = np.sqrt(np.maximum(1 - prev - variance, 0.0))
    return {
        "signal": np.sqrt(alpha_bar),
        "noise": np.sqrt(1 - alpha_bar),
        "signal_prev": np.sqrt(prev),
        "variance_prev": 1 - prev,
        "sigma": np.sqrt(variance),
        "eps_coefficient": (direction - np.sqrt(prev * (1 - alpha_bar) / alpha_bar)) * slope,
    }


def _ddim_step(split: Split):
    def step(row, state, x, estimate, sigma, noise):
        x0, eps = split(row, x, estimate)
        # A correction that lowers sigma must be seen by the direction term too, or the variance of
        # x_prev is wrong. The floor only meets rounding: sigma is at most sqrt(1 - alpha_bar_prev).
        direction = jnp.sqrt(jnp.maximum(row["variance_prev"] - sigma * sigma, 0.0))
        return state, row["signal_prev"] * x0 + direction * eps + sigma * noise

    return step


# One object for each prediction, made once: it is part of what a step is compiled for.
_DDIM = {name: Sampler("ddim", no_memory, read_plain, _ddim_step(SPLITS[name])) for name in SPLITS}


def ddim(
    schedule: NoiseSchedule,
    timesteps: np.ndarray,
    *,
    eta: float = 0.0,
    final: str = "one",
    prediction: str = "eps",
    stride: int | None = None,
) -> SamplerPlan:
    """DDIM (Song et al. 2021, equation 12) without clipping; eta 0 is deterministic, 1 ancestral.

    timesteps: ascending [S]; repeated ones leave the state in place but are real network calls.
    sigma_j^2 = eta^2 (1 - a_prev) / (1 - a) (1 - a / a_prev), and
    c_j = sqrt(1 - a_prev - sigma_j^2) - sqrt(a_prev (1 - a) / a), for "v" times sqrt(a).
    prediction: what the network returns, "eps" or "v" (`plans.eps_slope`).
    stride: None, each step ends where the next begins. diffusers' DDIMScheduler instead always steps by
    T // S, which is another thing on "linspace", and on "trailing" where S does not divide T; `stride=T // S`
    is its trajectory.
    ValueError: a descending or empty grid, timesteps off the schedule, negative eta, a stride that is no
    positive integer, a grid that repeats a timestep with a stride, unknown `final` or prediction.
    """
    rows = ddim_rows(
        schedule, timesteps, eta=eta, final=final, prediction=prediction, stride=stride
    )
    return plan_of(_DDIM[prediction], timesteps, rows)


_VARIANCES = ("fixed_small", "fixed_large", "learned_range")
LEARNED_RANGE = "ddpm_learned_range"  # the name of the one sampler that reads a variance


def ddpm_rows(
    schedule: NoiseSchedule,
    timesteps: np.ndarray,
    *,
    variance: str = "fixed_large",
    clip_x0: float | None = None,
    prediction: str = "eps",
) -> dict[str, np.ndarray]:
    """The coefficients of `ddpm` in float64, [S] each."""
    if variance not in _VARIANCES:
        raise ValueError(f"unknown variance '{variance}'; the names are {list(_VARIANCES)}.")
    if clip_x0 is not None and not clip_x0 > 0:
        raise ValueError(f"clip_x0 must be positive or None, got {clip_x0}.")
    learned = variance == "learned_range"
    distinct = "ddpm with a learned variance" if learned else None
    alpha_bar, prev = alpha_bars(schedule, timesteps, "one", distinct)
    slope = eps_slope(prediction, alpha_bar)
    beta = 1 - alpha_bar / prev
    posterior = beta * (1 - prev) / (1 - alpha_bar)
    from_x0 = np.sqrt(prev) * beta / (1 - alpha_bar)
    fresh = np.arange(len(beta)) > 0  # the last step returns the posterior mean
    rows = {
        "signal": np.sqrt(alpha_bar),
        "noise": np.sqrt(1 - alpha_bar),
        "from_x0": from_x0,
        "from_x": np.sqrt(alpha_bar / prev) * (1 - prev) / (1 - alpha_bar),
        "clip": np.full(len(beta), np.inf if clip_x0 is None else clip_x0),
        "sigma": np.sqrt(np.where(fresh, posterior if variance == "fixed_small" else beta, 0.0)),
        "eps_coefficient": -from_x0 * np.sqrt((1 - alpha_bar) / alpha_bar) * slope,
    }
    if learned:
        # The posterior variance is 0 at j = 0, where the reference borrows its neighbour's.
        posterior[0] = posterior[1] if len(posterior) > 1 else beta[0]
        rows.update(log_small=np.log(posterior), log_large=np.log(beta), fresh=fresh)
    return rows


def _read_learned_range(row, output):
    eps, v = jnp.split(output, 2, axis=-1)
    weight = (v + 1) / 2
    log_variance = weight * row["log_large"] + (1 - weight) * row["log_small"]
    return eps, row["fresh"] * jnp.exp(log_variance / 2)


def _ddpm_step(split: Split):
    def step(row, state, x, estimate, sigma, noise):
        x0, _ = split(row, x, estimate)
        x0 = jnp.minimum(jnp.maximum(x0, -row["clip"]), row["clip"])
        return state, row["from_x0"] * x0 + row["from_x"] * x + sigma * noise

    return step


def _ddpm_sampler(prediction: str, learned: bool) -> Sampler:
    name, read = (LEARNED_RANGE, _read_learned_range) if learned else ("ddpm", read_plain)
    return Sampler(name, no_memory, read, _ddpm_step(SPLITS[prediction]))


_DDPM = {(p, learned): _ddpm_sampler(p, learned) for p in SPLITS for learned in (False, True)}


def ddpm(
    schedule: NoiseSchedule,
    timesteps: np.ndarray,
    *,
    variance: str = "fixed_large",
    clip_x0: float | None = None,
    prediction: str = "eps",
) -> SamplerPlan:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) on any grid, with betas respaced to it.

    variance: "fixed_large" (sigma^2 = beta), "fixed_small" (the posterior variance) or
    "learned_range" (the network returns [eps, v] on the channel axis and v interpolates the two in
    the logarithm; Nichol and Dhariwal 2021, equation 15). The last step adds no noise; diffusers'
    DDPMScheduler adds some with "fixed_large" where its last timestep is above 0 ("trailing").
    clip_x0: bound on |x0|; None, the default, clips nothing.
    prediction: as `ddim`; with a learned variance the first half of the channels.
    c_j = -beta / (sqrt(alpha) sqrt(1 - alpha_bar)), for "v" times sqrt(alpha_bar); valid without
    clipping.
    ValueError: as `ddim`, an unknown variance, or a bound that is not positive.
    """
    rows = ddpm_rows(schedule, timesteps, variance=variance, clip_x0=clip_x0, prediction=prediction)
    return plan_of(_DDPM[prediction, variance == "learned_range"], timesteps, rows)


def dpmpp_2m_rows(
    schedule: NoiseSchedule,
    timesteps: np.ndarray,
    *,
    final: str = "one",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    prediction: str = "eps",
) -> dict[str, np.ndarray]:
    """The coefficients of `dpmpp_2m` in float64, [S] each."""
    alpha_bar, prev = alpha_bars(schedule, timesteps, final, distinct="dpmpp_2m")
    slope = eps_slope(prediction, alpha_bar)
    if prev[0] <= alpha_bar[0]:
        raise ValueError(
            "dpmpp_2m cannot end at alpha_bar of timestep 0 on a grid that starts there."
        )
    signal, noise = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    signal_prev, noise_prev = np.sqrt(prev), np.sqrt(1 - prev)
    steps = len(alpha_bar)
    log_snr = np.log(signal / noise)
    # Position j + 1 was visited just before j; weight 0 makes a step first-order.
    second = np.zeros(steps)
    if steps > 1:
        with np.errstate(divide="ignore"):  # the step onto a clean image is infinitely long
            ahead = np.log(signal_prev[:-1]) - np.log(noise_prev[:-1]) - log_snr[:-1]
        second[:-1] = ahead / (log_snr[:-1] - log_snr[1:]) / 2
    if noise_prev[0] == 0 or euler_at_final or (lower_order_final and steps < 15):
        second[0] = 0.0
    from_x0 = signal_prev - noise_prev * signal / noise
    return {
        "signal": signal,
        "noise": noise,
        "keep": noise_prev / noise,
        "from_x0": from_x0,
        "second": second,
        "sigma": np.zeros(steps),
        "eps_coefficient": -from_x0 * (1 + second) * noise / signal * slope,
    }


def _dpmpp_2m_step(split: Split):
    def step(row, state, x, estimate, sigma, noise):
        x0, _ = split(row, x, estimate)
        slope = x0 - state
        return x0, row["keep"] * x + row["from_x0"] * (x0 + row["second"] * slope)

    return step


_DPMPP_2M = {
    name: Sampler("dpmpp_2m", jnp.zeros_like, read_plain, _dpmpp_2m_step(SPLITS[name]))
    for name in SPLITS
}


def dpmpp_2m(
    schedule: NoiseSchedule,
    timesteps: np.ndarray,
    *,
    final: str = "one",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    prediction: str = "eps",
) -> SamplerPlan:
    """DPM-Solver++(2M), midpoint form (Lu et al. 2022, algorithm 2).

    An ODE solver: sigma_j is 0 and the step takes no fresh noise, whatever a hook makes of sigma.
    The first visited step is first-order, and the last too when it ends at alpha_bar = 1 or, with
    lower_order_final, when there are fewer than 15 steps (the rule of diffusers), or always with
    euler_at_final. c_j counts this step's estimate only; the memory carries it into the next step a
    second time. prediction: as `ddim`.

    The grid tells the published codes apart. diffusers visits integers ("solver_linspace", "trailing",
    or "solver_leading" with offset 1 as Stable Diffusion configures it) and ends on a clean image, or
    with `final_sigmas_type="sigma_min"` on final="first". The DPMSolverSampler of CompVis, and PixArt's
    sampler after it, visit the fractional "solver_linspace_fractional" and end at final="first".

    ValueError: as `ddim`, and a grid that repeats a timestep.
    """
    rows = dpmpp_2m_rows(
        schedule,
        timesteps,
        final=final,
        lower_order_final=lower_order_final,
        euler_at_final=euler_at_final,
        prediction=prediction,
    )
    return plan_of(_DPMPP_2M[prediction], timesteps, rows)


_SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "dpmpp_2m": dpmpp_2m, "euler": euler, "plms": plms}


def make_plan(
    name: str, schedule: NoiseSchedule, timesteps: np.ndarray, **options: Any
) -> SamplerPlan:
    """A sampler by name: "ddim", "ddpm", "dpmpp_2m", "euler" or "plms", with its own options.

    Raises ValueError for an unknown name or option, listing those there are, and as the sampler does.
    """
    if name not in _SAMPLERS:
        raise ValueError(f"unknown sampler '{name}'; the names are {sorted(_SAMPLERS)}.")
    known = list(inspect.signature(_SAMPLERS[name]).parameters)[2:]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"sampler '{name}' has no option {unknown}; its options are {known}.")
    return _SAMPLERS[name](schedule, timesteps, **options)
