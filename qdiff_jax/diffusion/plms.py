"""PLMS: the linear multistep solver that the latent diffusion code and Stable Diffusion sample with.

Source: Liu et al. 2022 (pseudo numerical methods), and the sampler of CompVis: the first step is an
improved Euler step, so that S timesteps cost S + 1 calls of the network,

    e' = (e(x_T, t_T) + e(x', t_{T-1})) / 2          with x' the provisional state
    e' = (3 e_j - e_{j+1}) / 2
    e' = (23 e_j - 16 e_{j+1} + 5 e_{j+2}) / 12
    e' = (55 e_j - 59 e_{j+1} + 37 e_{j+2} - 9 e_{j+3}) / 24      from the fourth step on,

and each e' drives one step of DDIM with eta 0. Guidance is applied to every e before they are
combined, since the sampler sees one estimate only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.diffusion.plans import (
    SPLITS,
    Sampler,
    SamplerPlan,
    Split,
    alpha_bars,
    eps_slope,
    plan_of,
    read_plain,
)
from qdiff_jax.diffusion.schedule import NoiseSchedule

# Weights of this call's estimate and the three before it, by the number of the call.
_WEIGHTS = np.array(
    [
        [1, 0, 0, 0],
        [1 / 2, 1 / 2, 0, 0],
        [3 / 2, -1 / 2, 0, 0],
        [23 / 12, -16 / 12, 5 / 12, 0],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    ]
)


def plms_rows(
    schedule: NoiseSchedule,
    timesteps: np.ndarray,
    *,
    final: str = "first",
    prediction: str = "eps",
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(timesteps of the calls, coefficients of `plms`), float64, [S + 1] each."""
    alpha_bar, prev = alpha_bars(schedule, timesteps, final, distinct="plms")
    slope = eps_slope(prediction, alpha_bar)
    steps = len(alpha_bar)
    if steps < 2:
        raise ValueError("plms needs at least 2 timesteps: its first step looks at the second.")
    # Ascending, so the last two rows are the first two calls: both step from the noisiest timestep to
    # the one before it, and the second is evaluated at the latter.
    seen = np.concatenate([np.arange(steps - 1), [steps - 2, steps - 1]])
    moved = np.concatenate([np.arange(steps), [steps - 1]])
    weights = _WEIGHTS[np.minimum(np.arange(steps + 1), len(_WEIGHTS) - 1)][::-1]
    signal, noise = np.sqrt(alpha_bar)[moved], np.sqrt(1 - alpha_bar)[moved]
    signal_prev, noise_prev = np.sqrt(prev)[moved], np.sqrt(1 - prev)[moved]
    redo = np.zeros(steps + 1)
    redo[-2] = 1.0
    rows = {
        "signal": signal,
        "noise": noise,
        "signal_prev": signal_prev,
        "noise_prev": noise_prev,
        "redo": redo,
        **{f"weight_{i}": weights[:, i] for i in range(4)},
        "sigma": np.zeros(steps + 1),
        "eps_coefficient": (noise_prev - signal_prev * noise / signal)
        * weights[:, 0]
        * slope[moved],
    }
    return np.asarray(timesteps, np.float64)[seen], rows


def _init(x: jax.Array) -> tuple:
    empty = jnp.zeros_like(x)
    return x, (empty, empty, empty)


def _plms_step(split: Split):
    def step(row, state, x, estimate, sigma, noise):
        before, past = state
        mixed = row["weight_0"] * estimate
        for i, old in enumerate(past, start=1):
            mixed = mixed + row[f"weight_{i}"] * old
        # The second call repeats the first step from x_T, and its estimate is used this once.
        redo = row["redo"] > 0
        x0, eps = split(row, jnp.where(redo, before, x), mixed)
        past = jax.tree.map(lambda new, old: jnp.where(redo, old, new), (estimate, *past[:2]), past)
        return (x, past), row["signal_prev"] * x0 + row["noise_prev"] * eps

    return step


_PLMS = {name: Sampler("plms", _init, read_plain, _plms_step(SPLITS[name])) for name in SPLITS}


def plms(
    schedule: NoiseSchedule,
    timesteps: np.ndarray,
    *,
    final: str = "first",
    prediction: str = "eps",
) -> SamplerPlan:
    """PLMS on a grid of S timesteps: a plan of S + 1 calls, the second-noisiest timestep visited twice.

    timesteps: ascending [S]; Stable Diffusion's 50 are "uniform" with offset 1. final: the published
    code ends at alpha_bar of training timestep 0. prediction: as `ddim`; what is combined is the
    network's own estimate, as in diffusers. An ODE solver: sigma_j is 0 and a step takes no
    fresh noise. c_j counts the estimate's part in its own step; later steps see it again through the
    memory.
    ValueError: as `samplers.ddim`, a grid that repeats a timestep, or fewer than two.
    """
    visited, rows = plms_rows(schedule, timesteps, final=final, prediction=prediction)
    return plan_of(_PLMS[prediction], visited, rows)
