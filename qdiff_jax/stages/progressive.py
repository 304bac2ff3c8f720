"""Progressively aligned reconstruction: rounds in which the quantized sampler chooses what to calibrate on.

TCAQ-DM (Huang et al. 2024): after an ordinary reconstruction the quantized network is sampled,
and reconstruction goes on, shorter, on the states that it meets, with the full-precision network's answers
there as targets; and so for a few rounds. How the rounding schedule spans the rounds is a reconstruction of
the method: one annealing of beta over all rounds together, rounding weights that stay soft between them, so
that the decisions of an early round are not final before the states of the last are seen.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.diffusion.guidance import branches
from qdiff_jax.export.qtensor import QTensor
from qdiff_jax.observe.archive import load_arrays, save_arrays
from qdiff_jax.observe.quantization_noise import Paired
from qdiff_jax.observe.selectors import CalibrationSet, gather
from qdiff_jax.observe.trajectory import Trajectory, record_trajectories
from qdiff_jax.quant.rounding import soft_rounding
from qdiff_jax.sites import flatten_sites, nest_sites
from qdiff_jax.stages.stage import (
    Model,
    QuantState,
    Stage,
    fold_weights,
    kernel_at,
    tuned_params,
)
from qdiff_jax.stages.unit_steps import ReconstructConfig

# Of the key that sampling noise is drawn from, the same in every round, where the recording's is unknown.
_SAMPLING = 0x9A12


def round_configs(
    config: ReconstructConfig, rounds: int, share: float = 0.25
) -> tuple[ReconstructConfig, ...]:
    """The configs of round 0 (`config.steps`) and of `rounds` more (a share of it each).

    Warm-up and beta are those of one pass over the steps of all rounds together, cut where rounds end.
    Raises ValueError for a negative number of rounds, or a share outside (0, 1].
    """
    if rounds < 0 or not 0.0 < share <= 1.0:
        raise ValueError(f"rounds={rounds} must not be negative and share={share} in (0, 1].")
    if rounds == 0:
        return (config,)
    later = max(1, round(config.steps * share)) if config.steps else 0
    lengths = [config.steps] + [later] * rounds
    total = sum(lengths)
    start, end = config.beta_range
    warm = config.warmup * total

    def beta(step: float) -> float:
        progress = (step - warm) / max(total - warm, 1e-9)
        return end + (start - end) * min(max(1.0 - progress, 0.0), 1.0)

    made, first = [], 0
    for i, steps in enumerate(lengths):
        temporal = config.temporal_steps
        if i and temporal:
            temporal = max(1, round(temporal * share))
        made.append(
            dataclasses.replace(
                config,
                steps=steps,
                temporal_steps=temporal,
                warmup=min(max(warm - first, 0.0), steps) / max(steps, 1),
                beta_range=(beta(first), beta(first + steps)),
            )
        )
        first += steps
    return tuple(made)


def reopened(state: QuantState, params: Any) -> QuantState:
    """A state whose decided weights are soft again, each with the alpha that the last round left.

    params: with the kernels that the codes were decided for. Weights without an alpha stay decided.
    """
    flat = flatten_sites(state.quant)
    for name, alpha in state.aux.get("alphas", {}).items():
        held = flat[name].rhs
        if isinstance(held, QTensor):
            soft = soft_rounding(kernel_at(params, name), held.qparams)
            flat[name] = flat[name].replace(rhs=soft.replace(alpha=jnp.asarray(alpha)))
    return state.replace(quant=nest_sites(flat))


def unrounded(state: QuantState) -> QuantState:
    """A state whose decided weights are to be decided again: ranges in place of codes, no refitted bias."""
    flat = {
        name: site.replace(rhs=site.rhs.qparams, bias=None)
        if isinstance(site.rhs, QTensor)
        else site
        for name, site in flatten_sites(state.quant).items()
    }
    return state.replace(quant=nest_sites(flat))


class Carry(NamedTuple):
    state: QuantState
    trajectory: Trajectory | None
    store: pathlib.Path | None


def resample(
    model: Model,
    predict: Callable,
    source: Paired,
    steps: np.ndarray,
    *,
    name: str = "resample",
    batch_size: int = 64,
    on_progress=None,
) -> Stage:
    """The stage that samples the network as quantized so far and keeps the states it meets.

    source: the full-precision trajectories, from whose first states (and labels, guidance, sampler) the
    quantized ones start too; with its key they meet the same noise at every step, so that `gap` is of the
    networks alone (of a stochastic sampler, and only with the key). steps: step indices that calibration sees.
    `finish` leaves the set in `aux["calibration"]` and all states in `aux["states"]`, and reports `gap`: how
    far they are from those of the last round (of full precision in the first), mean square.
    """
    trajectory = source.trajectory
    every = len(branches(source.guidance))

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        path = _path(store)
        made = None
        if path is not None and path.exists():
            made = load_arrays(path, Trajectory, optional=("y",))
        return Carry(state, made, store)

    def run(carry: Carry, n: int) -> Carry:
        del n
        params = tuned_params(model.params, carry.state.aux)
        params, quant = fold_weights(params, carry.state.quant)
        noisiest = int(np.argmax(trajectory.t))
        indices = trajectory.sample[::every]
        # What is handed over is the standard normal, which a sampler multiplies by its own start.
        start = trajectory.x[noisiest, ::every] / np.float32(source.plan.start_scale)
        drawn = jax.random.fold_in(carry.state.key, _SAMPLING)
        made = record_trajectories(
            predict,
            {"params": params, "quant": quant},
            source.plan,
            drawn if source.key is None else source.key,
            indices,
            noise=start,
            y=jax.tree.map(lambda leaf: leaf[::every], trajectory.y),
            guidance=source.guidance,
            batch_size=min(batch_size, len(indices)),
            on_batch=None if on_progress is None else lambda done: on_progress(done, len(indices)),
        )
        if not np.isfinite(made.x).all():
            raise FloatingPointError(
                f"{name}: sampling the quantized network left values that are not finite; its ranges "
                "are too narrow for its own trajectories, or its rounding has diverged."
            )
        if carry.store is not None:
            carry.store.mkdir(parents=True, exist_ok=True)
            save_arrays(_path(carry.store), made)
        return carry._replace(trajectory=made)

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        made = carry.trajectory
        before = carry.state.aux.get("states", trajectory.x)
        gap = float(np.mean((np.asarray(made.x) - np.asarray(before)) ** 2))
        key = jax.random.fold_in(carry.state.key, _SAMPLING + 1)
        calibration = at_steps(key, made, steps)
        aux = {**carry.state.aux, "calibration": calibration, "states": made.x}
        return carry.state.replace(aux=aux), {"gap": gap}

    def done(carry: Carry) -> bool:
        return carry.trajectory is not None

    return Stage(name, init, run, finish, done, "rounds")


def at_steps(key: jax.Array, trajectory: Trajectory, steps: np.ndarray) -> CalibrationSet:
    """Every row of a trajectory at the given step indices, shuffled with the key."""
    positions = np.flatnonzero(np.isin(trajectory.index, steps))
    rows = np.arange(trajectory.x.shape[1])
    position, row = np.meshgrid(positions, rows, indexing="ij")
    return gather(key, trajectory, position.ravel(), row.ravel())


def _path(store: pathlib.Path | None) -> pathlib.Path | None:
    return None if store is None else store / "trajectory.npz"
