"""Mean and covariance of a stream of feature vectors, in float64, in memory that does not grow.

A batch of n_b features x has its own mean m_b and scatter S_b = sum_i (x_i - m_b)(x_i - m_b)^T. Two
sets are joined by the pairwise update of Chan, Golub and LeVeque (1979, eq. 2.1 for matrices):

    n = n_a + n_b,   d = m_b - m_a,   m = m_a + (n_b / n) d,
    S = S_a + S_b + (n_a n_b / n) d d^T

and the covariance is S / (n - 1). Centring before the products is what keeps the digits: the sum of
outer products minus n m m^T cancels as soon as the mean is large against the spread. The network
runs on the accelerator in float32; the sums are made on the host in float64, since neither a TPU
nor a float32 accumulator gives the six digits that a Frechet distance is quoted to.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from qdiff_jax.runtime.finite import NotFiniteError


class Moments(NamedTuple):
    """First and second moments of `n` vectors. Host arrays; `merge` joins two of them."""

    n: int
    mean: np.ndarray  # [D] float64
    scatter: np.ndarray  # [D, D] float64: sum over samples of (x - mean)(x - mean)^T

    @property
    def cov(self) -> np.ndarray:
        """[D, D] float64, unbiased (divided by n - 1), as `np.cov(x, rowvar=False)`.

        Raises ValueError when fewer than two vectors were seen.
        """
        if self.n < 2:
            raise ValueError(
                f"a covariance needs at least two feature vectors, got {self.n}; use more samples."
            )
        return self.scatter / (self.n - 1)


def init(dim: int) -> Moments:
    """No vectors yet, of `dim` entries each. Raises ValueError when `dim` is not positive."""
    if dim < 1:
        raise ValueError(f"moments.init needs a positive feature dimension, got dim={dim}.")
    return Moments(0, np.zeros((dim,), np.float64), np.zeros((dim, dim), np.float64))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets together, in any order (two hosts, or before and after a restart).

    Raises ValueError when the dimensions differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"moments.merge needs one feature dimension: {a.mean.shape[0]} and {b.mean.shape[0]}."
        )
    if a.n == 0 or b.n == 0:
        return b if a.n == 0 else a
    n = a.n + b.n
    shift = b.mean - a.mean
    between = np.outer(shift, shift) * (a.n * (b.n / n))
    return Moments(n, a.mean + shift * (b.n / n), a.scatter + b.scatter + between)


def update(moments: Moments, features) -> Moments:
    """Adds a batch.

    Args:
      moments: from `init`.
      features: [B, D] floating, a host or a device array; B may differ from call to call.

    Raises ValueError when the shape does not fit or a feature is not finite (a model that diverged
    has no distance, and one NaN would silently make all of it NaN).
    """
    return merge(moments, _of_batch(np.asarray(features), moments.mean.shape[0]))


def moments_of(features, batch: int = 4096) -> Moments:
    """Moments of features [N, D] that are already in memory, in float64 blocks of `batch` rows."""
    features = np.asarray(features)
    if features.ndim != 2:
        raise ValueError(f"moments_of takes features [N, D], got {features.shape}.")
    parts = (features[i : i + batch] for i in range(0, len(features), batch))
    return collect(parts, features.shape[1])


def collect(batches: Iterable, dim: int) -> Moments:
    """Moments of a stream of batches [B, dim]; holds one batch at a time."""
    moments = init(dim)
    for features in batches:
        moments = update(moments, features)
    return moments


def weighted(features: np.ndarray, counts: np.ndarray) -> Moments:
    """Moments of a set in which vector i occurs `counts[i]` times, without copying any vector.

    Args:
      features: [N, D] floating.
      counts: [N] non-negative integers: how often each one is drawn in a resample.

    This is what makes resampling a Frechet distance cheap: a bootstrap draw is a vector of counts.
    """
    counts = np.asarray(counts, np.float64)
    if counts.shape != features.shape[:1] or features.ndim != 2 or (counts < 0).any():
        raise ValueError(
            f"moments.weighted takes features [N, D] and N counts that are not negative: got "
            f"{features.shape} and {counts.shape}."
        )
    total = counts.sum()
    if total == 0:
        raise ValueError("moments.weighted: every count is zero, so that there is no vector.")
    used = counts > 0
    kept, counts = np.asarray(features[used], np.float64), counts[used]
    mean = (counts @ kept) / total
    rooted = (kept - mean) * np.sqrt(counts)[:, None]
    return Moments(int(total), mean, rooted.T @ rooted)


def _of_batch(features: np.ndarray, dim: int) -> Moments:
    if features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(f"moments.update takes features [B, {dim}], got {features.shape}.")
    if len(features) == 0:
        return init(dim)
    features = features.astype(np.float64)
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features).all(axis=1)).sum())
        raise NotFiniteError(
            f"{bad} of {len(features)} feature vectors in a batch are not finite; look at the "
            f"images (a model that diverged) before measuring a distance."
        )
    mean = features.mean(axis=0)
    centred = features - mean
    return Moments(len(features), mean, centred.T @ centred)
