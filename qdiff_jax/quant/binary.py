"""Binary weights: one basis, sigma * sign(w), and the two bases that BinaryDM starts its training from.

The decided form is a grid of its own: code 0 stands for -scale and code 1 for +scale, one bit each, with no
zero. (A uniform grid of one bit has its zero point between the codes, which no integer product can honour.)
Every sign here is +1 at 0, where `jnp.sign` and the official code have 0, and passes the gradient where
|w| <= 1 (the clipped identity of BinaryNet).

Source: Zheng et al. 2025, "BinaryDM: Accurate Weight Binarization for Efficient Diffusion Models",
section 3.2 (evolvable-basis binarizer) and the baseline of section 3.1. Its text writes the scale as a
norm over n with an index 2; the code, and XNOR-Net before it, take mean|w|, which is the least-squares scale
of a sign and is what is taken here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qdiff_jax.quant.qparams import SCALE_FLOOR, QParams
from qdiff_jax.quant.spec import QuantSpec, code_range


@jax.custom_jvp
def binary_sign(x: jax.Array) -> jax.Array:
    """+1 where x >= 0, -1 below, NaN where x is NaN. The gradient passes where |x| <= 1."""
    return jnp.where(x >= 0, 1.0, jnp.where(x < 0, -1.0, x)).astype(x.dtype)


@binary_sign.defjvp
def _binary_sign_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    return binary_sign(x), jnp.where(jnp.abs(x) <= 1, tangent, jnp.zeros_like(tangent))


def quantize(x: jax.Array) -> jax.Array:
    """Codes as floats, 0 or 1; with `dequantize` the gradient to x is scale * 1{|x| <= 1}."""
    return (binary_sign(x) + 1.0) * 0.5


def dequantize(q: jax.Array, scale: jax.Array) -> jax.Array:
    """(2 q - 1) * scale."""
    return (2.0 * q - 1.0) * scale


@struct.dataclass
class BinaryWeight:
    """A weight while its binarization is being learned: the fake form of a `quant` tree.

    w_hat = sigma_I sign(w) + gate * sigma_II sign(r), r = w - sigma_I sign(w); w itself where `on` is 0.

    Attributes:
      first: sigma_I, [N] float32, N the last axis of the weight, or ().
      second: sigma_II, of the same shape, or None for one basis.
      gate: () float32; 1 with both bases, 0 with the first alone. Data, as `on` is, so that a change of
        phase compiles nothing.
      on: () bool; whether the weight is binary yet.
    """

    first: jax.Array
    second: jax.Array | None
    gate: jax.Array
    on: jax.Array


def binary_weight(binary: BinaryWeight, kernel: jax.Array) -> jax.Array:
    """The weight that a simulated forward pass multiplies with, like kernel [.., N].

    Gradients by differentiation through both signs: to sigma_I sign(w) (1 - gate sigma_II 1{|r| <= 1}), to
    sigma_II gate sign(r), to w sigma_I 1{|w| <= 1} + gate sigma_II 1{|r| <= 1} (1 - sigma_I 1{|w| <= 1}).
    (Equation 7 of the paper prints sign(w) (1 - sigma_II sign(w)) for the first, which its code is not.)
    """
    w = kernel.astype(jnp.float32)

    def along(scale):
        return scale.reshape((1,) * (w.ndim - scale.ndim) + scale.shape)

    made = along(binary.first) * binary_sign(w)
    if binary.second is not None:
        made = made + binary.gate * (along(binary.second) * binary_sign(w - made))
    return jnp.where(binary.on, made, w).astype(kernel.dtype)


def single_basis(kernel, spec: QuantSpec) -> QParams:
    """The binary grid of a weight: scale = mean|w| of each output channel [N] (or of the tensor, ()).

    Computed on the host. Raises ValueError for a spec of another grid or values that are not finite.
    """
    if spec.grid != "binary":
        raise ValueError(f"single_basis makes the grid 'binary', not {spec.grid!r}.")
    scale = _mean_magnitude(kernel, spec)
    leaves = (scale, np.zeros_like(scale), *np.float32(code_range(spec, 1)))
    return QParams(*(jnp.asarray(leaf, jnp.float32) for leaf in leaves), spec)


def second_basis(kernel, qparams: QParams) -> jax.Array:
    """sigma_II at its start, shaped like qparams.scale: mean|w - sigma_I sign(w)| of each channel."""
    w, first = np.asarray(kernel, np.float32), np.asarray(qparams.scale)
    residual = w - first * np.where(w >= 0, np.float32(1), np.float32(-1))
    return jnp.asarray(_mean_magnitude(residual, qparams.spec))


def _mean_magnitude(x, spec: QuantSpec) -> np.ndarray:
    x = np.asarray(x, np.float32)
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError(
            f"a binary scale was asked of a tensor of shape {x.shape} that is empty or holds NaN or "
            "infinity; look for the layer that produced it."
        )
    columns = np.moveaxis(x, spec.axis, -1).reshape(-1, x.shape[spec.axis])
    columns = columns.reshape(-1, 1) if spec.granularity == "tensor" else columns
    mean = np.maximum(np.abs(columns).mean(axis=0, dtype=np.float64), SCALE_FLOOR)
    return mean.astype(np.float32).reshape(() if spec.granularity == "tensor" else (-1,))
