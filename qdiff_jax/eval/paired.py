"""Metrics of pairs: the quantized model's image or latent against full precision's from the same noise.

For images x (full precision) and y of n values each, with d = y - x and L the width of their range:

    MSE = |d|^2 / n     PSNR = 10 log10(L^2 / MSE)     SQNR = 10 log10(|x|^2 / |d|^2)

    SSIM = mean over windows of (2 m_x m_y + C_1)(2 s_xy + C_2) / ((m_x^2 + m_y^2 + C_1)(s_x^2 + s_y^2 + C_2))

(Wang et al. 2004, eq. 13, with its Gaussian window of 11 by 11 and sigma 1.5, C_i = (K_i L)^2, K = 0.01, 0.03,
windows inside the image only, channels averaged). Each function gives one value for each pair; over a set
PSNR and SQNR are taken of the pooled error, since one pair reproduced exactly makes the mean of the values
infinite.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qdiff_jax.eval.agreement import psnr_db, sqnr_db
from qdiff_jax.eval.intervals import Interval, mean_interval
from qdiff_jax.runtime.mesh import shard_batch

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


@jax.jit
def mse(reference: jax.Array, other: jax.Array) -> jax.Array:
    """[B] float32: mean squared difference of each pair of [B, ...] floating.

    Raises ValueError (as all functions here) when the shapes differ.
    """
    reference, other = _pair(reference, other)
    return jnp.mean(jnp.square(other - reference), axis=_inner(reference))


@jax.jit
def psnr(reference: jax.Array, other: jax.Array, data_range: float = 2.0) -> jax.Array:
    """[B] float32 in dB; inf for an equal pair. `data_range` is 2 for images in [-1, 1]."""
    return 10.0 * jnp.log10(data_range**2 / mse(reference, other))


@jax.jit
def sqnr(reference: jax.Array, other: jax.Array) -> jax.Array:
    """[B] float32 in dB: energy of the reference over that of the difference; inf for an equal pair."""
    return 10.0 * jnp.log10(_energy(reference, other) / mse(reference, other))


@jax.jit
def ssim(reference: jax.Array, other: jax.Array, data_range: float = 2.0) -> jax.Array:
    """[B] float32 in [-1, 1]: structural similarity of images [B, H, W, C], H and W at least 11.

    Both fractions are written as one minus a difference,

        1 - (m_x - m_y)^2 / (m_x^2 + m_y^2 + C_1)   and   1 - var(x - y) / (s_x^2 + s_y^2 + C_2),

    which is the same and keeps float32's digits where the images nearly agree.

    Raises ValueError when the shapes differ or an image is smaller than the window.
    """
    x, y = _pair(reference, other)
    if x.ndim != 4 or min(x.shape[1:3]) < WINDOW:
        raise ValueError(
            f"ssim takes images [B, H, W, C] of at least {WINDOW} by {WINDOW}, got {x.shape}."
        )
    d = x - y
    # One blur of all five: the program is a fifth as large.
    blurred = _blur(jnp.concatenate([x, y, d, x * x + y * y, d * d]))
    mean_x, mean_y, mean_d, squares, squares_d = jnp.split(blurred, 5)
    # E[x^2] - E[x]^2 may come out a little negative where an image is flat.
    spread = jnp.maximum(squares - mean_x * mean_x - mean_y * mean_y, 0.0)
    apart = jnp.maximum(squares_d - mean_d * mean_d, 0.0)
    level = mean_x * mean_x + mean_y * mean_y + (K1 * data_range) ** 2
    luminance = 1.0 - mean_d * mean_d / level
    structure = 1.0 - apart / (spread + (K2 * data_range) ** 2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def paired_metrics(
    pairs: Iterable[tuple[jax.Array, jax.Array]],
    *,
    data_range: float = 2.0,
    level: float = 0.95,
    perceptual: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Interval]:
    """All paired metrics of a stream of batches, each with its confidence interval.

    Args:
      pairs: (full precision, other) batches [B, ...]; images [B, H, W, C] of at least 11 by 11 get
        SSIM too.
      data_range: width of the values' range, 2 for images in [-1, 1].
      level: of the intervals.
      perceptual: images, images -> [B], such as `lpips` with its weights bound.
      mesh: split every batch over its devices, filled up with its last pair where it does not divide.

    Returns {"mse", "psnr_db", "sqnr_db"} and, where they apply, {"ssim", "lpips"}. PSNR and SQNR are those of
    the pooled error; the ends of PSNR's interval are those of the MSE, turned to dB, and SQNR's error is the
    delete-one jackknife's. A few numbers are kept for each pair, no image.

    Raises ValueError for fewer than two pairs or shapes that differ.
    """
    rows: dict[str, list[np.ndarray]] = {}
    for reference, other in pairs:
        functions = {"mse": mse, "energy": _energy}
        if np.ndim(reference) == 4 and min(np.shape(reference)[1:3]) >= WINDOW:
            functions["ssim"] = lambda x, y: ssim(x, y, data_range)
        if perceptual is not None:
            functions["lpips"] = perceptual
        count = len(reference)
        if mesh is not None and count:
            # Before both are filled up to one length.
            reference, other = (_spread(x, mesh) for x in _pair(reference, other))
        for name, function in functions.items():
            found = np.asarray(function(reference, other), np.float64)
            rows.setdefault(name, []).append(found[:count])
    values = {name: np.concatenate(parts) for name, parts in rows.items()}
    if not values or len(values["mse"]) < 2:
        raise ValueError("paired_metrics needs at least two pairs of samples; sample more.")
    error, energy = values.pop("mse"), values.pop("energy")
    found = {"mse": mean_interval(error, level=level)}
    found["psnr_db"] = _psnr_interval(found["mse"], data_range)
    found["sqnr_db"] = _sqnr_interval(error, energy, level)
    return found | {name: mean_interval(value, level=level) for name, value in values.items()}


def _psnr_interval(error: Interval, data_range: float) -> Interval:
    best = max(error.low, 0.0)
    slope = 10.0 / np.log(10.0) / error.estimate if error.estimate else 0.0
    return error._replace(
        estimate=psnr_db(error.estimate, data_range),
        low=psnr_db(error.high, data_range),
        high=psnr_db(best, data_range),
        standard_error=slope * error.standard_error,
        method="mean, in dB",
    )


def _sqnr_interval(error: np.ndarray, energy: np.ndarray, level: float) -> Interval:
    """The delete-one jackknife of a ratio of sums, whose n values need no loop."""
    estimate = sqnr_db(float(error.sum() / energy.sum()))
    without_error, without_energy = error.sum() - error, energy.sum() - energy
    if not (np.isfinite(estimate) and (without_error > 0).all() and (without_energy > 0).all()):
        # Equal (inf), diverged (nan), or resting on a single pair: there is no spread to report.
        unknown = float("nan")
        return Interval(estimate, unknown, unknown, unknown, unknown, level, "jackknife")
    without = -10.0 * np.log10(without_error / without_energy)
    # Pseudo-values: their mean is the estimate less its bias, their error the jackknife's.
    pseudo = len(error) * estimate - (len(error) - 1) * without
    around = mean_interval(pseudo, level=level)
    bias = estimate - around.estimate
    return around._replace(
        estimate=estimate,
        low=around.low + bias,
        high=around.high + bias,
        bias=bias,
        method=f"jackknife, {len(error)} groups",
    )


def _pair(reference: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
    reference, other = jnp.asarray(reference), jnp.asarray(other)
    if reference.shape != other.shape or reference.ndim < 1:
        raise ValueError(
            f"paired metrics compare arrays of one shape [B, ...]: the reference has "
            f"{reference.shape} and the other {other.shape}."
        )
    return reference.astype(jnp.float32), other.astype(jnp.float32)


def _spread(x, mesh: Mesh) -> jax.Array:
    x = np.asarray(x)
    filled = np.concatenate([x, np.repeat(x[-1:], -len(x) % mesh.size, axis=0)])
    return shard_batch(filled, mesh)


def _inner(x: jax.Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


@jax.jit
def _energy(reference: jax.Array, other: jax.Array) -> jax.Array:
    reference, _ = _pair(reference, other)
    return jnp.mean(jnp.square(reference), axis=_inner(reference))


def _blur(x: jax.Array) -> jax.Array:
    """Gaussian window over height and width, where it fits: [B, H, W, C] -> [B, H-10, W-10, C].

    Eleven shifted copies and a sum, which XLA fuses; a convolution of one channel is slow.
    """
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (offsets / SIGMA) ** 2)
    weights = weights / weights.sum()
    for axis in (1, 2):
        size = x.shape[axis] - WINDOW + 1
        parts = [
            float(weight) * jax.lax.slice_in_dim(x, start, start + size, axis=axis)
            for start, weight in enumerate(weights)
        ]
        x = sum(parts[1:], parts[0])
    return x
