"""Samplers as data: one row of coefficients per step, and a plain function that applies a row.

A sampler is a pair of pure functions; everything that depends on the schedule is computed once, in
float64, on the host and held in a `SamplerPlan` whose arrays are arguments of the compiled step. So
another schedule, eta or variance of equal length compiles nothing, and statistics that depend on
the schedule (how strongly the network's error enters the next state) are read off the plan.

Step index j is the position on the ascending grid of timesteps; `alpha_bar_prev(j)` is
`alpha_bar[timesteps[j - 1]]`, and what follows the last visited step (j = 0) is an option: "one"
(alpha_bar = 1, a clean image; DDIM, diffusers with `set_alpha_to_one`) or "first" (alpha_bar of
training timestep 0; the latent diffusion code).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qdiff_jax.diffusion.schedule import NoiseSchedule, alpha_bar_at


class Sampler(NamedTuple):
    """How one row of coefficients advances the state; functions only, hence hashable and static.

    init(x) -> state: the memory of a multistep solver, `()` for the others. x is x_T.
    read(row, output) -> (eps, sigma): what the network returned, as noise estimate and the standard
        deviation of this step's fresh noise (scalar, or of the shape of x when it is predicted).
    step(row, state, x, eps, sigma, noise) -> (state, x_prev). sigma is what `read` or a hook after
        it says, never taken from the row again; noise is a standard normal of the shape of x.
    """

    name: str
    init: Callable[[jax.Array], Any]
    read: Callable[[dict, jax.Array], tuple[jax.Array, jax.Array]]
    step: Callable[..., tuple[Any, jax.Array]]


@struct.dataclass
class SamplerPlan:
    """A sampler on a grid of S timesteps. Every array leads with S, in ascending order of timestep.

    timesteps: [S] float32, what the network is given. index: [S] int32, 0..S-1. rows: the sampler's
    coefficients, name -> [S] float32; always with "sigma", the nominal noise level sigma_j, and
    "eps_coefficient", c_j: by how much x_prev changes per unit of the noise estimate of this step
    (negative; zero between repeated timesteps). A residual error of variance v in the estimate adds
    c_j^2 v to the variance of x_prev.
    """

    timesteps: Any
    index: Any
    rows: dict[str, Any]
    sampler: Sampler = struct.field(pytree_node=False)

    @property
    def steps(self) -> int:
        return len(self.timesteps)


def _alpha_bars(
    schedule: NoiseSchedule, timesteps: np.ndarray, final: str, distinct: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(alpha_bar, alpha_bar_prev) on the grid, float64; distinct names who cannot repeat a step."""
    timesteps = np.asarray(timesteps, np.float64)
    if timesteps.ndim != 1 or not len(timesteps) or np.any(np.diff(timesteps) < 0):
        raise ValueError("timesteps must be a non-empty vector in ascending order.")
    if distinct and np.any(np.diff(timesteps) == 0):
        raise ValueError(
            f"{distinct} cannot visit a timestep twice, but this grid repeats one; take another "
            "spacing than 'quad' or fewer steps."
        )
    if final not in ("one", "first"):
        raise ValueError(f"final must be 'one' or 'first', got '{final}'.")
    alpha_bar = alpha_bar_at(schedule, timesteps)
    last = 1.0 if final == "one" else schedule.alpha_bar[0]
    return alpha_bar, np.concatenate([[last], alpha_bar[:-1]])


def _plan(sampler: Sampler, timesteps: np.ndarray, rows: dict[str, np.ndarray]) -> SamplerPlan:
    return SamplerPlan(
        timesteps=np.asarray(timesteps, np.float32),
        index=np.arange(len(timesteps), dtype=np.int32),
        rows={name: np.asarray(row, np.float32) for name, row in rows.items()},
        sampler=sampler,
    )


def _no_memory(x: jax.Array) -> tuple:
    return ()


def _read_plain(row: dict, output: jax.Array) -> tuple[jax.Array, jax.Array]:
    return output, row["sigma"]


def ddim_rows(
    schedule: NoiseSchedule, timesteps: np.ndarray, *, eta: float = 0.0, final: str = "one"
) -> dict[str, np.ndarray]:
    """The coefficients of `ddim` in float64, [S] each."""
    alpha_bar, prev = _alpha_bars(schedule, timesteps, final)
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
        "eps_coefficient": direction - np.sqrt(prev * (1 - alpha_bar) / alpha_bar),
    }


def _ddim_step(row, state, x, eps, sigma, noise):
    x0 = (x - row["noise"] * eps) / row["signal"]
    # A correction that lowers sigma must be seen by the direction term too, or the variance of
    # x_prev is wrong. The floor only meets rounding: sigma is at most sqrt(1 - alpha_bar_prev).
    direction = jnp.sqrt(jnp.maximum(row["variance_prev"] - sigma * sigma, 0.0))
    return state, row["signal_prev"] * x0 + direction * eps + sigma * noise


_DDIM = Sampler("ddim", _no_memory, _read_plain, _ddim_step)


def ddim(
    schedule: NoiseSchedule, timesteps: np.ndarray, *, eta: float = 0.0, final: str = "one"
) -> SamplerPlan:
    """DDIM (Song et al. 2021, equation 12) without clipping; eta 0 is deterministic, 1 ancestral.

    timesteps: ascending [S]; repeated ones leave the state in place but are real network calls.
    sigma_j^2 = eta^2 (1 - a_prev) / (1 - a) (1 - a / a_prev), and
    c_j = sqrt(1 - a_prev - sigma_j^2) - sqrt(a_prev (1 - a) / a).
    ValueError: a descending or empty grid, timesteps off the schedule, negative eta, unknown
    `final`.
    """
    return _plan(_DDIM, timesteps, ddim_rows(schedule, timesteps, eta=eta, final=final))


