"""Integer execution: int8 codes multiplied into int32, scales and zero points applied after.

With x = s_x (q_x - z_x), w = s_w (q_w - z_w), and codes shifted to signed int8 (p = q - shift,
z' = z - shift), one output element is

    y = s_x s_w sum_k (p_x - z_x')(p_w - z_w') + bias
    sum_k (...) = sum p_x p_w - z_x' sum p_w - z_w' sum p_x + K z_x' z_w'

so no scale may vary along k inside one accumulation; scales per group of k cut the accumulation at
the group borders, scales per pixel of a convolution's input cut it at its taps, and the two parts of a
split operand are two products. The int32 accumulators
are exact: they equal the same sums in unbounded integers.

Convolutions become one product of shifted slices of the input (im2col), because integer
convolutions do not exist on GPU. The input is padded with the code of its zero point, which decodes
to exactly zero.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qdiff_jax.export.operands import (
    ACTIVATION_BITS,
    is_split,
    lift,
    operands,
    require_affine,
    split_operands,
)
from qdiff_jax.export.qtensor import QTensor, code_shift, dequantize
from qdiff_jax.operators import Operator, plain
from qdiff_jax.quant import quantizer
from qdiff_jax.quant.qparams import QParams


def integer_op(
    operator: Operator,
    lhs: jax.Array,
    lhs_qparams: QParams,
    rhs_quantizer: QTensor | QParams,
    bias: jax.Array | None = None,
    *,
    rhs: jax.Array | None = None,
) -> jax.Array:
    """Quantize the activations and apply `operator` in integers.

    Args:
      operator: conv, dense, qk or pv.
      lhs: activation, [B, H, W, K] (conv), [..., K] (dense), [B, N, K] (qk, pv).
      lhs_qparams: affine, at most 8 bits; per tensor, static or dynamic, per token (of a convolution:
        per pixel), rows of a step table, or groups or two parts of the contracted axis (conv and dense).
      rhs_quantizer: the packed weight (conv, dense) or the QParams of `rhs` (qk, pv).
      bias: [N] or None.
      rhs: k or v for qk and pv; None otherwise.

    Returns:
      float32, equal to `simulated_op` up to float32 rounding. NaN where numbers known only at run
      time forbid the integer path (codes beyond 8 bits, a zero point that is no code):
      `check_executable` says so in words beforehand. A NaN in lhs makes its sample NaN.

    Raises:
      ValueError: grids or granularities that no integer product can honour, shapes that do not
        fit, or a contraction so long that int32 could overflow.
    """
    if is_split(lhs_qparams, rhs_quantizer):
        pairs = split_operands(operator, lhs, lhs_qparams, rhs_quantizer)
        first, second = (_partial_output(operator, *pair) for pair in pairs)
        y = first + second
        return y if bias is None else y + lift(bias.astype(jnp.float32), y.ndim)
    stacked = operands(operator, lhs, lhs_qparams, rhs_quantizer, rhs)
    groups = stacked[0].codes.shape[0]
    if groups == 1:
        y = _partial_output(operator, *_group(stacked, 0))
    else:
        # A scan keeps one int32 partial alive; a product batched over groups keeps all of them.
        def add(total, group):
            return total + _partial_output(operator, *group), None

        output = jax.eval_shape(lambda s: _partial_output(operator, *_group(s, 0)), stacked)
        y, _ = lax.scan(add, jnp.zeros(output.shape, output.dtype), stacked)
    return y if bias is None else y + lift(bias.astype(jnp.float32), y.ndim)


def integer_accumulators(
    operator: Operator,
    lhs: jax.Array,
    lhs_qparams: QParams,
    rhs_quantizer: QTensor | QParams,
    *,
    rhs: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(accumulators, lhs scales, rhs scales): `integer_op` before any floating-point arithmetic.

    Arguments as for `integer_op`. The accumulators are int32 [G, ...output], G the groups of the
    contracted axis (1 without groups; taps times groups where the input has a scale for each pixel);
    the scales are float32 and broadcast against them. The output is
    sum_g accumulators[g] * lhs_scales[g] * rhs_scales[g], plus the bias. The two parts of a split
    product count as two groups.
    """
    if is_split(lhs_qparams, rhs_quantizer):
        pairs = split_operands(operator, lhs, lhs_qparams, rhs_quantizer)
        parts = [_accumulate(operator, *pair) for pair in pairs]
        scales = zip(*((left.scale, right.scale) for left, right in pairs), strict=True)
        return jnp.stack(parts), *(jnp.stack(side) for side in scales)
    stacked = operands(operator, lhs, lhs_qparams, rhs_quantizer, rhs)
    acc = lax.map(lambda group: _accumulate(operator, *group), stacked)
    return acc, stacked[0].scale, stacked[1].scale


def simulated_op(
    operator: Operator,
    lhs: jax.Array,
    lhs_qparams: QParams | None,
    rhs_quantizer: QTensor | QParams,
    bias: jax.Array | None = None,
    *,
    rhs: jax.Array | None = None,
) -> jax.Array:
    """The floating-point counterpart of `integer_op`: dequantized operands, the plain operator."""
    # Imported here because sites.py, where the plain operator lives, imports this file.

    x = lhs if lhs_qparams is None else quantizer.fake_quant(lhs_qparams, lhs)
    if isinstance(rhs_quantizer, QTensor):
        return plain(operator, x, dequantize(rhs_quantizer), bias)
    return plain(operator, x, quantizer.fake_quant(rhs_quantizer, rhs), bias)


