"""Kernel distance: squared maximum mean discrepancy with the cubic polynomial kernel.

    k(x, y) = (gamma x.y + c_0)^3,  gamma = 1/D,  c_0 = 1
    MMD^2_u = sum_{i!=j} k(x_i, x_j) / (m (m-1)) + sum_{i!=j} k(y_i, y_j) / (n (n-1))
              - 2 sum_{i,j} k(x_i, y_j) / (m n)

(Gretton et al. 2012, eq. 3; Binkowski et al. 2018, arXiv:1801.01401, section 4, where it is called KID
if the features are the pooled ones of the 2015 Inception network.) The estimate is unbiased at any
number of samples, and so a little negative for equal distributions. The published tools average it over
random subsets; the estimate over all pairs has less variance and is computed in blocks.

The three sums nearly cancel, which float32 products do not survive, hence float64 under jit.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qdiff_jax.runtime.mesh import replicate, shard_batch


class KernelDistance(NamedTuple):
    mean: float
    std: float  # over the subsets, divided by their number, as the tools print it
    values: np.ndarray  # [subsets] float64


def kernel_inception_distance(
    features1,
    features2,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
    tool: str = "torch-fidelity",
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    mesh: Mesh | None = None,
) -> KernelDistance:
    """The kernel distance as the tools report it: the mean over random subsets.

    Args:
      features1: [N, D] floating, of the generated images.
      features2: [M, D] floating, of the real ones.
      subsets, subset_size: how many subsets and of how many vectors from each set, drawn without
        replacement.
      seed: of the legacy generator that torch-fidelity draws them with (2020 is its default).
      tool: "torch-fidelity" draws the generated subset first and refuses sets smaller than a subset;
        "clean-fid" draws the real one first and shrinks the subset (it seeds nothing itself: to
        repeat one of its numbers, seed numpy there).
      degree, gamma, coef0: the kernel; gamma is 1/D by default.
      mesh: split the rows of the kernel's blocks over its devices.

    Raises ValueError when shapes differ, the tool is unknown or a set is too small.
    """
    features1, features2 = _checked(features1, features2)
    smaller = min(len(features1), len(features2))
    if tool == "clean-fid":
        subset_size = min(subset_size, smaller)
    elif tool != "torch-fidelity":
        raise ValueError(
            f"the kernel distance of tool {tool!r} is not known; use 'torch-fidelity' or 'clean-fid'."
        )
    if not 2 <= subset_size <= smaller or subsets < 1:
        raise ValueError(
            f"kernel distance: {subsets} subsets of {subset_size} cannot be drawn from sets of "
            f"{len(features1)} and {len(features2)}; lower subset_size or use more samples."
        )
    rng = np.random.RandomState(seed)
    values = np.zeros((subsets,), np.float64)
    for index in range(subsets):
        # The order of the two draws decides which vectors a seed picks.
        sets = (features1, features2) if tool == "torch-fidelity" else (features2, features1)
        one, two = (x[rng.choice(len(x), subset_size, replace=False)] for x in sets)
        kernel = _kernel(one, gamma, coef0, degree)
        values[index] = _mmd2(one, two, subset_size, kernel, mesh)
    return KernelDistance(float(values.mean()), float(values.std()), values)


def mmd2(
    features1,
    features2,
    *,
    block: int = 2048,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    mesh: Mesh | None = None,
) -> float:
    """The unbiased MMD^2 over all pairs of both sets, [block, block] kernel values at a time.

    Args: features1 [N, D], features2 [M, D] floating, N and M at least 2; the kernel and the mesh as above.

    Raises ValueError when shapes differ or a set is too small.
    """
    features1, features2 = _checked(features1, features2)
    return _mmd2(features1, features2, block, _kernel(features1, gamma, coef0, degree), mesh)


def kernel_influence(
    features1,
    features2,
    *,
    block: int = 2048,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """How much each generated vector pulls the MMD^2: [N] float64 of mean 0.

        I(x_i) = 2 (mean_{j != i} k(x_i, x_j) - mean_j k(x_i, y_j)) - const

    Its standard deviation over sqrt(N) is the first-order jackknife's standard error of `mmd2`. Arguments
    and errors as for `mmd2`.
    """
    x, y = _checked(features1, features2)
    kernel = _kernel(x, gamma, coef0, degree)
    within = _row_sums(x, x, kernel, block, mesh) - _diagonal(x, kernel)
    across = _row_sums(x, y, kernel, block, mesh)
    pulls = 2.0 * (within / (len(x) - 1) - across / len(y))
    return pulls - pulls.mean()


def _mmd2(x, y, block, kernel, mesh) -> float:
    within = _within(x, kernel, block, mesh) + _within(y, kernel, block, mesh)
    across = _row_sums(x, y, kernel, block, mesh).sum() / (len(x) * len(y))
    return float(within - 2.0 * across)


class _Kernel(NamedTuple):
    gamma: float
    coef0: float
    degree: int


def _kernel(x, gamma, coef0, degree) -> _Kernel:
    return _Kernel(1.0 / x.shape[1] if gamma is None else gamma, coef0, degree)


def _within(x, kernel: _Kernel, block: int, mesh: Mesh | None) -> float:
    total = (_row_sums(x, x, kernel, block, mesh) - _diagonal(x, kernel)).sum()
    return total / (len(x) * (len(x) - 1))


def _row_sums(x, y, kernel: _Kernel, block: int, mesh: Mesh | None) -> np.ndarray:
    """[N]: sum_j k(x_i, y_j). Blocks at the end are shorter, which compiles at most four shapes."""
    sums = np.zeros((len(x),), np.float64)
    with jax.enable_x64(True):
        columns = [np.asarray(y[j : j + block], np.float64) for j in range(0, len(y), block)]
        columns = [jnp.asarray(c) if mesh is None else replicate(c, mesh) for c in columns]
        for i in range(0, len(x), block):
            rows = np.asarray(x[i : i + block], np.float64)
            count = len(rows)
            if mesh is not None:
                rows = shard_batch(np.pad(rows, ((0, -count % mesh.size), (0, 0))), mesh)
            for part in columns:
                found = _block_rows(jnp.asarray(rows), part, *kernel)
                sums[i : i + block] += np.asarray(found)[:count]
    return sums


@partial(jax.jit, static_argnames="degree")
def _block_rows(x, y, gamma, coef0, degree: int):
    products = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum((gamma * products + coef0) ** degree, axis=1)


def _diagonal(x, kernel: _Kernel) -> np.ndarray:
    squares = np.einsum("nd,nd->n", x, x, dtype=np.float64)
    return (kernel.gamma * squares + kernel.coef0) ** kernel.degree


def _checked(features1, features2) -> tuple[np.ndarray, np.ndarray]:
    features1, features2 = np.asarray(features1), np.asarray(features2)
    shapes = features1.shape, features2.shape
    if features1.ndim != 2 or features2.ndim != 2 or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"kernel distance takes features [N, D] and [M, D], got {shapes}.")
    if min(shapes[0][0], shapes[1][0]) < 2:
        raise ValueError(f"kernel distance needs two vectors in each set, got {shapes}.")
    return features1, features2
