"""One layer of SVDQuant: which smoothing, which low-rank branch, which codes, by the error of an output.

Source: SVDQuant (Li et al. 2024, arXiv:2411.05007) and its official code. A layer is given as rows of its
input matrix [n, T, C] and its kernel [T, C, N], T the taps of a convolution and 1 for a dense layer; everything
that is compared is

    E = Q(x / s) Q(R) + x L1 L2 / s - x W

relative to x W, with the quantizers of the plan. Bits, magnitudes and exponents are data: one compile for each
shape of a layer.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qdiff_jax.quant import quantizer
from qdiff_jax.quant.gptq import gptq
from qdiff_jax.quant.low_rank import SVD, Factors, alternate, balanced, decompose
from qdiff_jax.quant.qparams import QParams, dynamic_qparams, from_tensor
from qdiff_jax.quant.smoothing import smoothing_factors, weight_magnitude
from qdiff_jax.quant.spec import QuantSpec

_EXACT = lax.Precision.HIGHEST


class Grids(NamedTuple):
    """Static: the specs of a layer's two quantizers, and how its branch is made. activation: dynamic, or None
    for full precision. rank: 0 for no branch. shifted: the input is shifted to be non-negative. stored_sums:
    the bias that makes up for the shift is summed from the weights as stored, not in full precision."""

    weight: QuantSpec
    activation: QuantSpec | None
    rank: int
    svd: SVD = SVD()
    shifted: bool = False
    stored_sums: bool = True


class Codes(NamedTuple):
    """Ends of the codes, scalars: data. activation: None for full precision."""

    weight: tuple
    activation: tuple | None


@dataclasses.dataclass(frozen=True)
class Solved:
    """A layer on the host. down, up, smoothing, codes, scale: of the operator `branch.low_rank` and its
    weight (None where not used). sums: [N], what a shift of 1 adds to the output. exponents: (alpha, beta).
    errors: relative, with the chosen smoothing: of plain codes, of a branch after one decomposition (NaN
    without one), and of what was kept, as it is stored. iterations: of the alternation."""

    codes: np.ndarray
    scale: np.ndarray
    exponents: np.ndarray
    errors: np.ndarray
    iterations: np.ndarray
    down: np.ndarray | None = None
    up: np.ndarray | None = None
    smoothing: np.ndarray | None = None
    sums: np.ndarray | None = None


def _times(x, w):
    """[n, N] from rows [n, T, C] and a kernel [T, C, N]."""
    return jnp.einsum("ntc,tcm->nm", x, w, precision=_EXACT)


def _rounded_rows(grids: Grids, codes: Codes, x):
    if grids.activation is None:
        return x
    return quantizer.fake_quant(dynamic_qparams(grids.activation, *codes.activation), x)


def _rounded_kernel(grids: Grids, codes: Codes, kernel):
    return quantizer.fake_quant(from_tensor(grids.weight, kernel, *codes.weight), kernel)


def _measure(grids: Grids, codes: Codes, rows, kernel, wanted, shift, s):
    """(s W [T, C, N], error(factors or None, Q(R) as a matrix or kernel) -> ()) for one smoothing s [C].

    wanted: x W [n, N], the same for every s.
    """
    target = kernel * s[None, :, None]
    flat = (rows / s[None, None, :]).reshape(rows.shape[0], -1)
    read = _rounded_rows(grids, codes, (rows + shift) / s[None, None, :])
    size = jnp.sum(jnp.square(wanted))

    def error(factors: Factors | None, rounded):
        rounded = rounded.reshape(kernel.shape)
        found = _times(read, rounded)
        if factors is not None:
            narrow = jnp.matmul(flat, factors.down, precision=_EXACT)
            found = found + jnp.matmul(narrow, factors.up, precision=_EXACT)
        if grids.shifted:
            rest = target
            if factors is not None and not grids.stored_sums:
                rest = rest - factors.product.reshape(kernel.shape)
            found = found - shift * _sums(grids, rest, rounded, s)[None]
        return jnp.sqrt(jnp.sum(jnp.square(found - wanted)) / jnp.maximum(size, 1e-30))

    return target, error


def one_shot(key, grids: Grids, codes: Codes, target):
    """(factors or None, Q(R) [T, C, N]) of one decomposition."""
    if not grids.rank:
        return None, _rounded_kernel(grids, codes, target)
    matrix = target.reshape(-1, target.shape[-1])
    factors = decompose(key, matrix, grids.rank, grids.svd)
    return factors, _rounded_kernel(grids, codes, target - factors.product.reshape(target.shape))


@functools.partial(jax.jit, static_argnames="grids")
def candidate_errors(key, grids: Grids, codes: Codes, rows, kernel, magnitude, shift, pairs):
    """[J]: the layer's output error under each pair (alpha, beta) [J, 2], with its branch (one decomposition)
    and both quantizers. rows [n, T, C]; kernel [T, C, N]; magnitude [C]; shift ()."""
    w, wanted = weight_magnitude(kernel), _times(rows, kernel)

    def one(pair):
        s = smoothing_factors(magnitude, w, pair[0], pair[1])
        target, error = _measure(grids, codes, rows, kernel, wanted, shift, s)
        return error(*one_shot(key, grids, codes, target))

    return lax.map(one, pairs)


class Fitted(NamedTuple):
    """inverse: 1 / s [C]. down, up: L1 / s and L2 in float16, None without a branch. rest: R [T, C, N], what
    the branch as it is stored leaves of s W, with its grid and its nearest codes. errors: relative, of plain
    codes, of one decomposition and of what is stored. sums: [N], what a shift of 1 adds."""

    inverse: jax.Array
    down: jax.Array | None
    up: jax.Array | None
    rest: jax.Array
    grid: QParams
    codes: jax.Array
    errors: jax.Array
    iterations: jax.Array
    sums: jax.Array


@functools.partial(jax.jit, static_argnames=("grids", "most"))
def fit(
    key, grids: Grids, codes: Codes, rows, kernel, magnitude, shift, pair, *, most: int
) -> Fitted:
    """The layer with the exponents `pair` [2] and nearest codes; arguments as for `candidate_errors`."""
    s = smoothing_factors(magnitude, weight_magnitude(kernel), pair[0], pair[1])
    target, error = _measure(grids, codes, rows, kernel, _times(rows, kernel), shift, s)
    plain = error(None, _rounded_kernel(grids, codes, target))
    down = up = stored = None
    rest, first, iterations = target, jnp.full_like(plain, jnp.nan), jnp.int32(0)
    if grids.rank:

        def quantize(matrix):
            return _rounded_kernel(grids, codes, matrix.reshape(kernel.shape)).reshape(matrix.shape)

        matrix = target.reshape(-1, target.shape[-1])
        found = alternate(key, matrix, grids.rank, quantize, error, most=most, svd=grids.svd)
        down, up = unsmoothed(found.factors, s, kernel.shape)
        stored = _smoothed(down, up, s)
        rest = target - stored.product.reshape(kernel.shape)
        first, iterations = found.first, found.iterations
    grid = from_tensor(grids.weight, rest, *codes.weight)
    integers = quantizer.codes(grid, rest)
    rounded = quantizer.dequantize(grid, integers)
    errors = jnp.stack([plain, first, error(stored, rounded)])
    sums = _sums(grids, rest, rounded, s)
    return Fitted(1.0 / s, down, up, rest, grid, integers, errors, iterations, sums)


@functools.partial(jax.jit, static_argnames="grids")
def _figures(grids: Grids, codes: Codes, rows, kernel, shift, fitted: Fitted):
    """(error, sums) of a fitted layer with other codes."""
    s = 1.0 / fitted.inverse
    _, error = _measure(grids, codes, rows, kernel, _times(rows, kernel), shift, s)
    stored = None if fitted.down is None else _smoothed(fitted.down, fitted.up, s)
    rounded = quantizer.dequantize(fitted.grid, fitted.codes)
    return error(stored, rounded), _sums(grids, fitted.rest, rounded, s)


def _sums(grids: Grids, rest, rounded, s):
    """[N]: what the quantized product adds to the output for a shift of 1 of the layer's input."""
    return jnp.einsum("tcm,c->m", rounded if grids.stored_sums else rest, 1.0 / s)