def check_executable(tree: Any, where: str = "") -> None:
    """Raise unless the numbers of every QParams in `tree` allow the integer path. On the host.

    Args:
      tree: a QParams, a QTensor or a step table of them, or any pytree holding such.
      where: name of the site, for the message.

    Raises:
      ValueError: a grid that is not affine, codes that need more than 8 bits, or a zero point that
        is not itself a code (padding and the zero-point algebra need it to be one).
    """
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda n: isinstance(n, QParams))
    for path, node in nodes:
        if not isinstance(node, QParams):
            continue
        name = "/".join(
            filter(None, [where, jax.tree_util.keystr(path, simple=True, separator="/")])
        )
        if node.spec.grid != "binary":  # whose codes are signs
            require_affine(node, name)
        zero, qmin, qmax = (np.asarray(v) for v in (node.zero_point, node.qmin, node.qmax))
        shift = code_shift(node, ACTIVATION_BITS)
        if qmin.min() < shift - 128 or qmax.max() > shift + 127:
            raise ValueError(
                f"{name}: codes {qmin.min():g}..{qmax.max():g} need more than 8 bits; "
                "integer execution multiplies int8, so simulate this site instead"
            )
        if node.spec.dynamic:
            continue
        if np.any(zero != np.round(zero)) or zero.min() < qmin.min() or zero.max() > qmax.max():
            raise ValueError(
                f"{name}: zero points {zero.min():g}..{zero.max():g} are not codes of "
                f"{qmin.min():g}..{qmax.max():g}; round them and widen the range to contain 0"
            )


def lowered_int_dots(
    fn: Callable, *args: Any, platforms: Sequence[str] | None = None, compiled: bool = False
) -> int:
    """How many products of int8 matrices into int32 the program of `fn(*args)` has.

    A site in integers has one (two where its operands are split): the groups of a contraction are turns of a
    loop around it. Fewer than there are such sites means that some only pretend to.

    Args:
      fn: a function, jitted or not; args: arrays or ShapeDtypeStructs.
      platforms: "cpu", "tpu", "cuda", ...: lower for these, no such device needed; None: the
        present one.
      compiled: look at the optimized program of the present backend instead of the lowered one.

    Raises ValueError if both `platforms` and `compiled` are asked for.
    """
    fn = jax.jit(fn)
    if compiled:
        if platforms is not None:
            raise ValueError("compiled=True needs the device itself: leave platforms=None")
        text = fn.lower(*args).compile().as_text()
        # Library products (GPU) are custom calls whose target names the product.
        product = r"= \(?s32\[[^=]* (?:dot\(|custom-call\(.*(?:gemm|matmul))"
        return len(re.findall(product, text))
    if platforms is None:
        text = fn.lower(*args).as_text()
    else:
        text = jax.export.export(fn, platforms=tuple(platforms))(*args).mlir_module()
    return _called_products(text)


def lowered_has_int_dot(fn: Callable, *args: Any, **where: Any) -> bool:
    """Whether the program of `fn(*args)` has any such product; arguments as for `lowered_int_dots`."""
    return lowered_int_dots(fn, *args, **where) > 0


def _called_products(text: str) -> int:
    """Integer products of a lowered module, those of a function as often as it is called."""
    product = r"dot_general.*: \(tensor<[^>]*xi8>, tensor<[^>]*xi8>\) -> tensor<[^>]*xi32>"
    bodies = {}
    for part in re.split(r"\bfunc\.func\b", text)[1:]:
        name = re.match(r"[^@]*@([^\s(]+)", part).group(1)
        calls = re.findall(r"\bcall @([^\s(]+)\(", part)
        bodies[name] = (len(re.findall(product, part)), calls)

    @functools.cache
    def count(name):
        own, calls = bodies[name]
        return own + sum(count(called) for called in calls)

    return count("main")


def _accumulate(operator, left, right):
    """int32 accumulators of one group, zero points removed."""
    axis = left.codes.ndim - 1
    if operator.kind in ("qk", "pv"):
        other = axis if operator.kind == "qk" else axis - 1
        batch = tuple(range(axis - 1))
        dims = (((axis,), (other,)), (batch, batch))
        columns = jnp.sum(right.codes, other, dtype=jnp.int32)[..., None, :]
    else:
        dims = (((axis,), (0,)), ((), ()))
        columns = lift(jnp.sum(right.codes, 0, dtype=jnp.int32), axis + 1)
    acc = lax.dot_general(left.codes, right.codes, dims, preferred_element_type=jnp.int32)
    if left.zero is not None:
        acc = acc - left.zero * columns
    if right.zero is not None:
        rows = jnp.sum(left.codes, -1, keepdims=True, dtype=jnp.int32)
        if left.zero is not None:
            rows = rows - left.codes.shape[-1] * left.zero
        acc = acc - rows * right.zero
    return acc


def _partial_output(operator, left, right):
    return _accumulate(operator, left, right).astype(jnp.float32) * (left.scale * right.scale)


def _group(stacked, g):
    return jax.tree.map(lambda leaf: leaf[g], stacked)
