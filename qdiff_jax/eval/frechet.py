"""The Frechet distance between Gaussians fitted to two sets of features, in float64 on the host.

    d^2 = |mu_1 - mu_2|^2 + tr(C_1) + tr(C_2) - 2 tr((C_1 C_2)^(1/2))

(Dowson and Landau 1982; Heusel et al. 2017, arXiv:1706.08500, eq. 6, where it is called FID if the
features are the pooled ones of the 2015 Inception network.) It is a squared distance, and the
convention is to report it so. For any factors C_i = A_i A_i^T the last trace is the sum of the singular
values of A_1^T A_2, since those are the roots of the eigenvalues of C_1^(1/2) C_2 C_1^(1/2). Taking
singular values instead of roots of eigenvalues keeps twice the digits of the small ones, and
there are thousands of them; a covariance of fewer samples than dimensions is nothing special,
its factor only has fewer columns. The matrix root of the published tools (scipy's `sqrtm` of
a product that is not symmetric) agrees where it converges.

A finite sample biases the distance upwards by about a constant over N, and the constant depends on
the model (Chong and Forsyth 2020, arXiv:1911.07023), so that two models can change places with N:
`frechet_infinity` removes it.
"""

from typing import NamedTuple

import numpy as np

from qdiff_jax.eval.moments import Moments, moments_of


class Extrapolation(NamedTuple):
    """A distance as a line in 1/N: `distance` + `slope` / N."""

    distance: float  # the intercept, N -> infinity
    slope: float
    residual: float  # root mean square of what the line leaves
    sizes: np.ndarray  # [P] int64
    distances: np.ndarray  # [P] float64


def frechet_distance(mu1, cov1, mu2, cov2) -> float:
    """The squared Frechet distance of N(mu1, cov1) and N(mu2, cov2).

    Args:
      mu1, mu2: [D] floating.
      cov1, cov2: [D, D] floating, symmetric and positive semi-definite, of any rank.

    Returns a float that is 0 for equal moments (up to 1e-12 of the traces) and symmetric in the two.

    Raises ValueError when shapes differ, a value is not finite or a covariance is not symmetric
    or has a clearly negative eigenvalue.
    """
    mu1, cov1 = _checked(mu1, cov1, "first")
    mu2, cov2 = _checked(mu2, cov2, "second")
    if mu1.shape != mu2.shape:
        raise ValueError(
            f"frechet_distance compares features of one dimension: {mu1.shape[0]} and "
            f"{mu2.shape[0]}; use one feature network and layer for both sets."
        )
    overlap = np.linalg.svd(factor(cov1).T @ factor(cov2), compute_uv=False).sum()
    shift = mu1 - mu2
    return float(shift @ shift + np.trace(cov1) + np.trace(cov2) - 2.0 * overlap)


def moments_distance(a: Moments, b: Moments) -> float:
    """`frechet_distance` of two streamed sets; the covariances are divided by n - 1."""
    return frechet_distance(a.mean, a.cov, b.mean, b.cov)


def factor(cov: np.ndarray) -> np.ndarray:
    """A [D, r] with A A^T = cov, from the eigenvectors of the r eigenvalues that are not zero.

    An eigenvalue below D eps times the largest one is rounding error of `eigh`; its root would be a
    thousand times larger than it, and there may be a thousand of them, so they are left out.

    Raises ValueError when an eigenvalue is negative beyond rounding: `cov` is no covariance.
    """
    values, vectors = np.linalg.eigh(cov)
    least = len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    # Published statistics are often float32, whose rounding moves eigenvalues by this much.
    if values[0] < -1e-5 * max(values[-1], 0.0) - 1e-12:
        raise ValueError(
            f"the covariance has the eigenvalue {values[0]:.3g} beside a largest one of "
            f"{values[-1]:.3g}; it is not positive semi-definite, check the statistics."
        )
    kept = values > least
    return vectors[:, kept] * np.sqrt(values[kept])


def distance_to(reference: Moments):
    """moments -> the distance to `reference`, whose factor is computed once.

    For many sets against one reference (resampling): with A_2 fixed the trace is that of
    (A_2^T C_1 A_2)^(1/2), which needs one `eigvalsh` where `frechet_distance` needs an `eigh` and the
    singular values. Good to about 1e-8 of the traces, enough for the spread of a resample.
    """
    root, trace = factor(reference.cov), float(np.trace(reference.cov))

    def distance(moments: Moments) -> float:
        cov = moments.cov
        inner = np.linalg.eigvalsh(root.T @ cov @ root)
        shift = moments.mean - reference.mean
        overlap = np.sqrt(np.maximum(inner, 0.0)).sum()
        return float(shift @ shift + np.trace(cov) + trace - 2.0 * overlap)

    return distance


