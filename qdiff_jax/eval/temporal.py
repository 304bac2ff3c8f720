"""How well quantization keeps the temporal features: what the time embedding tells each block.

TFMQ-DM (arXiv:2311.16503, section 3) observes two faults in quantized U-Nets: the projected
embedding of a timestep turns away from the full-precision one, and it may come to lie closer to
the embedding of *another* timestep, so that a block denoises for the wrong noise level. Both are
measured here, on the outputs of every block's embedding projection.

Everything runs on the host in float64: the arrays are small (one vector per timestep and site), and
an 8-bit model's distance of some 1e-6 is near what float32 cosines can resolve.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from qdiff_jax.runtime.finite import NotFiniteError

# Cosines this close are the same embedding seen through rounding, e.g. when a schedule repeats a t.
_TIE = 1e-12


class TemporalAgreement(NamedTuple):
    """R timesteps, the sites in the order of the full-precision mapping."""

    cosine: float  # mean over timesteps and sites of 1 - cos, in [0, 2]; 0 is perfect
    mismatch: float  # fraction of (timestep, site) nearest to another timestep's embedding, [0, 1]
    cosine_rows: np.ndarray  # [R]: 1 - cos, mean over sites
    mismatch_rows: np.ndarray  # [R]: fraction of the sites that mistake this timestep
    cosine_sites: dict[str, np.ndarray]  # [R] of each site
    nearest: dict[str, np.ndarray]  # [R] int: row of the full-precision embedding it is closest to


def _directions(site: str, values: np.ndarray, which: str) -> tuple[np.ndarray, np.ndarray]:
    """[R, C] unit rows in float64 and which rows are not zero."""
    values = np.asarray(values, np.float64)
    if values.ndim != 2:
        raise ValueError(
            f"temporal features are [R, C], a row per timestep: the {which} ones of {site!r} have "
            f"shape {values.shape}."
        )
    if not np.isfinite(values).all():
        rows = np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist()
        raise NotFiniteError(
            f"temporal features: the {which} embedding of {site!r} is not finite at rows {rows}; "
            f"check the quantizers of the time embedding."
        )
    norm = np.linalg.norm(values, axis=1, keepdims=True)
    alive = norm[:, 0] > 0
    return values / np.where(norm > 0, norm, 1.0), alive


def temporal_agreement(
    full: Mapping[str, np.ndarray], quantized: Mapping[str, np.ndarray]
) -> TemporalAgreement:
    """Compares temporal features timestep by timestep.

    Args:
      full: site name -> [R, C_site] floating; the full-precision embedding projections, row r being
        the r-th timestep.
      quantized: the same sites and shapes from the quantized model.

    Returns:
      `cosine`: 1 - cos(q_t, f_t), computed as |u - v|^2 / 2 of the unit vectors so that small
      distances keep their digits. `mismatch`: how often argmax_{t'} cos(q_t, f_{t'}) != t, a tie
      counting as a match. A quantized embedding that is all zero has no direction: its distance is
      1 and it is a mismatch.

    Raises ValueError when the sites or shapes differ, there are none, a value is not finite, or a
    full-precision embedding is all zero.
    """
    if not full or set(full) != set(quantized):
        raise ValueError(
            f"temporal features need the same sites from both models, at least one: only in the "
            f"full-precision model {sorted(set(full) - set(quantized))}, only in the quantized one "
            f"{sorted(set(quantized) - set(full))}."
        )
    distance, wrong, nearest = {}, {}, {}
    for site in full:
        f, f_alive = _directions(site, full[site], "full-precision")
        q, q_alive = _directions(site, quantized[site], "quantized")
        if f.shape != q.shape:
            raise ValueError(
                f"temporal features of {site!r} differ in shape: {f.shape} in full precision, "
                f"{q.shape} quantized."
            )
        if not f_alive.all():
            raise ValueError(
                f"temporal features: the full-precision embedding of {site!r} is zero at rows "
                f"{np.flatnonzero(~f_alive).tolist()} and has no direction to compare with."
            )
        distance[site] = np.where(q_alive, 0.5 * np.square(q - f).sum(axis=1), 1.0)
        cosines = q @ f.T  # [R of q, R of f]
        own = np.diagonal(cosines)
        missed = ~q_alive | (cosines.max(axis=1) > own + _TIE)
        wrong[site] = missed
        nearest[site] = np.where(missed & q_alive, cosines.argmax(axis=1), np.arange(len(own)))
    rows = {values.shape for values in distance.values()}
    if len(rows) > 1:
        raise ValueError(
            f"temporal features need the same timesteps at every site: the sites have "
            f"{sorted(shape[0] for shape in rows)} rows."
        )
    cosine_rows = np.mean(list(distance.values()), axis=0)
    mismatch_rows = np.mean(list(wrong.values()), axis=0)
    return TemporalAgreement(
        cosine=float(cosine_rows.mean()),
        mismatch=float(mismatch_rows.mean()),
        cosine_rows=cosine_rows,
        mismatch_rows=mismatch_rows,
        cosine_sites=distance,
        nearest=nearest,
    )
