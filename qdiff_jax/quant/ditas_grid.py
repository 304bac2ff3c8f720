"""The weight grid of DiTAS' code: what its "32 groups" are.

The code (DZY122/DiTAS; Dong et al. 2024) views the weight [out, in] as [32, -1] and takes the range over
the first axis: a cell is 32 weights of ONE input channel, at outputs n, n + N/32, n + 2 N/32, ... It follows
that

  - Q(diag(s) W) = diag(s) Q(W): smoothing costs the weight nothing, which is where most of the gain is;
  - a scale and a zero point of 16 bits for 32 weights of 4 are 5 bits per weight;
  - the scale varies along the contraction, which no integer product can honour.

Groups of 32 along the input channels (`QuantSpec(granularity="group", axis=-2, group=32)`) give nearly the
same error and can be executed; this grid is for reproducing the published figures.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from qdiff_jax.quant.qparams import SCALE_FLOOR, QParams
from qdiff_jax.quant.spec import QuantSpec

# Its leaves lie beside every weight ("cell"): integer execution refuses it, simulation does not.
GRID = QuantSpec(granularity="cell")


def ditas_qparams(kernel, bits: int = 4, cells: int = 32, *, faithful: bool = True) -> QParams:
    """The range of every cell of a kernel [K, N]: `cells` weights of one input channel share a scale.

    faithful: as the code, scale = (hi - lo) / 2^b, whose topmost code is missing, so that the largest
    weight of a cell is clipped by up to one step; otherwise (hi - lo) / (2^b - 1). Zero is on the grid only
    if the cell's range holds it. Codes 0 .. 2^b - 1. Raises ValueError unless `cells` divides N.
    """
    kernel = np.asarray(kernel, np.float32)
    if kernel.ndim != 2 or kernel.shape[1] % cells:
        raise ValueError(
            f"cells of {cells} outputs do not divide a kernel of shape {kernel.shape}, which must be [K, N]."
        )
    # Neighbours in a cell are N / cells outputs apart.
    view = kernel.reshape(len(kernel), cells, -1)
    lo, hi = view.min(axis=1), view.max(axis=1)
    levels = 2**bits - (0 if faithful else 1)
    scale = np.maximum((hi - lo) / np.float32(levels), np.float32(SCALE_FLOOR))
    zero = -np.round(lo / scale)
    scale, zero = (jnp.asarray(np.tile(leaf, (1, cells))) for leaf in (scale, zero))
    return QParams(scale, zero, jnp.float32(0.0), jnp.float32(2**bits - 1), GRID)
