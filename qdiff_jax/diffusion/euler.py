"""Euler's method in the noise level of k-diffusion, sigma = sqrt((1 - alpha_bar) / alpha_bar).

Source: Karras et al. 2022, algorithm 2 without churn, as the Euler samplers of k-diffusion and
diffusers run it for networks with a discrete schedule:

    x^ <- x^ + (sigma_prev - sigma) eps        with x^ = x / sqrt(alpha_bar).

Here the state is x itself, what the network is given, so the step is that of DDIM with eta 0. What
sets Euler apart is where it looks: fractional timesteps, sigma interpolated between the training
steps, and a start with the variance of the noise alone.
"""

from __future__ import annotations

import numpy as np

from qdiff_jax.diffusion.plans import (
    SPLITS,
    Sampler,
    SamplerPlan,
    Split,
    check_grid,
    eps_slope,
    no_memory,
    plan_of,
    read_plain,
)
from qdiff_jax.diffusion.schedule import NoiseSchedule

_INTERPOLATIONS = ("sigma", "log_sigma")
_STARTS = ("noise", "unit")


def sigma_at(schedule: NoiseSchedule, timesteps: np.ndarray, interpolation: str) -> np.ndarray:
    """sigma at (fractional) timesteps in 0..T-1, float64, linear in sigma or in its logarithm."""
    sigmas = np.sqrt((1 - schedule.alpha_bar) / schedule.alpha_bar)
    every = np.arange(schedule.num_timesteps)
    if interpolation == "sigma":
        return np.interp(timesteps, every, sigmas)
    return np.exp(np.interp(timesteps, every, np.log(sigmas)))


def euler_rows(
    schedule: NoiseSchedule,
    timesteps: np.ndarray,
    *,
    final: str = "one",
    interpolation: str = "sigma",
    prediction: str = "eps",
) -> dict[str, np.ndarray]:
    """The coefficients of `euler` in float64, [S] each."""
    if interpolation not in _INTERPOLATIONS:
        raise ValueError(
            f"unknown interpolation '{interpolation}'; the names are {list(_INTERPOLATIONS)}."
        )
    timesteps = check_grid(timesteps, final)
    last = schedule.num_timesteps - 1
    if timesteps[0] < 0 or timesteps[-1] > last:
        raise ValueError(
            f"timesteps {timesteps[0]:g}..{timesteps[-1]:g} leave the range 0..{last} of the noise "
            "schedule; change the offset or steps."
        )
    sigma = sigma_at(schedule, timesteps, interpolation)
    end = 0.0 if final == "one" else sigma_at(schedule, np.zeros(1), interpolation)[0]
    sigma_prev = np.concatenate([[end], sigma[:-1]])
    signal, signal_prev = 1 / np.sqrt(1 + sigma**2), 1 / np.sqrt(1 + sigma_prev**2)
    along = signal_prev * (sigma_prev - sigma)
    return {
        "signal": signal,
        "noise": sigma * signal,
        "keep": signal_prev / signal,
        "along": along,
        "sigma": np.zeros(len(sigma)),
        "eps_coefficient": along * eps_slope(prediction, signal**2),
    }


def _euler_step(split: Split):
    def step(row, state, x, estimate, sigma, noise):
        _, eps = split(row, x, estimate)
        return state, row["keep"] * x + row["along"] * eps

    return step


_EULER = {
    name: Sampler("euler", no_memory, read_plain, _euler_step(SPLITS[name])) for name in SPLITS
}


def euler(
    schedule: NoiseSchedule,
    timesteps: np.ndarray,
    *,
    final: str = "one",
    interpolation: str = "sigma",
    start: str = "noise",
    prediction: str = "eps",
) -> SamplerPlan:
    """Euler steps in sigma, deterministic, for networks that predict "eps" or "v".

    timesteps: ascending [S], fractional ones included: diffusers and k-diffusion both visit
    "linspace_fractional"; diffusers also "leading" (offset 1 for Stable Diffusion) and "trailing".
    interpolation: between training steps, "sigma" as diffusers or "log_sigma" as k-diffusion.
    start: x_T is sigma_max times a standard normal in k-diffusion's units. "noise" gives it just
    that, a standard deviation sqrt(1 - alpha_bar) here (k-diffusion; diffusers with linspace and
    trailing grids); "unit" 1, as diffusers does on leading grids.
    final: "one" ends on a clean image, "first" at training timestep 0; the result is then x, not
    diffusers' x / sqrt(alpha_bar).
    c_j = sqrt(alpha_bar_prev) (sigma_prev - sigma), for "v" times sqrt(alpha_bar).
    ValueError: as `samplers.ddim`, or an unknown interpolation or start.
    """
    if start not in _STARTS:
        raise ValueError(f"unknown start '{start}'; the names are {list(_STARTS)}.")
    rows = euler_rows(
        schedule, timesteps, final=final, interpolation=interpolation, prediction=prediction
    )
    scale = rows["noise"][-1] if start == "noise" else 1.0
    return plan_of(_EULER[prediction], timesteps, rows, scale)
