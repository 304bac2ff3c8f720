"""Step tables of learned activation quantizers: start, use in training, another schedule.

TALSQ (EfficientDM, He et al. 2024, section 3.4): scale and zero point of each sampling step, [S] per
activation, all starting from one calibrated range; tables trained on S steps serve fewer by taking every
(S / S')-th entry, or by interpolating over t.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.quant.affine import round_ste
from qdiff_jax.quant.lsq import positive
from qdiff_jax.quant.qparams import QParams, refuse_stored_format
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.quant.timed import TimeIndexed


def repeated(qparams: QParams, rows: int) -> QParams:
    """A static quantizer as `rows` equal rows: every leaf [rows, ...]."""
    return jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (rows, *jnp.shape(leaf))).astype(jnp.float32), qparams
    )


def learns_zero_point(spec: QuantSpec) -> bool:
    """Whether the zero point is a number to learn: of symmetric grids it is 0, of others no zero point."""
    return spec.grid == "affine" and not spec.symmetric


def trained_rows(table: QParams, zp_ste: bool = True) -> QParams:
    """The rows as a training step quantizes with them: scale kept positive, the zero point a code.

    zp_ste: round the zero point, straight through, as integer execution needs it; False leaves it the free
    float that the official code trains. Only asymmetric affine grids have one to learn.
    """
    zero = table.zero_point
    if not learns_zero_point(table.spec):
        zero = jax.lax.stop_gradient(zero)
    elif zp_ste:
        zero = round_ste(zero)
    refuse_stored_format(table.spec, "trained")
    return table.replace(scale=positive(table.scale), zero_point=zero)


def kept_among_codes(table: QParams) -> QParams:
    """The rows with zero points moved to the nearest end of qmin..qmax where they have left it: beyond it
    0 has no code, and padding cannot be represented."""
    return table.replace(zero_point=jnp.clip(table.zero_point, table.qmin, table.qmax))


def check_served(trained: np.ndarray, timesteps: np.ndarray, how: str) -> None:
    """Raise ValueError for what `on_schedule` cannot do: another `how`, "every" with S' that does not divide S,
    or, interpolating, a timestep outside the trained ones. Cheap, for before the training."""
    trained, timesteps = np.asarray(trained), np.asarray(timesteps)
    if how not in ("every", "interpolate"):
        raise ValueError(f"how={how!r} is unknown; use 'every' or 'interpolate'.")
    if np.array_equal(trained, timesteps):
        return
    if how == "every" and len(trained) % len(timesteps):
        raise ValueError(
            f"a table of {len(trained)} steps has no every-n-th entry for {len(timesteps)} steps; train on a "
            "multiple of the sampler's steps, or take how='interpolate'."
        )
    if how == "interpolate" and (
        timesteps.min() < trained.min() or timesteps.max() > trained.max()
    ):
        raise ValueError(
            f"tables are trained from t = {trained.min():g} to {trained.max():g}, the schedule goes from "
            f"{timesteps.min():g} to {timesteps.max():g}; train on a grid that covers it."
        )


def on_schedule(
    table: QParams, trained: np.ndarray, timesteps: np.ndarray, how: str = "interpolate"
) -> TimeIndexed:
    """A trained table on the sampler's schedule, rule "step", zero points rounded.

    Args:
      table: leaves [S, ...], row i trained at timestep trained[i].
      trained: [S] ascending. timesteps: [S'] ascending, the schedule it is to serve.
      how: "every": row i * (S / S'), which the official code takes; "interpolate": linear in t, exact at
        trained timesteps (and so the same on nested grids).

    Raises ValueError as `check_served` does.
    """
    trained, timesteps = np.asarray(trained, np.float32), np.asarray(timesteps, np.float32)
    check_served(trained, timesteps, how)
    if np.array_equal(trained, timesteps):
        chosen = table
    elif how == "every":
        chosen = jax.tree.map(lambda leaf: leaf[:: len(trained) // len(timesteps)], table)
    else:
        chosen = _interpolated(table, trained, timesteps)
    rows = kept_among_codes(trained_rows(chosen))
    return TimeIndexed(rows, jnp.asarray(timesteps), "step")


def _interpolated(table: QParams, trained: np.ndarray, timesteps: np.ndarray) -> QParams:
    # Where a grid repeats a timestep, its first row stands for it.
    at, first = np.unique(trained, return_index=True)
    above = np.minimum(np.clip(np.searchsorted(at, timesteps), 1, None), len(at) - 1)
    below = np.maximum(above - 1, 0)
    span = np.maximum(at[above] - at[below], np.finfo(np.float32).tiny)
    share = np.clip((timesteps - at[below]) / span, 0.0, 1.0).astype(np.float32)

    def between(leaf):
        leaf = np.asarray(leaf)
        low, high = leaf[first[below]], leaf[first[above]]
        part = share.reshape((-1,) + (1,) * (leaf.ndim - 1))
        # Both ends exact, which low + part * (high - low) is not at its upper one.
        mixed = (1 - part) * low + part * high
        return jnp.asarray(np.where(part == 1, high, np.where(part == 0, low, mixed)))

    return jax.tree.map(between, table)