def frechet_influence(
    features, reference: Moments, batch: int = 4096, own: Moments | None = None
) -> np.ndarray:
    """How much each vector pulls the distance: the first-order (infinitesimal) jackknife.

        I(x) = 2 (mu_1 - mu_2)^T c + c^T (1 - T) c - const,  c = x - mu_1,
        T = A_2 (A_2^T C_1 A_2)^(-1/2) A_2^T,   C_2 = A_2 A_2^T

    is the derivative of d^2 in the weight of x (T is the optimal map from N_1 to N_2). Its mean is 0,
    and its standard deviation over sqrt(N) is the standard error of the distance, from a single
    evaluation where a bootstrap needs hundreds.

    Args:
      features: [N, D] floating, N > D.
      reference: the other set's moments.
      own: of the whole set, of which `features` are then a random part; by default they are all of it.

    Returns [N] float64. Raises ValueError when N <= D, where the derivative does not exist.
    """
    features = np.asarray(features)
    own = moments_of(features, batch) if own is None else own
    if own.n <= features.shape[1]:
        raise ValueError(
            f"frechet_influence needs more samples than the {features.shape[1]} dimensions, got "
            f"{own.n}; use the bootstrap instead."
        )
    root = factor(reference.cov)
    values, vectors = np.linalg.eigh(root.T @ own.cov @ root)
    side = root @ (vectors * np.maximum(values, values[-1] * 1e-12) ** -0.25)
    shift = 2.0 * (own.mean - reference.mean)
    pulls = []
    for start in range(0, len(features), batch):
        centred = features[start : start + batch].astype(np.float64) - own.mean
        squares = (centred**2).sum(axis=1) - ((centred @ side) ** 2).sum(axis=1)
        pulls.append(centred @ shift + squares)
    pulls = np.concatenate(pulls)
    return pulls - pulls.mean()


def frechet_infinity(
    features, reference: Moments, *, points: int = 15, smallest: int = 5000, seed: int = 0
) -> Extrapolation:
    """The distance extrapolated to infinitely many samples (Chong and Forsyth 2020, section 4).

    Distances of random subsets of `points` sizes, evenly spaced from `smallest` to N, are fitted by
    a line in 1/N; its value at 0 is the result. The reference keeps its own size and bias.

    Args:
      features: [N, D] floating, of the generated images.
      reference: the other set's moments.
      points: how many sizes, at least 2.
      smallest: the smallest subset; less than N and more than D: up to D samples have a singular
        covariance, whose distance is on another line.
      seed: of the subsets, one permutation per size.

    Raises ValueError when there are too few points or samples, or the smallest subset is too small.
    """
    features = np.asarray(features)
    if points < 2 or not 2 <= smallest < len(features):
        raise ValueError(
            f"frechet_infinity needs at least 2 points and a smallest subset below the "
            f"{len(features)} samples: got points={points}, smallest={smallest}."
        )
    if smallest <= features.shape[1]:
        raise ValueError(
            f"frechet_infinity: subsets of {smallest} samples have singular covariances in "
            f"{features.shape[1]} dimensions; use a smallest subset of more than "
            f"{features.shape[1]}, or more samples, or do not extrapolate."
        )
    sizes = np.linspace(smallest, len(features), points).astype(np.int64)
    rng, distance = np.random.default_rng(seed), distance_to(reference)
    distances = np.array(
        [distance(moments_of(features[rng.permutation(len(features))[:size]])) for size in sizes]
    )
    design = np.stack([np.ones(points), 1.0 / sizes], axis=1)
    (intercept, slope), *_ = np.linalg.lstsq(design, distances, rcond=None)
    residual = distances - design @ np.array([intercept, slope])
    return Extrapolation(
        float(intercept), float(slope), float(np.sqrt((residual**2).mean())), sizes, distances
    )


def _checked(mu, cov, which: str) -> tuple[np.ndarray, np.ndarray]:
    mu = np.atleast_1d(np.asarray(mu, np.float64))
    cov = np.atleast_2d(np.asarray(cov, np.float64))
    if mu.ndim != 1 or cov.shape != (mu.shape[0], mu.shape[0]):
        raise ValueError(
            f"frechet_distance takes a mean [D] and a covariance [D, D]: the {which} set has "
            f"{mu.shape} and {cov.shape}."
        )
    if not (np.isfinite(mu).all() and np.isfinite(cov).all()):
        raise ValueError(f"the {which} set's mean or covariance is not finite; remake it.")
    if not np.allclose(cov, cov.T, rtol=1e-4, atol=1e-5 * max(abs(np.trace(cov)), 1e-300)):
        raise ValueError(f"the {which} set's covariance is not symmetric; remake it.")
    return mu, (cov + cov.T) / 2