def unsmoothed(factors: Factors, s, shape):
    """L1 / s as a kernel [.., C, r] and L2, balanced, in float16."""
    rank = factors.down.shape[-1]
    down = factors.down.reshape(-1, s.shape[0], rank) / s[None, :, None]
    made = balanced(Factors(down.reshape(-1, rank), factors.up))
    return made.down.reshape(*shape[:-1], rank).astype(jnp.float16), made.up.astype(jnp.float16)


def _smoothed(down, up, s) -> Factors:
    """The factors of s W that are stored as L1 / s and L2."""
    rank = down.shape[-1]
    down = down.astype(jnp.float32).reshape(-1, s.shape[0], rank) * s[None, :, None]
    return Factors(down.reshape(-1, rank), up.astype(jnp.float32))


@functools.partial(jax.jit, static_argnames="grids")
def second_moment(grids: Grids, codes: Codes, rows, shift, inverse):
    """H [K, K] of the inputs that the quantized product reads, rows ordered as a kernel HWIO flattens."""
    read = _rounded_rows(grids, codes, (rows + shift) * inverse[None, None, :])
    flat = read.reshape(read.shape[0], -1)
    return jnp.matmul(flat.T, flat, precision=_EXACT) / read.shape[0]


def solve(
    key,
    grids: Grids,
    codes: Codes,
    rows,
    kernel,
    magnitude,
    shift,
    pair,
    *,
    most: int = 100,
    use_gptq: bool = False,
) -> Solved:
    """The layer with the exponents `pair`, from its rows to its codes.

    rows: [n, T, C]. kernel: [..., C, N], HWIO or [in, out]; `Solved.codes` has its shape. magnitude: [C], the
    largest |x + shift|. most: iterations of the alternation. use_gptq: codes of R by GPTQ on its inputs
    (damping 0.01, blocks of 128, rows of large moment first) instead of the nearest.
    """
    shape = np.shape(kernel)
    taps = np.reshape(np.asarray(kernel, np.float32), (-1, *shape[-2:]))
    made = fit(key, grids, codes, rows, taps, magnitude, shift, pair, most=most)
    if use_gptq:
        moment = second_moment(grids, codes, rows, shift, made.inverse)
        integers = gptq(made.rest, moment, made.grid, act_order=True, damping=0.01, block=128).codes
        made = made._replace(codes=integers)
        error, sums = _figures(grids, codes, rows, taps, shift, made)
        made = made._replace(errors=made.errors.at[2].set(error), sums=sums)
    made = jax.device_get(made)
    return Solved(
        codes=made.codes.astype(np.int8).reshape(shape),
        scale=made.grid.scale,
        exponents=np.asarray(pair, np.float32),
        errors=made.errors,
        iterations=made.iterations,
        down=None if made.down is None else made.down.reshape(*shape[:-1], -1),
        up=made.up,
        smoothing=made.inverse if np.any(made.inverse != 1.0) else None,
        sums=made.sums if grids.shifted else None,
    )
