"""Consistency models: one evaluation from noise to image, at a noise level sigma.

Source: Song et al. 2023 (Consistency Models, arXiv:2303.01469), section 3 and appendix C; Karras et al. 2022
for the scaling. f(x, sigma) = c_skip x + c_out F(c_in x, t) with c_skip = 1, c_out = 0 at sigma_min.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5


class Preconditioning(NamedTuple):
    """c_skip, c_out, c_in and the network's timestep t, each float32 of the shape of sigma."""

    skip: np.ndarray
    out: np.ndarray
    inward: np.ndarray
    t: np.ndarray


def preconditioning(
    sigma, *, sigma_min: float = SIGMA_MIN, sigma_data: float = SIGMA_DATA
) -> Preconditioning:
    """The coefficients at noise levels sigma > 0, computed in float64.

    c_skip = s^2 / ((sigma - sigma_min)^2 + s^2), c_out = s (sigma - sigma_min) / sqrt(sigma^2 + s^2),
    c_in = 1 / sqrt(sigma^2 + s^2), t = 250 log sigma, with s = sigma_data. Raises ValueError for sigma <= 0.
    """
    sigma = np.asarray(sigma, np.float64)
    if not np.all(sigma > 0):
        raise ValueError(f"noise levels must be above 0, got {sigma.min()}.")
    total = np.sqrt(sigma**2 + sigma_data**2)
    past = sigma - sigma_min
    rows = (
        sigma_data**2 / (past**2 + sigma_data**2),
        sigma_data * past / total,
        1 / total,
        250 * np.log(sigma),
    )
    return Preconditioning(*(row.astype(np.float32) for row in rows))


def denoised(at: Preconditioning, x, estimate, clip: float | None = 1.0):
    """f(x, sigma) from x [B, H, W, C] and the network's output F(c_in x, t) of the same shape.

    at: of noise levels [B]. clip: bound on |f|, None for none.
    """
    shape = (-1, *(1,) * (x.ndim - 1))
    f = jnp.reshape(at.skip, shape) * x + jnp.reshape(at.out, shape) * estimate
    return f if clip is None else jnp.minimum(jnp.maximum(f, -clip), clip)
