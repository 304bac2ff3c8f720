"""Where the 1 / s of a smoothed input goes: into the columns of the layer that makes this input.

Pure functions of the arrays of one layer, any floating dtype; factors are s [D], positive. The layer that
reads the input takes s in its rows (`reparameterise.scale_rows`). Divided columns are *chunks* of width D: of a
modulation's 6 D columns, of the 3 D columns of q, k and v. Divisions commute with rounding on a grid of its
own for each output column: the codes stay, the column's scale is divided.
Source: the equivalences of SmoothQuant (Xiao et al. 2023), for adaLN as in PTQ4DiT (Wu et al. 2024).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def divide_chunk(array: jax.Array, factors: jax.Array, chunk: int) -> jax.Array:
    """array [..., n D] with columns chunk D .. (chunk + 1) D - 1 divided by s [D], the others as they are.

    For the V columns of qkv (chunk 2): its kernel, its bias, and the output side L_2 [r, 3 D] of a low-rank
    branch beside it.
    """
    width = factors.shape[-1]
    if array.shape[-1] % width or not 0 <= chunk < array.shape[-1] // width:
        raise ValueError(
            f"chunk {chunk} of width {width} does not lie in the columns of an array {array.shape}."
        )
    parts = jnp.split(array, array.shape[-1] // width, axis=-1)
    parts[chunk] = parts[chunk] / factors.reshape((1,) * (array.ndim - 1) + (width,))
    return jnp.concatenate(parts, axis=-1)


def fold_modulation(
    kernel: jax.Array, bias: jax.Array, factors: jax.Array, shift: int, scale: int
) -> tuple[jax.Array, jax.Array]:
    """(kernel [K, n D], bias [n D]) of a modulation after which LN(x) (1 + gamma) + beta is divided by s.

    shift, scale: chunks of beta and gamma. With gamma = c A + a: A <- A / s, a <- (a + 1) / s - 1, because
    1 + gamma is what must be divided; beta's columns and bias are divided as they are.
    """
    kernel = divide_chunk(divide_chunk(kernel, factors, shift), factors, scale)
    parts = jnp.split(divide_chunk(bias, factors, shift), bias.shape[-1] // factors.shape[-1])
    parts[scale] = (parts[scale] + 1.0) / factors - 1.0
    return kernel, jnp.concatenate(parts)
