"""Smoothing: a factor of each input channel moved from an activation into the weight behind it.

(x / s)(s W) is x W; what changes is which of the two is hard to quantize. The family s = a^alpha / w^beta,
a the largest |x| and w the largest |W| of a channel: beta = 1 - alpha is SmoothQuant (Xiao et al. 2023,
arXiv:2211.10438), and SVDQuant (Li et al. 2024, arXiv:2411.05007) searches both on purpose as far as alpha = 1,
where the outliers are all in the weight and its low-rank branch takes them up. (`quant.reparameterise` has the
time-weighted factors of TCAQ-DM.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

FLOOR = 1e-5
# The least value of GELU (tanh form) is -0.17004: shifted by this, its outputs fit unsigned codes.
GELU_SHIFT = 0.171875
CANDIDATES = ("full", "fast", "none")


def exponents(candidates: str) -> np.ndarray:
    """[J, 2] float32: the pairs (alpha, beta) of a search.

    "full": (0, 0), then (i/20, 0) and (i/20, 1 - i/20), i = 1..19, the official 39. "fast": (0, 0), then
    (i/10, 1 - i/10), i = 1..9; there are 10 in the official one too, but which is our choice. "none": (0, 0).
    Raises ValueError for another name.
    """
    if candidates not in CANDIDATES:
        raise ValueError(f"smoothing {candidates!r} is unknown; use one of {CANDIDATES}.")
    pairs = [(0.0, 0.0)]
    if candidates == "full":
        pairs += [(i / 20, 0.0) for i in range(1, 20)]
        pairs += [(i / 20, 1 - i / 20) for i in range(1, 20)]
    elif candidates == "fast":
        pairs += [(i / 10, 1 - i / 10) for i in range(1, 10)]
    return np.asarray(pairs, np.float32)


def weight_magnitude(kernel: jax.Array) -> jax.Array:
    """w [C]: the largest |W| of each input channel of a kernel [..., C, N]."""
    return jnp.max(jnp.abs(kernel), axis=(*range(kernel.ndim - 2), kernel.ndim - 1))


def smoothing_factors(a: jax.Array, w: jax.Array, alpha, beta) -> jax.Array:
    """s [C] = a^alpha / w^beta, both magnitudes at least FLOOR; 1 where that is zero or not finite.

    a, w: [C]. alpha, beta: numbers or scalars (data: one compile for all candidates).
    """
    logs = alpha * jnp.log(jnp.maximum(a, FLOOR)) - beta * jnp.log(jnp.maximum(w, FLOOR))
    factors = jnp.exp(logs)
    return jnp.where(jnp.isfinite(factors) & (factors > 0), factors, 1.0)


def best_candidate(errors, later: bool) -> int:
    """Index of the least of errors [J]; among equals the last if `later` (the official code), else the first.

    A candidate that is NaN is never taken unless all are.
    """
    errors = np.where(np.isnan(errors), np.inf, np.asarray(errors))
    return len(errors) - 1 - int(errors[::-1].argmin()) if later else int(errors.argmin())
