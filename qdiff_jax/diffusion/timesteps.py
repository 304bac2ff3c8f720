"""Which training timesteps a sampler visits.

Every grid here is **ascending**, and the step index j of the whole package is the position on it:
`grid[0]` is the least noisy timestep, and a sampler visits j = S-1, ..., 0. Indexing the visiting
order instead (0 = noisiest) mirrors states and timesteps in time when the two are mixed.
"""

from __future__ import annotations

import math

import numpy as np


def _uniform_floor(num_timesteps: int, steps: int) -> np.ndarray:
    return np.arange(0, num_timesteps, num_timesteps // steps)


def _uniform(num_timesteps: int, steps: int) -> np.ndarray:
    grid = _uniform_floor(num_timesteps, steps)
    if len(grid) != steps:
        raise ValueError(
            f"spacing 'uniform' with steps={steps} would visit {len(grid)} timesteps, every "
            f"{num_timesteps // steps} of {num_timesteps}; ask for {len(grid)}, or name the spacing "
            f"'uniform_floor' to run {len(grid)} steps under the published name of {steps}."
        )
    return grid


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


def _spaced(num_timesteps: int, steps: int) -> np.ndarray:
    # The strides are summed one by one as in the official code: where i (T-1) / (S-1) is a half, the
    # rounding of the sum decides.
    stride = (num_timesteps - 1) / (steps - 1) if steps > 1 else 1.0
    grid, place = [], 0.0
    for _ in range(steps):
        grid.append(round(place))
        place += stride
    return np.array(grid)


def _linspace_fractional(num_timesteps: int, steps: int) -> np.ndarray:
    return np.linspace(0, num_timesteps - 1, steps)


def _solver_leading(num_timesteps: int, steps: int) -> np.ndarray:
    return (np.arange(steps + 1) * (num_timesteps // (steps + 1)))[1:]


def _solver_linspace_fractional(num_timesteps: int, steps: int) -> np.ndarray:
    return np.linspace(0, num_timesteps - 1, steps + 1)[1:]


def _solver_linspace(num_timesteps: int, steps: int) -> np.ndarray:
    return np.round(_solver_linspace_fractional(num_timesteps, steps))


_SPACINGS = {
    "uniform": _uniform,
    "uniform_floor": _uniform_floor,
    "quad": _quad,
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "linspace_fractional": _linspace_fractional,
    "spaced": _spaced,
    "solver_leading": _solver_leading,
    "solver_linspace": _solver_linspace,
    "solver_linspace_fractional": _solver_linspace_fractional,
}


def make_timesteps(
    spacing: str, num_timesteps: int, steps: int, *, offset: int = 0, last: float | None = None
) -> np.ndarray:
    """The ascending grid of timesteps, float64 [S] in 0..num_timesteps-1.

    They are integers but for the spacings that say "fractional".

    - "uniform": every (T // steps)-th timestep from 0, as in the code of DDIM (Song et al. 2021) and,
      with offset 1, of the latent diffusion models. A number of steps that this rule would not keep is
      refused. "uniform_floor": the same rule as those codes run it, **longer** than `steps` when it
      does not divide evenly: T = 1000, steps = 400 visits 500 (the published "400" of LSUN-Churches).
    - "quad": squares of evenly spaced numbers up to 0.8 T, cut to integers (DDIM, appendix D.2).
      Repeated timesteps stay: each is a real call of the network, with a step index of its own. The
      published 100 steps on CIFAR-10 visit 0 four times and 2 twice.
    - "leading": exactly `steps` multiples of T // steps. "trailing": counted down from T-1 by
      T / steps. "linspace": evenly from 0 to `last` (default T-1) with both ends, rounded. These are
      the spacings of the diffusers schedulers.
    - "spaced": the respaced grid of ADM and DiT (`create_diffusion("50")`): "linspace", but the strides
      are summed in floating point, which rounds a half another way (for even S they agree at T = 1000).
    - "linspace_fractional": evenly from 0 to T-1 and not rounded (Euler in diffusers and k-diffusion).
    - "solver_leading", "solver_linspace": as the diffusers multistep solvers define them: a grid of
      steps + 1 nodes whose lowest is not visited. "solver_linspace_fractional": the latter not
      rounded, which is the time-uniform grid of CompVis' DPMSolverSampler.

    offset is added to every timestep. Raises ValueError for an unknown spacing, steps outside 1..T,
    `last` with another spacing, a solver grid with more nodes than
    timesteps, a "uniform" grid of another length, or a grid that leaves 0..T-1.
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
