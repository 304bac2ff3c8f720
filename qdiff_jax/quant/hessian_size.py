"""What closed-form rounding of a layer costs, and into how many parts its Hessian is cut to fit.

A layer with kernel [..., C, N] has rows of K = taps * C numbers. Closed form holds `HELD` matrices [K, K]: the
sum over chunks, the Hessian H, its factor, and for an asymmetric target another factor. Factoring takes
`WORKING` more: H in order, with its damping, reversed, the identity, each factor twice for a moment. All are in
float32, or in float64 where JAX has it enabled on a CPU. Cutting H into parts makes the former smaller, and
the latter are those of one part at a time. It does nothing for what is as large as the kernel (`COLUMNS` arrays
[K, N]: weights, target, codes, the four numbers of a grid, the cross moment), nor for the rows of a chunk, nor
for the sums of other layers that share the pass over the data (one matrix each): those come on top of a limit.

In multiply-adds: sums over n rows n K (K + N); each factor K^3 / 6 for Cholesky and K^3 / 2 for its inverse,
which is solved against a dense identity; a target 2 K^2 N; rounding K^2 N + K b N in blocks of b rows; the
losses of codes and of nearest codes K^2 N each. A 3x3 convolution from 2,560 to 1,280 channels has K = 23,040:
2.0 GiB a matrix and 2e13 multiply-adds after the sums. Cut into its nine taps, each a matrix of 2,560 rows, it
takes a 22nd of the memory, an 81st of the time of the factors and a ninth of the rest, and what the inputs of
different taps have in common is no longer made up for.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax

HELD, WORKING, COLUMNS = 4, 8, 16


class Cost(NamedTuple):
    """bytes: of the matrices [K, K] (or of their parts) at once. column_bytes: of the arrays [K, N].
    sums, solved: multiply-adds of the pass over the rows, and of all that follows it. parts: of the
    Hessian."""

    bytes: int
    column_bytes: int
    sums: int
    solved: int
    parts: int

    @property
    def multiply_adds(self) -> int:
        return self.sums + self.solved


class Limit(NamedTuple):
    """Of one layer's Hessian: MiB, and multiply-adds after the sums (0: any number)."""

    mib: int = 2048
    multiply_adds: float = 0.0


def rounding_cost(
    kernel_shape: tuple[int, ...], rows: int, parts: int = 1, factors: int = 2, block: int = 128
) -> Cost:
    """The cost of rounding a kernel [..., C, N] from `rows` rows, its Hessian in `parts`.

    factors: 1 for GPTQ alone, 2 with an asymmetric target. block: rows between two updates.
    """
    inputs, outputs = math.prod(kernel_shape[:-1]), kernel_shape[-1]
    part = inputs // parts
    width = 8 if doubled() else 4
    sums = rows * inputs * (part + outputs)
    factor = part**3 // 6 + part**3 // 2
    columns = part * outputs * ((1 + 2 * (factors > 1) + 2) * part + min(block, part))
    return Cost(
        width * (HELD * parts + WORKING) * part * part,
        width * COLUMNS * inputs * outputs,
        sums,
        parts * (factors * factor + columns),
        parts,
    )


def doubled() -> bool:
    """Whether layers are solved in float64."""
    return bool(jax.config.jax_enable_x64) and jax.default_backend() == "cpu"


def hessian_parts(
    kernel_shape: tuple[int, ...], limit_mib: int, limit_multiply_adds: float = 0.0
) -> int:
    """The least number of equal parts whose work fits into both limits: 1, the taps, or the taps times a
    divisor of the channels. limit_multiply_adds: after the sums; 0 for any number.

    Raises ValueError if not even single rows fit.
    """
    taps, channels = math.prod(kernel_shape[:-2]), kernel_shape[-2]
    divisors = (d for d in range(1, channels + 1) if channels % d == 0)
    for parts in (1, *(taps * d for d in divisors)):
        cost = rounding_cost(kernel_shape, 0, parts)
        quick = not limit_multiply_adds or cost.solved <= limit_multiply_adds
        if quick and cost.bytes <= limit_mib << 20:
            return parts
    quick = f" and {limit_multiply_adds:.3g} multiply-adds" if limit_multiply_adds else ""
    raise ValueError(
        f"a kernel {kernel_shape} cannot be rounded in closed form within {limit_mib} MiB{quick}; raise "
        f"hessian_mib{' or hessian_seconds' if quick else ''}."
    )
