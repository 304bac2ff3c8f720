"""One layer, from moments to codes and bias, in one compiled function for each shape."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qdiff_jax.quant.gptq import (
    coordinate_descent,
    inverse_factor,
    kronecker_descent,
    ordered_factor,
    round_with_factor,
    rounding_order,
)
from qdiff_jax.quant.hessian_size import Limit, doubled
from qdiff_jax.quant.moments import (
    Moments,
    cross_moment,
    layer_loss,
    refit_bias,
    toward_target,
)
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.quant.quantizer import codes as nearest_codes
from qdiff_jax.quant.quantizer import dequantize

TARGETS = ("layer_fp_input", "layer_quantized_input", "layer_fp_output", "block_fp_output")

_NOT_NEGATIVE = (
    "damping",
    "ridge",
    "sweeps",
    "kronecker_sweeps",
    "kronecker_batch",
    "rows",
    "hessian_seconds",
    "memory_mib",
)
_POSITIVE = (
    "block",
    "check_samples",
    "hessian_mib",
    "multiply_adds_per_second",
    "walk_batch",
    "devices",
)


@dataclasses.dataclass(frozen=True)
class ClosedFormConfig:
    """How weights are rounded in closed form. The defaults are those that won on a small U-Net.

    target: what a layer's output is fitted to.
        "layer_fp_input": its own output on full-precision inputs (GPTQ with one pass over the data).
        "layer_quantized_input": its own output on the inputs it meets in the quantized network (GPTQ).
        "layer_fp_output": its output in full precision, from the inputs it meets (asymmetric).
        "block_fp_output": likewise, and the last layer of each branch is fitted to the sum behind it: the
            output of the unit, or the residual stream between two branches, so that it makes up for the
            stream it is added to, the shortcut and all layers before it (`unit_structure`).
    act_order, damping, block: of GPTQ. ridge: towards the original weights, for asymmetric targets.
    refit_bias: centre the moments and solve for the bias exactly. sweeps: of coordinate descent after
    GPTQ. kronecker_sweeps: of the descent that weighs outputs by the network's gradients (one backward
    pass over the set for all layers, kronecker_batch samples at once, 0 for walk_batch, or a half, a
    quarter, ... of them, so that it fits into memory_mib); 0 to do without.
    rows: at most so many rows of a layer's input matrix (0: all), taken from all samples.
    activations: the quantized stream carries the activation quantizers that the state holds.
    hessian_mib: of one layer's work on its Hessian. hessian_seconds: of its work after the sums (0: any),
        by multiply_adds_per_second, a rate that one core reaches. A layer that needs more of either gets a
        block-diagonal Hessian (`hessian_parts`) and goes only a share of the way to its target
        (`moments.toward_target`).
    check_samples: on how many samples a unit is compared with nearest rounding, whole batches of them. They
        are calibration samples like all others: the comparison finds a solution gone wrong, not one that
        holds on the calibration set only. A share held out would cost every layer that share of its rows.
    memory_mib: of the values of both streams, and of the backward pass for kronecker_sweeps. walk_batch:
        samples at once, and in a chunk of a sum; devices: over how many the chunks are dealt.

    Raises ValueError for an unknown target and for numbers below 0, or 0 where that means nothing.
    """

    target: str = "block_fp_output"
    act_order: bool = True
    damping: float = 0.01
    block: int = 128
    ridge: float = 0.05
    refit_bias: bool = True
    sweeps: int = 0
    kronecker_sweeps: int = 0
    kronecker_batch: int = 0
    rows: int = 24_576
    activations: bool = True
    check_samples: int = 64
    hessian_mib: int = 2048
    hessian_seconds: float = 0.0
    multiply_adds_per_second: float = 2e10
    walk_batch: int = 64
    memory_mib: int = 2048
    devices: int = 1

    def __post_init__(self):
        if self.target not in TARGETS:
            raise ValueError(f"ClosedFormConfig.target={self.target!r}: use one of {TARGETS}.")
        for field in _NOT_NEGATIVE:
            if not getattr(self, field) >= 0:
                raise ValueError(
                    f"ClosedFormConfig.{field}={getattr(self, field)} must not be negative."
                )
        for field in _POSITIVE:
            if not getattr(self, field) > 0:
                raise ValueError(
                    f"ClosedFormConfig.{field}={getattr(self, field)} must be positive."
                )

    @property
    def asymmetric(self) -> bool:
        return self.target in ("layer_fp_output", "block_fp_output")

    @property
    def hessian_limit(self) -> Limit:
        return Limit(self.hessian_mib, self.hessian_seconds * self.multiply_adds_per_second)


class LayerResult(NamedTuple):
    """codes, nearest: int32 of the kernel's shape. kernel, nearest_kernel: their values. bias: [N].
    loss, nearest_loss: mean |target - output|^2 over the rows. damping: NaN if H was not usable."""

    codes: jax.Array
    nearest: jax.Array
    kernel: jax.Array
    nearest_kernel: jax.Array
    bias: jax.Array
    loss: jax.Array
    nearest_loss: jax.Array
    damping: jax.Array


def check_descent(config: ClosedFormConfig, in_blocks: bool, where: str) -> None:
    """Raise ValueError if coordinate descent is asked for where there are only blocks of the Hessian."""
    if in_blocks and (config.sweeps or config.kronecker_sweeps):
        raise ValueError(
            f"coordinate descent needs the whole Hessian of {where}, and hessian_mib={config.hessian_mib} and "
            f"hessian_seconds={config.hessian_seconds:g} (0: any) have room for blocks of it only: raise them, "
            "or set sweeps and kronecker_sweeps to 0."
        )


def round_layer(
    kernel: jax.Array,
    bias: jax.Array,
    qparams: QParams,
    moments: Moments,
    config: ClosedFormConfig,
    output_factor: jax.Array | None = None,
) -> LayerResult:
    """Codes and bias of one layer from the moments of what it meets and of what it must put out.

    output_factor: [N, N], for `kronecker_sweeps`. Solved in float64 where JAX has it enabled on a CPU.
    Raises ValueError for a descent that lacks its factor or the whole Hessian, and a grid that is not
    affine and static.
    """
    check_descent(config, moments.spread.ndim == 3, f"a kernel {kernel.shape}")
    if config.kronecker_sweeps and output_factor is None:
        raise ValueError(
            f"kronecker_sweeps={config.kronecker_sweeps} needs the output factor of a kernel "
            f"{kernel.shape}: pass output_factor (`stages.output_factors`), or set it to 0."
        )
    centred, double = config.refit_bias, doubled()
    h, order, ridged, upper, used = _factors(
        moments.spread,
        moments.mean,
        moments.weight,
        config.damping,
        config.ridge,
        act_order=config.act_order,
        asymmetric=config.asymmetric,
        centred=centred,
        double=double,
    )
    return _round_layer(
        kernel,
        bias,
        qparams,
        moments,
        output_factor,
        h,
        order,
        ridged,
        upper,
        used,
        block=config.block,
        centred=centred,
        sweeps=config.sweeps,
        kronecker_sweeps=config.kronecker_sweeps,
    )


# Apart from the rest, which depends on the number of outputs too: most of what there is to compile.
@functools.partial(jax.jit, static_argnames=("act_order", "asymmetric", "centred", "double"))
def _factors(spread, mean, weight, damping, ridge, *, act_order, asymmetric, centred, double):
    """(H, order of rows, factor for the target or None, factor for the rounding, damping used)."""
    dtype = jnp.float64 if double else jnp.float32
    spread, mean, weight = (v.astype(dtype) for v in (spread, mean, weight))

    def one(part):
        spread, mean = part
        h = spread / weight if centred else spread / weight + mean[:, None] * mean[None, :]
        order = rounding_order(h, act_order)
        upper, used = ordered_factor(h, order, damping)
        if not asymmetric:
            return h, order, None, upper, used
        ridged, needed = inverse_factor(h, ridge)
        # NaN if either has failed; a target of NaN would be rounded to arbitrary codes.
        return h, order, ridged, upper, jnp.where(jnp.isnan(needed), needed, used)

    if spread.ndim == 2:
        return one((spread, mean))
    *factors, used = lax.map(one, (spread, mean.reshape(spread.shape[:2])))
    return *factors, jnp.max(used)  # NaN if one part has failed


@functools.partial(
    jax.jit,
    static_argnames=("block", "centred", "sweeps", "kronecker_sweeps"),
)
def _round_layer(
    kernel,
    bias,
    qparams,
    moments,
    output_factor,
    h,
    order,
    ridged,
    upper,
    used,
    *,
    block,
    centred,
    sweeps,
    kronecker_sweeps,
) -> LayerResult:
    moments = jax.tree.map(lambda leaf: leaf.astype(h.dtype), moments)
    target = kernel
    if ridged is not None:
        target = toward_target(kernel, ridged, cross_moment(moments, centred))
    codes = round_with_factor(target, order, upper, qparams, block=block)
    if sweeps:
        codes = coordinate_descent(codes, target, h, qparams, sweeps=sweeps)
    if kronecker_sweeps:
        codes = kronecker_descent(codes, target, h, output_factor, qparams, sweeps=kronecker_sweeps)
    values = dequantize(qparams, codes)
    nearest = nearest_codes(qparams, kernel)
    plain = dequantize(qparams, nearest)
    return LayerResult(
        codes,
        nearest,
        values,
        plain,
        refit_bias(bias, kernel, values, moments) if centred else bias,
        layer_loss(kernel, values, moments, centred=centred),
        layer_loss(kernel, plain, moments, centred=False),
        used,
    )
