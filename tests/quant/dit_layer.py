"""The synthetic layer of the diffusion transformers' acceptance figures, and what is drawn behind it.

1152 input channels of unlike size, 12 of them 40 times larger, as a DiT block's; weights [1152, 1152] with
6 large input channels. float64, NumPy, seed 0: the figures in the tests are of exactly this stream.
"""

import functools
from typing import NamedTuple

import numpy as np

from qdiff_jax.quant.hadamard import paley

SIZE = 1152


class Layer(NamedTuple):
    """x [2048, K], kernel [K, N], y = x kernel, all float64. offset: 128 values in 1..1.1.

    signs: +-1 for a rotation. samples: {distribution: [64, K]}.
    """

    x: np.ndarray
    kernel: np.ndarray
    y: np.ndarray
    offset: np.ndarray
    factors: np.ndarray
    signs: np.ndarray
    samples: dict[str, np.ndarray]


@functools.cache
def layer() -> Layer:
    rng, n = np.random.default_rng(0), SIZE
    rng.standard_normal((64, n))
    offset = rng.random((1, 128)) * 0.1 + 1.0
    x = rng.standard_normal((2048, n)) * np.exp(0.4 * rng.standard_normal(n))
    x[:, rng.choice(n, 12, replace=False)] *= 40
    w = rng.standard_normal((n, n)) * 0.02 * np.exp(0.2 * rng.standard_normal(n))
    w[:, rng.choice(n, 6, replace=False)] *= 8
    # What the reference draws in between for figures of other tests.
    for shape in ((5, n), (4, 64), (64, n), n, (64, n), n, (4, 16, n)):
        rng.standard_normal(shape)
    factors = np.exp(rng.standard_normal(n))
    rng.standard_normal((n, n))
    rng.standard_normal(n)
    signs = rng.choice([-1, 1], n).astype(np.float64)
    samples = {
        "uniform": rng.uniform(-1, 1, (64, n)),
        "gauss": rng.standard_normal((64, n)),
        "laplace": rng.laplace(size=(64, n)),
        "student": rng.standard_t(3, (64, n)),
    }
    return Layer(x, w.T, x @ w.T, offset, factors, signs, samples)


@functools.cache
def dense_rotation() -> np.ndarray:
    """diag(+-1) H / sqrt(K), [K, K], H the dense Paley matrix that the reference rotates with."""
    return layer().signs[:, None] * paley(SIZE) / np.sqrt(SIZE)


@functools.cache
def turned() -> tuple[np.ndarray, np.ndarray]:
    """(x R, R'W) by `dense_rotation`."""
    return layer().x @ dense_rotation(), dense_rotation().T @ layer().kernel


def relative(found, wanted) -> float:
    """||found - wanted|| / ||wanted|| in float64."""
    wanted = np.asarray(wanted, np.float64)
    return float(np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted))


def output_error(x, kernel, wanted) -> float:
    """`relative` of x kernel; the product in float32, which is far finer than any rounding here."""
    product = np.asarray(x, np.float32) @ np.asarray(kernel, np.float32)
    return relative(product, wanted)


def smoothing() -> np.ndarray:
    """s_k = (max|x_k| / max|w_k|)^(1/2), SmoothQuant's at alpha 1/2: x / s and s w."""
    held = layer()
    return np.sqrt(np.abs(held.x).max(0) / np.abs(held.kernel).max(1))
