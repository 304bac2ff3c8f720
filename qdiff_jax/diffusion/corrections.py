"""Affine corrections of the noise estimate, step by step, as tables and as a sampler hook.

`eps' = scale_j eps + shift_j`, and what randomness is left in eps' is taken out of the sampler's own noise.
PTQD, a bias alone, a linear least-squares fit or a gain per channel are different fits of one table; the
hook is the same. A table is an ordinary step table (`quant.timed.TimeIndexed`, rule "step"): a step it was
not measured for is an error before a run and NaN inside one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qdiff_jax.diffusion.hooks import IDENTITY, Hooks, keep_input
from qdiff_jax.diffusion.samplers import SamplerPlan
from qdiff_jax.quant.timed import TimeIndexed, check_schedule, select
from qdiff_jax.runtime.finite import NotFiniteError


@struct.dataclass
class AffineCorrection:
    """scale, shift: [S, C] float32, per channel of the estimate. variance: [S] float32 >= 0, of the
    corrected estimate about the full-precision one; 0 leaves the sampler's noise alone."""

    scale: jax.Array
    shift: jax.Array
    variance: jax.Array


def affine_table(scale: Any, shift: Any, variance: Any, timesteps: Any) -> TimeIndexed:
    """The step table of a correction: scale, shift [S, C], variance [S], timesteps [S] by step index.

    Raises ValueError for shapes that disagree, values that are not finite, or a negative variance.
    """
    columns = {"scale": scale, "shift": shift, "variance": variance}
    columns = {name: np.asarray(values, np.float32) for name, values in columns.items()}
    steps = np.asarray(timesteps, np.float32)
    shapes = {name: values.shape for name, values in columns.items()}
    if (
        columns["scale"].ndim != 2
        or shapes["scale"] != shapes["shift"]
        or shapes["variance"] != steps.shape
        or shapes["scale"][:1] != steps.shape
    ):
        raise ValueError(
            f"a correction of {len(steps)} steps needs scale and shift [S, C] and variance [S]; got "
            f"{shapes}."
        )
    for name, values in columns.items():
        if not np.isfinite(values).all():
            bad = steps[np.argmin(np.isfinite(values.reshape(len(steps), -1)).all(axis=1))]
            raise NotFiniteError(
                f"the {name} of the correction at timestep {bad:g} is not finite: the quantized "
                "network diverged there; use more bits, or no correction."
            )
    if (columns["variance"] < 0).any():
        raise ValueError("the variance of a correction must not be negative.")
    table = AffineCorrection(**{name: jnp.asarray(values) for name, values in columns.items()})
    return TimeIndexed(table, jnp.asarray(steps), "step")


def absorbed_variance(plan: SamplerPlan, variance: Any) -> np.ndarray:
    """[S] float64: how much of the sampler's variance sigma_j^2 the residual takes over.

    min(c_j^2 v_j, sigma_j^2) with c_j the coefficient of the estimate in x_prev (`SamplerPlan`); all zero
    for a deterministic sampler, which has no noise to give up.
    """
    c, sigma = (np.asarray(plan.rows[name], np.float64) for name in ("eps_coefficient", "sigma"))
    return np.minimum(np.square(c) * np.asarray(variance, np.float64), np.square(sigma))


def correct(row: AffineCorrection, eps: jax.Array) -> jax.Array:
    """scale * eps + shift by channel; eps [..., C], row a selected row (scale, shift [C])."""
    shape = (1,) * (eps.ndim - 1) + row.scale.shape
    return row.scale.reshape(shape) * eps + row.shift.reshape(shape)


def reduced_sigma(sigma: jax.Array, coefficient: jax.Array, variance: jax.Array) -> jax.Array:
    """sqrt(max(sigma^2 - c^2 v, 0)), and sigma itself to the last bit where there is no variance."""
    taken = coefficient * coefficient * variance
    left = jnp.sqrt(jnp.maximum(sigma * sigma - taken, 0.0))
    return jnp.where(taken > 0.0, left, sigma)


def affine_after(state, ctx, x, eps, sigma, key, call_model):
    """The `after` of `affine_hooks`; state: {"table", "coefficient"} as step tables."""
    row = select(state, ctx)
    return (
        state,
        correct(row["table"], eps),
        reduced_sigma(sigma, row["coefficient"], row["table"].variance),
    )


def affine_hooks(table: TimeIndexed, plan: SamplerPlan) -> Hooks:
    """The hook that applies a correction while `plan` is sampled.

    The variance of the table lowers sigma_j, which the sampler then uses everywhere, DDIM's direction
    term included. What that does depends on the sampler:

    - DDPM, and DDIM with eta > 0: sigma'^2 = max(sigma^2 - c^2 v, 0). Under DDPM, whose mean does not depend
      on sigma, the variance added in a step is then the nominal one wherever c^2 v <= sigma^2. DDIM moves
      the removed part into its direction term, as the official code of PTQD does, so that a step adds
      somewhat less than nominal.
    - DDIM with eta 0, DPM-Solver++: sigma is 0 and stays 0. There is no noise to lower; scale and shift
      are applied and the variance is left in the image.

    Raises ValueError if the table lacks a step of the plan.
    """
    check_schedule({"correction": table}, plan.timesteps)
    coefficient = TimeIndexed(
        jnp.asarray(plan.rows["eps_coefficient"], jnp.float32),
        jnp.asarray(plan.timesteps, jnp.float32),
        "step",
    )
    state = {"table": table, "coefficient": coefficient}
    return Hooks(lambda x: state, keep_input, affine_after)


def hooks_of(correction: Any, plan: SamplerPlan) -> Hooks:
    """The hooks of what a bundle stores as its correction; `IDENTITY` for None.

    Raises ValueError for a kind of table that is unknown here, or steps it was not measured for.
    """
    if correction is None:
        return IDENTITY
    if isinstance(correction, TimeIndexed) and isinstance(correction.table, AffineCorrection):
        return affine_hooks(correction, plan)
    raise ValueError(
        f"a {type(correction).__name__} is no correction that this version can sample with; write "
        "the bundle with a table of diffusion.corrections."
    )
