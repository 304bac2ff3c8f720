"""What closed-form rounding of a layer costs, and into how many parts its Hessian is cut to fit.

A layer with kernel [..., C, N] has rows of K = taps * C numbers. On its [K, K] Hessian H closed form needs the
sum over chunks, the sum of a chunk, H itself, its factor, and for an asymmetric target another factor, some of
them twice for a moment: `ARRAYS` matrices of float32. Sums over n rows take n K^2 multiply-adds, a Cholesky
factor and its triangular inverse K^3 / 6 + K^3 / 6 each, rounding K^2 N / 2. A 3x3 convolution with 2,560
channels has K = 23,040: 2.0 GiB a matrix and 4e12 multiply-adds for each pair of factors. Cut into its nine
taps, each a matrix of 2,560 rows, it takes a ninth of the memory and an 81st of the factors' time, and what
the inputs of different taps have in common is no longer made up for.
"""

from __future__ import annotations

import math
from typing import NamedTuple

ARRAYS = 8


class Cost(NamedTuple):
    """bytes: at once. multiply_adds: of sums, factors and rounding. parts: of the Hessian."""

    bytes: int
    multiply_adds: int
    parts: int


def rounding_cost(
    kernel_shape: tuple[int, ...], rows: int, parts: int = 1, factors: int = 2
) -> Cost:
    """The cost of rounding a kernel [..., C, N] from `rows` rows, its Hessian in `parts`.

    factors: 1 for GPTQ alone, 2 with an asymmetric target.
    """
    inputs, outputs = math.prod(kernel_shape[:-1]), kernel_shape[-1]
    part = inputs // parts
    sums = rows * (inputs * part + inputs * outputs)
    solved = parts * (factors * part**3 // 3 + part * part * outputs * (0.5 + 2 * (factors > 1)))
    return Cost(4 * ARRAYS * parts * part * part, int(sums + solved), parts)


def hessian_parts(kernel_shape: tuple[int, ...], limit_mib: int) -> int:
    """The least number of equal parts whose work fits into limit_mib: 1, the taps, or the taps times a
    divisor of the channels. Raises ValueError if not even single rows fit."""
    taps, channels = math.prod(kernel_shape[:-2]), kernel_shape[-2]
    divisors = (d for d in range(1, channels + 1) if channels % d == 0)
    for parts in (1, *(taps * d for d in divisors)):
        if rounding_cost(kernel_shape, 0, parts).bytes <= limit_mib << 20:
            return parts
    raise ValueError(
        f"a kernel {kernel_shape} cannot be rounded in closed form within {limit_mib} MiB; raise hessian_mib."
    )
