"""How far the quantized trajectory strays, and how much of that is feedback.

At one step the error of the noise estimate moves the next state by c_j (eps_q - eps); along a trajectory every
later step starts from a state that is already off, and the network answers to that too. Both are
measured from the same noise (error accumulation: Q-Diffusion, Li et al. 2023; PTQD, He et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from qdiff_jax.analysis.forced import forced_eps
from qdiff_jax.analysis.subject import Subject
from qdiff_jax.diffusion.hooks import IDENTITY, Hooks
from qdiff_jax.diffusion.sample import sample
from qdiff_jax.diffusion.samplers import SamplerPlan
from qdiff_jax.eval.samples import noise_key
from qdiff_jax.models.registry import predictor


class Deviation(NamedTuple):
    """S steps in ascending order of timestep; entry j speaks of the state *after* step j.

    verdict: for each variant "<name>/final" (relative MSE of x_0), "<name>/single" (sum over steps of
    the single-step relative MSE) and "<name>/amplification" (MSE of x_0 over the sum of the single-step
    MSEs: 1 if errors only added up as independent noise would).
    accumulated, single: variant -> [S] relative MSE of the state against full precision's: the variant
    on its own since the first step, and for this one step from full precision's state.
    """

    verdict: dict
    timesteps: np.ndarray
    accumulated: dict[str, np.ndarray]
    single: dict[str, np.ndarray]


def rollout_states(
    subject: Subject,
    variables: Any,
    hooks: Hooks = IDENTITY,
    sampler: SamplerPlan | None = None,
) -> np.ndarray:
    """[S + 1, N, ...]: the states of a variant's own sampling from the subject's noise and labels; entry
    j + 1 goes into step j, entry 0 is x_0.

    hooks: the correction of its sampling. sampler: its own, where the sampler's tensors are quantized too; the
    subject's without."""
    trajectory = subject.trajectory
    result = sample(
        predictor(subject.model.module),
        variables,
        subject.sampler if sampler is None else sampler,
        noise_key(subject.seed),
        trajectory.sample,
        shape=subject.shape,
        y=trajectory.y,
        hooks=hooks,
        record=True,
        batch_size=subject.batch,
    )
    return np.concatenate([result.x[None], result.record.x])


def trajectory_deviation(
    subject: Subject,
    variants: Mapping[str, dict],
    on_step: Callable | None = None,
    *,
    hooks: Mapping[str, Hooks] = MappingProxyType({}),
    samplers: Mapping[str, SamplerPlan] = MappingProxyType({}),
) -> Deviation:
    """Accumulated and single-step deviation of every variant ({name: variables}).

    hooks, samplers: of the variants that correct their sampling or quantize the sampler too, by name.
    The single-step deviation is exact for samplers that are affine in the estimate (DDIM, DDPM without
    clipping) and counts the step's own estimate for multistep ones.
    """
    reference = rollout_states(subject, subject.full).astype(np.float64)
    axes = tuple(range(1, reference.ndim))
    energy = np.mean(reference**2, axis=axes)[:-1]
    coefficient = np.asarray(subject.sampler.rows["eps_coefficient"], np.float64)
    # Full precision's estimates again, so that both sides are rounded by the same program.
    eps = forced_eps(subject, subject.full)
    verdict, accumulated, single = {}, {}, {}
    for name, variables in variants.items():
        own = hooks.get(name, IDENTITY)
        states = rollout_states(subject, variables, own, samplers.get(name))
        error = np.mean((states - reference) ** 2, axis=axes)[:-1]
        gap = (forced_eps(subject, variables, on_step, own) - eps).astype(np.float64)
        one = coefficient**2 * np.mean(gap**2, axis=axes)
        accumulated[name], single[name] = error / energy, one / energy
        verdict[f"{name}/final"] = float(accumulated[name][0])
        verdict[f"{name}/single"] = float(single[name].sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            verdict[f"{name}/amplification"] = float(error[0] / one.sum())
    return Deviation(verdict, np.asarray(subject.trajectory.t), accumulated, single)
