"""Sampling of flow-matching models: x_sigma = (1 - sigma) x_0 + sigma eps, velocity u = eps - x_0.

Source: Lipman et al. 2023; Esser et al. 2024 (SD3), sections 2 and 5.3.2 for the shift; the
FlowMatchEulerDiscreteScheduler of diffusers, whose way of placing sigmas is kept by name. There is no
alpha_bar: a plan is made from the sigmas alone. The network is given t = T sigma, which is fractional
and reaches T itself.
"""

from __future__ import annotations

import numpy as np

from qdiff_jax.diffusion.plans import Sampler, SamplerPlan, no_memory, plan_of, read_plain

_SPACINGS = ("scheduler", "trailing")


def shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """`shift sigma / (1 + (shift - 1) sigma)`: more steps where there is much noise, for large images.

    Source: Esser et al. 2024, equation 23. exp(mu) is the shift that FLUX calls mu.
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def dynamic_mu(
    tokens: int, *, base: tuple[int, float] = (256, 0.5), largest: tuple[int, float] = (4096, 1.15)
) -> float:
    """FLUX's mu for an image of so many tokens: the line through (tokens, mu) `base` and `largest`.

    It is not cut off outside the two. Raises ValueError for equal token counts.
    """
    if base[0] == largest[0]:
        raise ValueError(f"base and largest image both have {base[0]} tokens; mu has no slope.")
    slope = (largest[1] - base[1]) / (largest[0] - base[0])
    return base[1] + slope * (tokens - base[0])


def flow_sigmas(
    steps: int,
    *,
    shift: float = 1.0,
    mu: float | None = None,
    spacing: str = "scheduler",
    num_timesteps: int = 1000,
) -> np.ndarray:
    """The visited noise levels, ascending [S] float64 in (0, 1]; after the lowest comes 0.

    - "scheduler": from 1 evenly down to the lowest training level, then shifted; what diffusers does
      when it is asked for a number of steps (SD3). A fixed shift has by then moved the lowest level
      itself, so that this end is shifted **twice**.
    - "trailing": 1, 1 - 1/S, ..., 1/S, then shifted (FLUX).

    shift: fixed (SD3: 3). mu: dynamic shift exp(mu) instead (`dynamic_mu`); with it the lowest level
    is 1 / T. Raises ValueError for an unknown spacing, steps < 1, shift <= 0, or shift and mu both.
    """
    if spacing not in _SPACINGS:
        raise ValueError(f"unknown spacing '{spacing}' of sigmas; the names are {list(_SPACINGS)}.")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}.")
    if mu is not None and shift != 1.0:
        raise ValueError("give a fixed shift or a dynamic one by mu, not both.")
    if spacing == "trailing":
        sigmas = np.linspace(1.0, 1.0 / steps, steps)
    else:
        sigmas = np.linspace(1.0, shift_sigmas(1.0 / num_timesteps, shift), steps)
    return shift_sigmas(sigmas, shift if mu is None else np.exp(mu))[::-1]


def _step(row, state, x, velocity, sigma, noise):
    return state, x + row["along"] * velocity


_FLOW_EULER = Sampler("flow_euler", no_memory, read_plain, _step)


def flow_euler(sigmas: np.ndarray, *, num_timesteps: int = 1000) -> SamplerPlan:
    """Euler's method for networks that predict the velocity: x <- x + (sigma_prev - sigma) u.

    sigmas: ascending [S] in (0, 1], from `flow_sigmas`; x_T is a standard normal whatever the largest.
    The plan's rows "noise" = sigma and "signal" = 1 - sigma say what the state is made of. sigma_j, the
    fresh noise, is 0. ValueError for sigmas outside (0, 1] or not strictly ascending.
    """
    sigmas = np.asarray(sigmas, np.float64)
    if sigmas.ndim != 1 or not len(sigmas) or np.any(np.diff(sigmas) <= 0):
        raise ValueError("sigmas must be a non-empty vector in strictly ascending order.")
    if sigmas[0] <= 0 or sigmas[-1] > 1:
        raise ValueError(f"sigmas {sigmas[0]:g}..{sigmas[-1]:g} must lie above 0 and up to 1.")
    along = np.concatenate([[0.0], sigmas[:-1]]) - sigmas
    rows = {
        "signal": 1 - sigmas,
        "noise": sigmas,
        "along": along,
        "sigma": np.zeros(len(sigmas)),
        "eps_coefficient": along,
    }
    return plan_of(_FLOW_EULER, num_timesteps * sigmas, rows)
