"""Low-rank weight updates that merge: one factor in the layer's own shape, the other a 1x1 on top of it.

A weight W [*K, N] (kernel HWIO, or [in, out]) gets the update Delta = A B with A [*K[:-1], C, r] and
B [r, N]: for a convolution A is one itself, with the stride and padding of the layer, and B a 1x1
convolution after it, so that contracting r tap by tap is the same operator in one kernel. Source: LoRA
(Hu et al. 2022); EfficientDM (He et al. 2024), section 3.2, where Delta is added to W *before* rounding, so
that nothing but integers is left after training.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qdiff_jax.quant.lsq import positive
from qdiff_jax.quant.qparams import QParams, float16_scale, refuse_stored_format
from qdiff_jax.quant.quantizer import codes, fake_quant


@struct.dataclass
class Update:
    """a: [..., C, r] float32, b: [r, N] float32; the update is `product`."""

    a: jax.Array
    b: jax.Array


def init_low_rank(key: jax.Array, shape: tuple[int, ...], rank: int) -> Update:
    """A uniform within +-1/sqrt(fan_in), B = 0: an update that is zero to the last bit.

    shape: of the weight, [..., C, N]; fan_in is the product of all its axes but the last (Kaiming-uniform
    with a = sqrt(5), torch's default). Raises ValueError for a rank below 1 or a weight of one axis.
    """
    if rank < 1 or len(shape) < 2:
        raise ValueError(
            f"a low-rank update has rank at least 1 and a weight of two axes or more; got rank {rank} and "
            f"shape {shape}."
        )
    bound = 1.0 / math.sqrt(math.prod(shape[:-1]))
    # On the host: drawing for every shape of a network would compile a program for each.
    seed = np.asarray(jax.random.key_data(key)).astype(np.uint32).reshape(-1).tolist()
    a = np.random.default_rng(seed).uniform(-bound, bound, (*shape[:-1], rank))
    return Update(jnp.asarray(a, jnp.float32), jnp.zeros((rank, shape[-1]), jnp.float32))


def product(update: Update) -> jax.Array:
    """A B, [..., C, N]: exact, the contraction over r at each tap."""
    rank, columns = update.b.shape
    # In full precision on every device: what is trained and what is merged must round to the same codes.
    flat = jnp.dot(update.a.reshape(-1, rank), update.b, precision=jax.lax.Precision.HIGHEST)
    return flat.reshape(*update.a.shape[:-1], columns)


def merged_weight(base: jax.Array, update: Update, grid: QParams) -> jax.Array:
    """FQ(W0 + A B; scale, zero point): what the layer multiplies with, differentiable in all of it."""
    return fake_quant(trained_grid(grid), base + product(update))


def merged_codes(base: jax.Array, update: Update, grid: QParams) -> jax.Array:
    """The integer codes, int32, of `merged_weight`: nothing of the update is left beside them."""
    return codes(trained_grid(grid), base + product(update))


def trained_grid(grid: QParams) -> QParams:
    """A grid whose scale has been trained: kept positive, the zero point fixed.

    A scale that is stored as float16 is rounded to one, straight through.

    Raises ValueError for a scale that is stored in a format of 8 bits.
    """
    scale = positive(grid.scale)
    if grid.spec.scale_format == "f16":
        # scale - stop_gradient(scale) is exactly 0, so that the value is one of the format.
        held = jax.lax.stop_gradient(float16_scale(scale))
        scale = held + (scale - jax.lax.stop_gradient(scale))
    else:
        refuse_stored_format(grid.spec, "trained")
    return grid.replace(scale=scale, zero_point=jax.lax.stop_gradient(grid.zero_point))
