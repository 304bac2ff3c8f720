"""One function, `op`, through which every convolution, dense layer and matrix product of a model goes.

`op` does the plain thing unless the `quant` collection holds a `SiteQuant` for its name: quantizers for
its operands, a packed tensor or a soft rounding instead of its kernel, a tap that reports operands, or
an operator that replaces it. Observing, simulating and executing are three contents of that
collection; a model file never changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import struct

from qdiff_jax.export.integer import integer_op
from qdiff_jax.export.qtensor import QTensor
from qdiff_jax.export.qtensor import dequantize as dequantize_tensor
from qdiff_jax.observe.taps import Tap, measure
from qdiff_jax.operators import Operator, plain
from qdiff_jax.quant.binary import BinaryWeight, binary_weight
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.quant.quantizer import fake_quant
from qdiff_jax.quant.rounding import SoftRounding, soft_weight
from qdiff_jax.quant.timed import TimeIndexed

# The two operands of each kind of operator, in the field's words.
OPERANDS = {
    "conv": ("input", "weight"),
    "dense": ("input", "weight"),
    "qk": ("q", "k"),
    "pv": ("softmax", "v"),
}


@struct.dataclass
class Replacement:
    """An operator in place of the plain one (low-rank branch, split, rotation, K-scale binary).

    `apply(arrays, operator, lhs, kernel, bias, site)` is a module-level function; it receives the
    site so that it can quantize with the site's own quantizers.
    """

    arrays: Any
    apply: Callable[..., jax.Array] = struct.field(pytree_node=False)


@struct.dataclass
class SiteQuant:
    """What the `quant` collection may hold for one site; every field is optional.

    lhs: quantizer of the input, of q, or of the softmax output (`QParams`, or `TimeIndexed` before
        `select`). rhs: for a weight, `QParams` (nearest rounding in the forward pass), `QTensor`
        (decided codes), `SoftRounding` (AdaRound's relaxation) or `BinaryWeight` (binarization being
        learned); for k and v, like lhs.
    tap: what to report of the operands into the `observed` collection.
    substitute: an operator in place of the plain one.
    bias: the bias [N] of a weight that was refitted to its codes, in place of the parameters' own.
    execute: with integers at hand (a `QTensor`, or two quantized activations), multiply those instead
        of simulating them.
    product: static; both operands are activations (qk, pv), so rhs quantizes k or v.
    """

    lhs: QParams | TimeIndexed | None = None
    rhs: QParams | TimeIndexed | QTensor | SoftRounding | BinaryWeight | None = None
    tap: Tap | None = None
    substitute: Replacement | None = None
    bias: jax.Array | None = None
    execute: bool = struct.field(pytree_node=False, default=False)
    product: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class SiteRecord:
    """Shapes of one site's operands, recorded under `jax.eval_shape` by `list_sites`."""

    lhs: Any
    rhs: Any
    operator: Operator = struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Site:
    """One place where operands may be quantized. `name` is `block/op`, as in the `quant` tree."""

    name: str
    operator: Operator
    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]

    @property
    def operands(self) -> tuple[str, str]:
        return OPERANDS[self.operator.kind]

    @property
    def has_weight(self) -> bool:
        return self.operands[1] == "weight"


def operand(quantizer: QParams | None, x: jax.Array) -> jax.Array:
    """An activation operand as its quantizer leaves it."""
    return x if quantizer is None else fake_quant(quantizer, x)


def side_of(operand: str) -> str:
    """The field of a `SiteQuant`, "lhs" or "rhs", that holds the quantizer of an operand's name."""
    return "lhs" if operand in ("input", "q", "softmax") else "rhs"


def kernel_of(rhs: Any, kernel: Callable[[], jax.Array]) -> jax.Array:
    """The weight a simulated forward pass multiplies with, from what the site holds for it."""
    if isinstance(rhs, QTensor):
        return dequantize_tensor(rhs)
    if isinstance(rhs, SoftRounding):
        return soft_weight(rhs)
    if isinstance(rhs, BinaryWeight):
        return binary_weight(rhs, kernel())
    return operand(rhs, kernel())


