"""Which training timesteps a sampler visits.

Every grid here is **ascending**, and the step index j of the whole package is the position on it:
`grid[0]` is the least noisy timestep, and a sampler visits j = S-1, ..., 0. Indexing the visiting
order instead (0 = noisiest) mirrors states and timesteps in time when the two are mixed.
"""

from __future__ import annotations

import math

import numpy as np


def _uniform(num_timesteps: int, steps: int) -> np.ndarray:
    return np.arange(0, num_timesteps, num_timesteps // steps)


def _quad(num_timesteps: int, steps: int) -> np.ndarray:
    return np.floor(np.linspace(0, math.sqrt(0.8 * num_timesteps), steps) ** 2)


def _leading(num_timesteps: int, steps: int) -> np.ndarray:
    return np.arange(steps) * (num_timesteps // steps)


def _trailing(num_timesteps: int, steps: int) -> np.ndarray:
    # The count is stated, not left to a floating-point range: a ratio such as 1000 / 7 could add
    # one.
    return np.round(num_timesteps - np.arange(steps) * (num_timesteps / steps))[::-1] - 1


def _linspace(num_timesteps: int, steps: int, last: float | None = None) -> np.ndarray:
    return np.round(np.linspace(0, num_timesteps - 1 if last is None else last, steps))


def _solver_leading(num_timesteps: int, steps: int) -> np.ndarray:
    return (np.arange(steps + 1) * (num_timesteps // (steps + 1)))[1:]


def _solver_linspace(num_timesteps: int, steps: int) -> np.ndarray:
    return np.round(np.linspace(0, num_timesteps - 1, steps + 1))[1:]


_SPACINGS = {
    "uniform": _uniform,
    "quad": _quad,
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "solver_leading": _solver_leading,
    "solver_linspace": _solver_linspace,
}


def make_timesteps(
    spacing: str, num_timesteps: int, steps: int, *, offset: int = 0, last: float | None = None
) -> np.ndarray:
    """The ascending grid of timesteps, float64 [S] holding integers in 0..num_timesteps-1.

    - "uniform": every (T // steps)-th timestep from 0. When T // steps does not divide evenly this
      is **longer** than `steps` (T = 1000, steps = 400 gives 500), as in the code of DDIM (Song et
      al. 2021) and, with offset 1, of the latent diffusion models.
    - "quad": squares of evenly spaced numbers up to 0.8 T, cut to integers (DDIM, appendix D.2).
      Repeated timesteps stay: each is a real call of the network, with a step index of its own.
    - "leading": exactly `steps` multiples of T // steps. "trailing": counted down from T-1 by
      T / steps. "linspace": evenly from 0 to `last` (default T-1) with both ends, rounded; with the
      default, the respaced grid of DiT too. These are the spacings of the diffusers schedulers.
    - "solver_leading", "solver_linspace": as the diffusers multistep solvers define them: a grid of
      steps + 1 nodes whose lowest is not visited.

    offset is added to every timestep. Raises ValueError for an unknown spacing, steps outside 1..T,
    `last` with another spacing, a solver grid with more nodes than
    timesteps, or a grid that leaves 0..T-1.
    """
    if spacing not in _SPACINGS:
        raise ValueError(f"unknown timestep spacing '{spacing}'; the names are {list(_SPACINGS)}.")
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps must lie in 1..{num_timesteps}, got {steps}.")
    if spacing.startswith("solver_") and steps == num_timesteps:
        raise ValueError(f"spacing '{spacing}' has steps + 1 nodes; steps must be below {steps}.")
    if last is not None and spacing != "linspace":
        raise ValueError(f"`last` belongs to the spacing 'linspace', not to '{spacing}'.")
    extra = {} if last is None else {"last": last}
    grid = np.asarray(_SPACINGS[spacing](num_timesteps, steps, **extra), np.float64) + offset
    if grid[0] < 0 or grid[-1] > num_timesteps - 1:
        raise ValueError(
            f"spacing '{spacing}' with steps={steps} and offset={offset} reaches timesteps "
            f"{grid[0]:g}..{grid[-1]:g}, outside 0..{num_timesteps - 1}; change the "
            "offset or steps."
        )
    return grid
