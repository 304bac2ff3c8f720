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

from qdiff_jax.branch import LowRank, low_rank
from qdiff_jax.models.program import Signature, apply_unit
from qdiff_jax.quant import quantizer
from qdiff_jax.quant.gptq import gptq
from qdiff_jax.quant.low_rank import SVD, Factors, alternate, balanced, decompose
from qdiff_jax.quant.qparams import QParams, dynamic_qparams, from_tensor
from qdiff_jax.quant.smoothing import smoothing_factors, weight_magnitude
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.sites import Replacement, SiteQuant, flatten_sites, nest_sites

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
            summed = rounded
            if not grids.stored_sums:
                branch = 0.0 if factors is None else factors.product.reshape(kernel.shape)
                summed = target - branch
            found = found - shift * jnp.einsum("tcm,c->m", summed, 1.0 / s)[None]
        return jnp.sqrt(jnp.sum(jnp.square(found - wanted)) / jnp.maximum(size, 1e-30))

    return target, error


def _one_shot(key, grids: Grids, codes: Codes, target):
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
        return error(*_one_shot(key, grids, codes, target))

    return lax.map(one, pairs)


@functools.partial(jax.jit, static_argnames=("signature", "grids", "node", "op"))
def block_errors(
    key,
    signature: Signature,
    grids: Grids,
    codes: Codes,
    node,
    op,
    params,
    inputs,
    magnitude,
    pairs,
):
    """[J]: as `candidate_errors`, of the outputs of the block around the layer, all else in full precision.

    node, op: where the layer is in the unit. params, inputs: of the unit. Not for shifted inputs.
    """
    empty = tuple({} for _ in signature.modules)
    wanted = apply_unit(signature, params, empty, inputs)
    kernel = flatten_sites(params[node])[f"{op}/kernel"]
    folded = kernel.reshape(-1, *kernel.shape[-2:])
    w = weight_magnitude(kernel)

    def one(pair):
        s = smoothing_factors(magnitude, w, pair[0], pair[1])
        factors, rounded = _one_shot(key, grids, codes, folded * s[None, :, None])
        quant = list(empty)
        arrays = LowRank(smoothing=1.0 / s)
        if factors is not None:
            down, up = _unsmoothed(factors, s, kernel.shape)
            arrays = arrays.replace(down=down, up=up)
        lhs = None
        if grids.activation is not None:
            lhs = dynamic_qparams(grids.activation, *codes.activation)
        quant[node] = nest_sites({op: SiteQuant(lhs=lhs, substitute=Replacement(arrays, low_rank))})
        flat = {**flatten_sites(params[node]), f"{op}/kernel": rounded.reshape(kernel.shape)}
        weights = (*params[:node], nest_sites(flat), *params[node + 1 :])
        found = apply_unit(signature, weights, tuple(quant), inputs)
        gaps = [jnp.sum(jnp.square(f - v)) for f, v in zip(found, wanted, strict=True)]
        return jnp.sqrt(sum(gaps) / sum(jnp.sum(jnp.square(v)) for v in wanted))

    return lax.map(one, pairs)


@functools.partial(jax.jit, static_argnames=("grids", "most"))
def fit(key, grids: Grids, codes: Codes, rows, kernel, magnitude, shift, pair, *, most: int):
    """(1 / s [C], L1 / s and L2 in float16 or None, R [T, C, N], its grid, errors [2], iterations) for the
    exponents `pair` [2]; R is what the branch as it is stored leaves of s W."""
    s = smoothing_factors(magnitude, weight_magnitude(kernel), pair[0], pair[1])
    target, error = _measure(grids, codes, rows, kernel, _times(rows, kernel), shift, s)
    plain = error(None, _rounded_kernel(grids, codes, target))
    down = up = None
    rest, first, iterations = target, jnp.full_like(plain, jnp.nan), jnp.int32(0)
    if grids.rank:

        def quantize(matrix):
            return _rounded_kernel(grids, codes, matrix.reshape(kernel.shape)).reshape(matrix.shape)

        matrix = target.reshape(-1, target.shape[-1])
        found = alternate(key, matrix, grids.rank, quantize, error, most=most, svd=grids.svd)
        down, up = _unsmoothed(found.factors, s, kernel.shape)
        stored = Factors(*(v.astype(jnp.float32).reshape(-1, v.shape[-1]) for v in (down, up)))
        rest = s[None, :, None] * (kernel - stored.product.reshape(kernel.shape))
        first, iterations = found.first, found.iterations
    grid = from_tensor(grids.weight, rest, *codes.weight)
    return 1.0 / s, down, up, rest, grid, jnp.stack([plain, first]), iterations


