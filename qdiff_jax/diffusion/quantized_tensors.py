"""A sampler whose own tensors are quantized: posterior mean, noise level and the state it hands on.

PTQ4DM (Shang et al. 2023, section 4.1) quantizes, beside the network, mu, Sigma and x_{t-1}, so that a
device never holds a floating-point image between steps; at 8 bits it loses nearly nothing. Each of the
three has one range for all steps, taken from full-precision trajectories.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.diffusion.guidance import Guidance, combine
from qdiff_jax.diffusion.samplers import Sampler, SamplerPlan
from qdiff_jax.quant.qparams import QParams, from_range
from qdiff_jax.quant.quantizer import fake_quant
from qdiff_jax.quant.spec import QuantSpec, code_range

TENSORS = ("mean", "sigma", "state")
_SPEC = QuantSpec()
_LEAVES = ("scale", "zero_point", "qmin", "qmax")


def quantize_tensors(plan: SamplerPlan, bits: int, ranges: Mapping[str, Any]) -> SamplerPlan:
    """The plan whose sampler quantizes its tensors: x_prev = Q(Q(mu) + Q(sigma) z).

    bits: 2 to 8. ranges: {"mean", "sigma", "state": (lo, hi)}, see `tensor_ranges`. The quantized sigma is
    used in every place, the direction term of DDIM included. Scales are rows of the plan: data of the
    compiled step. For samplers whose step is mu + sigma z, which all of `samplers` are.

    Raises ValueError for other bits, or a tensor that is missing.
    """
    if bits not in range(2, 9):
        raise ValueError(f"sampler tensors of {bits} bits: choose 2 to 8.")
    missing = [name for name in TENSORS if name not in ranges]
    if missing:
        raise ValueError(
            f"the ranges of the sampler's tensors lack {missing}; record trajectories."
        )
    rows = dict(plan.rows)
    for name in TENSORS:
        qparams = from_range(_SPEC, *ranges[name], *code_range(_SPEC, bits))
        for leaf in _LEAVES:
            value = np.asarray(getattr(qparams, leaf), np.float32)
            rows[f"{name}_{leaf}"] = np.full(plan.steps, value, np.float32)
    return plan.replace(rows=rows, sampler=_quantized(plan.sampler))


@functools.lru_cache(maxsize=16)
def _quantized(base: Sampler) -> Sampler:
    """One object per base sampler, because it is part of what the step is compiled for."""

    def rounded(row, name, value):
        leaves = (jnp.asarray(row[f"{name}_{leaf}"], jnp.float32) for leaf in _LEAVES)
        return fake_quant(QParams(*leaves, _SPEC), value)

    def read(row, output):
        return base.read(row, output)

    def step(row, state, x, eps, sigma, noise):
        sigma = rounded(row, "sigma", jnp.asarray(sigma))
        state, mean = base.step(row, state, x, eps, sigma, jnp.zeros_like(noise))
        x_prev = rounded(row, "mean", mean) + sigma * noise
        return state, rounded(row, "state", x_prev)

    return Sampler(base.name, base.init, read, step)


def tensor_ranges(
    plan: SamplerPlan, trajectory: Any, guidance: Guidance | None = None
) -> dict[str, tuple[float, float]]:
    """{"mean", "sigma", "state": (lo, hi)} over all steps of full-precision trajectories, min and max.

    plan: what recorded the trajectory (`observe.trajectory.Trajectory`), with every step in it. guidance:
    of the recording. JSON numbers, exact. Raises ValueError for a plan of other steps, or a sampler
    with a memory, whose mean cannot be computed from one step alone.
    """
    if len(trajectory.t) != plan.steps or not np.array_equal(trajectory.index, plan.index):
        raise ValueError(
            f"the trajectory holds {len(trajectory.t)} steps and the sampler {plan.steps}: record every "
            "step with this sampler to take the ranges of its tensors."
        )
    branches = len(np.unique(trajectory.branch))
    x, eps = trajectory.x, trajectory.eps
    if branches == 2:
        x, eps = x[:, 0::2], combine(guidance, eps[:, 0::2], eps[:, 1::2])
    if jax.tree.leaves(plan.sampler.init(jnp.asarray(x[0]))):
        raise ValueError(
            f"the sampler {plan.sampler.name!r} remembers earlier steps; its tensors are not quantized "
            "here, so use ddim or ddpm, or full-precision sampler tensors."
        )

    def one(row, x, eps):
        eps, sigma = plan.sampler.read(row, eps)
        return plan.sampler.step(row, (), x, eps, sigma, jnp.zeros_like(x))[1], sigma

    means, sigmas = jax.device_get(jax.jit(jax.vmap(one))(dict(plan.rows), x, jnp.asarray(eps)))

    def ends(*values):
        return (
            float(min(0.0, *(v.min() for v in values))),
            float(max(0.0, *(v.max() for v in values))),
        )

    # x_{t-1} of step j is the network's input at j - 1; of the last one it is the mean.
    return {"mean": ends(means), "sigma": ends(sigmas), "state": ends(np.asarray(x), means[0])}