_VARIANCES = ("fixed_small", "fixed_large", "learned_range")


def ddpm_rows(
    schedule: NoiseSchedule,
    timesteps: np.ndarray,
    *,
    variance: str = "fixed_large",
    clip_x0: float | None = None,
) -> dict[str, np.ndarray]:
    """The coefficients of `ddpm` in float64, [S] each."""
    if variance not in _VARIANCES:
        raise ValueError(f"unknown variance '{variance}'; the names are {list(_VARIANCES)}.")
    if clip_x0 is not None and not clip_x0 > 0:
        raise ValueError(f"clip_x0 must be positive or None, got {clip_x0}.")
    learned = variance == "learned_range"
    distinct = "ddpm with a learned variance" if learned else None
    alpha_bar, prev = _alpha_bars(schedule, timesteps, "one", distinct)
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
        "eps_coefficient": -from_x0 * np.sqrt((1 - alpha_bar) / alpha_bar),
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


def _ddpm_step(row, state, x, eps, sigma, noise):
    x0 = (x - row["noise"] * eps) / row["signal"]
    x0 = jnp.minimum(jnp.maximum(x0, -row["clip"]), row["clip"])
    return state, row["from_x0"] * x0 + row["from_x"] * x + sigma * noise


_DDPM = Sampler("ddpm", _no_memory, _read_plain, _ddpm_step)
_DDPM_LEARNED = Sampler("ddpm_learned_range", _no_memory, _read_learned_range, _ddpm_step)


def ddpm(
    schedule: NoiseSchedule,
    timesteps: np.ndarray,
    *,
    variance: str = "fixed_large",
    clip_x0: float | None = None,
) -> SamplerPlan:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) on any grid, with betas respaced to it.

    variance: "fixed_large" (sigma^2 = beta), "fixed_small" (the posterior variance) or
    "learned_range" (the network returns [eps, v] on the channel axis and v interpolates the two in
    the logarithm; Nichol and Dhariwal 2021, equation 15). The last step adds no noise.
    clip_x0: bound on |x0|; None, the default, clips nothing.
    c_j = -beta / (sqrt(alpha) sqrt(1 - alpha_bar)), valid without clipping.
    ValueError: as `ddim`, an unknown variance, or a bound that is not positive.
    """
    rows = ddpm_rows(schedule, timesteps, variance=variance, clip_x0=clip_x0)
    return _plan(_DDPM_LEARNED if variance == "learned_range" else _DDPM, timesteps, rows)


def dpmpp_2m_rows(
    schedule: NoiseSchedule,
    timesteps: np.ndarray,
    *,
    final: str = "one",
    lower_order_final: bool = True,
) -> dict[str, np.ndarray]:
    """The coefficients of `dpmpp_2m` in float64, [S] each."""
    alpha_bar, prev = _alpha_bars(schedule, timesteps, final, distinct="dpmpp_2m")
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
    if noise_prev[0] == 0 or (lower_order_final and steps < 15):
        second[0] = 0.0
    from_x0 = signal_prev - noise_prev * signal / noise
    return {
        "signal": signal,
        "noise": noise,
        "keep": noise_prev / noise,
        "from_x0": from_x0,
        "second": second,
        "sigma": np.zeros(steps),
        "eps_coefficient": -from_x0 * (1 + second) * noise / signal,
    }


def _dpmpp_2m_step(row, state, x, eps, sigma, noise):
    x0 = (x - row["noise"] * eps) / row["signal"]
    slope = x0 - state
    return x0, row["keep"] * x + row["from_x0"] * (x0 + row["second"] * slope)


_DPMPP_2M = Sampler("dpmpp_2m", jnp.zeros_like, _read_plain, _dpmpp_2m_step)


def dpmpp_2m(
    schedule: NoiseSchedule,
    timesteps: np.ndarray,
    *,
    final: str = "one",
    lower_order_final: bool = True,
) -> SamplerPlan:
    """DPM-Solver++(2M), midpoint form, for noise-predicting networks (Lu et al. 2022, algorithm 2).

    An ODE solver: sigma_j is 0 and the step takes no fresh noise, whatever a hook makes of sigma.
    The first visited step is first-order, and the last too when it ends at alpha_bar = 1 or, with
    lower_order_final, when there are fewer than 15 steps (the rule of diffusers). c_j counts this
    step's estimate only; the memory carries it into the next step a second time. ValueError: as
    `ddim`, and a grid that repeats a timestep.
    """
    rows = dpmpp_2m_rows(schedule, timesteps, final=final, lower_order_final=lower_order_final)
    return _plan(_DPMPP_2M, timesteps, rows)


_SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "dpmpp_2m": dpmpp_2m}


def make_plan(
    name: str, schedule: NoiseSchedule, timesteps: np.ndarray, **options: Any
) -> SamplerPlan:
    """`ddim`, `ddpm` or `dpmpp_2m` by name; ValueError lists the names for another one."""
    if name not in _SAMPLERS:
        raise ValueError(f"unknown sampler '{name}'; the names are {sorted(_SAMPLERS)}.")
    return _SAMPLERS[name](schedule, timesteps, **options)