def _unsmoothed(factors: Factors, s, shape):
    """L1 / s as a kernel [.., C, r] and L2, balanced, in float16."""
    rank = factors.down.shape[-1]
    down = factors.down.reshape(-1, s.shape[0], rank) / s[None, :, None]
    made = balanced(Factors(down.reshape(-1, rank), factors.up))
    return made.down.reshape(*shape[:-1], rank).astype(jnp.float16), made.up.astype(jnp.float16)


@functools.partial(jax.jit, static_argnames="grids")
def second_moment(grids: Grids, codes: Codes, rows, shift, inverse):
    """H [K, K] of the inputs that the quantized product reads, rows ordered as a kernel HWIO flattens."""
    read = _rounded_rows(grids, codes, (rows + shift) * inverse[None, None, :])
    flat = read.reshape(read.shape[0], -1)
    return jnp.matmul(flat.T, flat, precision=_EXACT) / read.shape[0]


@functools.partial(jax.jit, static_argnames="grids")
def _outcome(grids: Grids, codes: Codes, rows, kernel, shift, inverse, down, up, qparams, integers):
    """(relative output error, [N] what a shift of 1 adds) of a layer as it is stored."""
    rounded = quantizer.dequantize(qparams, integers)
    s = 1.0 / inverse
    _, error = _measure(grids, codes, rows, kernel, _times(rows, kernel), shift, s)
    factors = None
    if down is not None:
        unfolded = down.astype(jnp.float32).reshape(-1, s.shape[0], down.shape[-1])
        smoothed = (unfolded * s[None, :, None]).reshape(-1, down.shape[-1])
        factors = Factors(smoothed, up.astype(jnp.float32))
    summed = rounded * inverse[None, :, None]
    if not grids.stored_sums:
        summed = kernel
        if factors is not None:
            summed = kernel - factors.product.reshape(kernel.shape) * inverse[None, :, None]
    return error(factors, rounded), jnp.sum(summed, axis=(0, 1))


@functools.partial(jax.jit, static_argnames="spec")
def _nearest(spec, leaves, rest):
    return quantizer.codes(QParams(*leaves, spec), rest)


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
    taps = jnp.reshape(jnp.asarray(kernel, jnp.float32), (-1, *shape[-2:]))
    problem = (codes, rows, taps)
    inverse, down, up, rest, grid, errors, iterations = fit(
        key, grids, *problem, magnitude, shift, pair, most=most
    )
    if use_gptq:
        moment = second_moment(grids, codes, rows, shift, inverse)
        integers = gptq(rest, moment, grid, act_order=True, damping=0.01, block=128).codes
    else:
        integers = _nearest(grid.spec, (grid.scale, grid.zero_point, grid.qmin, grid.qmax), rest)
    kept, sums = _outcome(grids, *problem, shift, inverse, down, up, grid, integers)
    down, up, inverse = (None if v is None else np.asarray(v) for v in (down, up, inverse))
    if down is not None:
        down = down.reshape(*shape[:-1], -1)
    errors = np.asarray([*np.asarray(errors), float(kept)], np.float32)
    return Solved(
        codes=np.asarray(integers).astype(np.int8).reshape(shape),
        scale=np.asarray(grid.scale),
        exponents=np.asarray(pair, np.float32),
        errors=errors,
        iterations=np.asarray(iterations),
        down=down,
        up=up,
        smoothing=inverse if np.any(inverse != 1.0) else None,
        sums=np.asarray(sums) if grids.shifted else None,
    )
