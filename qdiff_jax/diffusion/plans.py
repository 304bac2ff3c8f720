"""What a sampler is: rows of coefficients, and pure functions that apply a row.

A sampler is a pair of pure functions; everything that depends on the schedule is computed once, in
float64, on the host and held in a `SamplerPlan` whose arrays are arguments of the compiled step. So
another schedule, eta or variance of equal length compiles nothing, and statistics that depend on
the schedule (how strongly the network's error enters the next state) are read off the plan.

Step index j is the position on the ascending grid of timesteps; `alpha_bar_prev(j)` is
`alpha_bar[timesteps[j - 1]]`, and what follows the last visited step (j = 0) is an option: "one"
(alpha_bar = 1, a clean image; DDIM, diffusers with `set_alpha_to_one`) or "first" (alpha_bar of
training timestep 0; the latent diffusion code). A `stride` (`alpha_bars`) makes it
alpha_bar[timesteps[j] - stride] instead.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct

from qdiff_jax.diffusion.schedule import NoiseSchedule, alpha_bar_at

ONE = np.float32(1.0)


class Sampler(NamedTuple):
    """How one row of coefficients advances the state; functions only, hence hashable and static.

    init(x) -> state: the memory of a multistep solver, `()` for the others. x is x_T.
    read(row, output) -> (eps, sigma): what the network returned, as its estimate and the standard
        deviation of this step's fresh noise (scalar, or of the shape of x when it is predicted).
    step(row, state, x, eps, sigma, noise) -> (state, x_prev). sigma is what `read` or a hook after
        it says, never taken from the row again; noise is a standard normal of the shape of x.

    The estimate is what the network was trained to predict: the noise, unless the plan was made with
    another `prediction`. `step` alone knows which, so that hooks and recorded outputs speak of the
    network's own output and nothing is divided by a vanishing noise level.
    """

    name: str
    init: Callable[[jax.Array], Any]
    read: Callable[[dict, jax.Array], tuple[jax.Array, jax.Array]]
    step: Callable[..., tuple[Any, jax.Array]]


@struct.dataclass
class SamplerPlan:
    """A sampler with S calls of the network. Every array but the last leads with S, in ascending
    order of timestep.

    timesteps: [S] float32, what the network is given. index: [S] int32, 0..S-1. rows: the sampler's
    coefficients, name -> [S] float32; always with "sigma", the nominal noise level sigma_j, and
    "eps_coefficient", c_j: by how much x_prev changes per unit of the network's estimate of this step
    (negative; zero between repeated timesteps). A residual error of variance v in the estimate adds
    c_j^2 v to the variance of x_prev. start_scale: scalar, the standard deviation of x_T.
    """

    timesteps: Any
    index: Any
    rows: dict[str, Any]
    sampler: Sampler = struct.field(pytree_node=False)
    start_scale: Any = ONE

    @property
    def steps(self) -> int:
        return len(self.timesteps)


def plan_of(
    sampler: Sampler,
    timesteps: np.ndarray,
    rows: dict[str, np.ndarray],
    start_scale: float = 1.0,
) -> SamplerPlan:
    """The plan of float64 rows, each rounded to float32 once."""
    return SamplerPlan(
        timesteps=np.asarray(timesteps, np.float32),
        index=np.arange(len(timesteps), dtype=np.int32),
        rows={name: np.asarray(row, np.float32) for name, row in rows.items()},
        sampler=sampler,
        start_scale=np.float32(start_scale),
    )


def alpha_bars(
    schedule: NoiseSchedule,
    timesteps: np.ndarray,
    final: str,
    distinct: str | None = None,
    stride: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(alpha_bar, alpha_bar_prev) on the grid, float64; distinct names who cannot repeat a step.

    stride: alpha_bar_prev is that of timesteps[j] - stride, or `final`'s below 0, whatever the grid's next
    timestep is; such a grid cannot repeat a step. Raises ValueError for a stride that is no positive integer,
    and as `check_grid`.
    """
    if stride is not None and (stride < 1 or stride != int(stride)):
        raise ValueError(
            f"stride must be a positive integer, or None for the grid's own, got {stride}."
        )
    timesteps = check_grid(timesteps, final, distinct if stride is None else "a sampler by strides")
    alpha_bar = alpha_bar_at(schedule, timesteps)
    last = 1.0 if final == "one" else schedule.alpha_bar[0]
    if stride is None:
        return alpha_bar, np.concatenate([[last], alpha_bar[:-1]])
    before = timesteps - stride
    return alpha_bar, np.where(before < 0, last, alpha_bar_at(schedule, np.maximum(before, 0)))


def check_grid(timesteps: np.ndarray, final: str, distinct: str | None = None) -> np.ndarray:
    """The grid in float64; ValueError unless it ascends and `final` is known, as in `alpha_bars`."""
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
    return timesteps


def no_memory(x: jax.Array) -> tuple:
    return ()


def read_plain(row: dict, output: jax.Array) -> tuple[jax.Array, jax.Array]:
    return output, row["sigma"]


# (x0, eps) that x and the network's estimate imply; rows hold signal = sqrt(alpha_bar) and
# noise = sqrt(1 - alpha_bar).
Split = Callable[[dict, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def _from_eps(row, x, eps):
    return (x - row["noise"] * eps) / row["signal"], eps


def _from_v(row, x, v):
    return row["signal"] * x - row["noise"] * v, row["signal"] * v + row["noise"] * x


SPLITS: Mapping[str, Split] = types.MappingProxyType({"eps": _from_eps, "v": _from_v})


def eps_slope(prediction: str, alpha_bar: np.ndarray) -> np.ndarray:
    """d eps / d estimate at fixed x, [S] float64; ValueError for an unknown prediction.

    "eps": the network predicts the noise. "v": it predicts v = sqrt(alpha_bar) eps -
    sqrt(1 - alpha_bar) x0 (Salimans and Ho 2022, appendix D), so that eps = sqrt(alpha_bar) v +
    sqrt(1 - alpha_bar) x.
    """
    if prediction not in SPLITS:
        raise ValueError(f"unknown prediction '{prediction}'; the names are {list(SPLITS)}.")
    return np.ones(len(alpha_bar)) if prediction == "eps" else np.sqrt(alpha_bar)