def check_selected(site: SiteQuant, where: str, has_weight: bool) -> None:
    """Raise ValueError for a step table still in the site, or for a weight that varies by sample."""
    if isinstance(site.lhs, TimeIndexed) or isinstance(site.rhs, TimeIndexed):
        raise ValueError(
            f"The quantizer of {where} is a step table: select its row with "
            "quant.timed.select(quant, ctx) before applying the model."
        )
    if has_weight and getattr(getattr(site.rhs, "qparams", site.rhs), "rows", False):
        # One weight per sample would turn every convolution into a grouped one.
        raise ValueError(
            f"The weight of {where} varies with the step and the batch mixes steps: give all samples "
            "one step (a scalar ctx), or move what varies into the activation and the output."
        )


def op(
    module,
    name: str,
    operator: Operator,
    lhs: jax.Array,
    rhs: jax.Array | Callable[[], jax.Array],
    bias: jax.Array | None = None,
) -> jax.Array:
    """Apply `operator` at the site `name` of a Linen `module`, as its `quant` collection says.

    lhs: activation. rhs: activation (qk, pv), or a function returning the kernel, so that a site
    holding packed codes needs no kernel in `params`. Returns the operator's output in lhs.dtype.
    """
    weight = rhs if callable(rhs) else None
    if module.is_mutable_collection("sites") and not module.is_initializing():
        other = weight() if weight is not None else rhs
        module.put_variable("sites", name, SiteRecord(lhs, other, operator))
    site = module.get_variable("quant", name) if module.has_variable("quant", name) else None
    if site is None:
        return plain(operator, lhs, weight() if weight is not None else rhs, bias)
    check_selected(site, "/".join((*module.path, name)), weight is not None)
    bias = bias if site.bias is None else site.bias.astype(lhs.dtype)
    if site.tap is not None:
        report = {OPERANDS[operator.kind][0]: measure(site.tap, lhs)}
        if weight is None:
            report[OPERANDS[operator.kind][1]] = measure(site.tap, rhs)
        module.put_variable("observed", name, report)
    if site.substitute is not None:
        other = weight if weight is not None else (lambda: rhs)
        return site.substitute.apply(site.substitute.arrays, operator, lhs, other, bias, site)
    if site.execute:
        other = None if weight is not None else rhs
        return integer_op(operator, lhs, site.lhs, site.rhs, bias, rhs=other).astype(lhs.dtype)
    if weight is not None:
        rhs = kernel_of(site.rhs, weight).astype(lhs.dtype)
    else:
        rhs = operand(site.rhs, rhs)
    return plain(operator, operand(site.lhs, lhs), rhs, bias)


def flatten_sites(tree: dict) -> dict[str, Any]:
    """A nested collection {block: {op: leaf}} as {"block/op": leaf}; leaves are any non-dict."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update({f"{key}/{rest}": leaf for rest, leaf in flatten_sites(value).items()})
        else:
            flat[key] = value
    return flat


def nest_sites(flat: dict[str, Any]) -> dict:
    """The inverse of `flatten_sites`."""
    tree: dict = {}
    for name, leaf in flat.items():
        *path, last = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def list_sites(module, *inputs) -> tuple[Site, ...]:
    """Every site of a model in order of execution, from shapes alone (nothing is computed).

    inputs: example arguments of the module's `__call__`, arrays or ShapeDtypeStructs.
    """
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)

    order: list[str] = []

    def record(variables, *inputs):
        records = module.apply(variables, *inputs, mutable=["sites"])[1]["sites"]
        order.extend(flatten_sites(records))  # insertion order, which a pytree would sort
        return records

    flat = flatten_sites(jax.eval_shape(record, {"params": variables["params"]}, *inputs))
    return tuple(
        Site(name, flat[name].operator, flat[name].lhs.shape, flat[name].rhs.shape)
        for name in order
    )
