"""The loss of block reconstruction and one optimizer step of it, compiled once per unit signature.

L = L_rec + lambda * sum over the unit's weights of (1 - |2 h(alpha) - 1|^beta), with
L_rec = mean over batch and positions of the sum over channels of |y - y_hat|^p, summed over outputs.
Source: AdaRound (Nagel et al. 2020, eqs. 21-25) and BRECQ (Li et al. 2021, eq. 10) as run by the
diffusion forks. Bits, scales, weights, data, learning rates and schedules are arguments of the step,
so that one compile serves every block of the same shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qdiff_jax.models.program import Signature, apply_unit
from qdiff_jax.quant.lsq import positive
from qdiff_jax.quant.rounding import regulariser
from qdiff_jax.quant.timed import select
from qdiff_jax.sites import flatten_sites, nest_sites


class StepInputs(NamedTuple):
    """What changes from step to step: rows of the cached set, rates, schedule values, noise."""

    rows: Any  # [batch] int32
    lr: Any
    scale_lr: Any
    beta: Any
    rounding_weight: Any
    key_data: Any  # uint32 key data of this step


def lp_loss(y: jax.Array, target: jax.Array, p: float) -> jax.Array:
    """mean over all axes but the last of sum over the last of |y - target|^p.

    The channel is the last axis for images, tokens and vectors alike (the official code sums over
    axis 1, which for token tensors is the token axis; see the spec of BRECQ's objective).
    """
    return jnp.mean(jnp.sum(jnp.abs(y - target) ** p, axis=-1))


def sum_of_outputs(outputs, targets, p: float) -> jax.Array:
    """The default loss of a unit: lp_loss summed over its outputs with equal weights."""
    return sum(lp_loss(y, t, p) for y, t in zip(outputs, targets, strict=True))


def insert_trainables(trainable: Mapping, quant: tuple[Mapping, ...]) -> tuple[dict, ...]:
    """Put trainable leaves back into a unit's quant trees.

    trainable: {"alpha": {"<module>:<op>": array}, "scale": {"<module>:<op>:lhs|rhs": array}} with the
    module counted within the unit, so that no block name enters a compiled function.
    """
    flat = [flatten_sites(tree) for tree in quant]
    for key, alpha in trainable.get("alpha", {}).items():
        module, name = key.split(":")
        site = flat[int(module)][name]
        flat[int(module)][name] = site.replace(rhs=site.rhs.replace(alpha=alpha))
    for key, scale in trainable.get("scale", {}).items():
        module, name, side = key.split(":")
        site = flat[int(module)][name]
        # A step that crosses zero would flip every code: the official code leaves this unguarded.
        quantizer = getattr(site, side).replace(scale=positive(scale))
        flat[int(module)][name] = site.replace(**{side: quantizer})
    return tuple(nest_sites(tree) for tree in flat)


def mix_inputs(key, prob: float, quantized, full_precision):
    """QDrop's input mixing: elementwise the quantized stream with probability `prob`."""

    def mix(i, a, b):
        if a is None or not jnp.issubdtype(a.dtype, jnp.floating):
            return a
        chosen = jax.random.bernoulli(jax.random.fold_in(key, i), prob, a.shape)
        return jnp.where(chosen, a, b)

    return tuple(mix(i, a, b) for i, (a, b) in enumerate(zip(quantized, full_precision)))


@functools.lru_cache(maxsize=512)
def make_step(
    signature: Signature,
    p: float = 2.0,
    input_prob: float | None = None,
    loss: Callable = sum_of_outputs,
    mesh: Mesh | None = None,
):
    """The step function of a unit signature, always the same object for the same arguments.

    step(carry, inputs) -> (carry, (total, reconstruction)); carry is a dict with `frozen` (params,
    quant), `data` (inputs, optionally fp_inputs, targets, ctx), `trainable` and `optimizer`.
    Gradients are taken of `trainable` alone. With a mesh the minibatch is split over its devices (the
    cached set is on all of them, so taking rows needs no communication; one gradient sum does).
    """
    adam = optax.scale_by_adam()

    def objective(trainable, frozen, batch, inputs):
        params, quant = frozen
        quant = insert_trainables(trainable, select(quant, batch["ctx"]))
        x = batch["inputs"]
        if input_prob is not None:
            key = jax.random.wrap_key_data(inputs.key_data)
            x = mix_inputs(key, input_prob, x, batch["fp_inputs"])
        outputs = apply_unit(signature, params, quant, x)
        rec = loss(outputs, batch["targets"], p)
        reg = sum(
            (regulariser(a, inputs.beta) for a in trainable.get("alpha", {}).values()),
            jnp.zeros(()),
        )
        return rec + inputs.rounding_weight * reg, rec

    def step(carry, inputs):
        batch = jax.tree.map(lambda leaf: jnp.take(leaf, inputs.rows, axis=0), carry["data"])
        if mesh is not None:
            split = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
            batch = jax.lax.with_sharding_constraint(batch, split)
        value, gradients = jax.value_and_grad(objective, has_aux=True)(
            carry["trainable"], carry["frozen"], batch, inputs
        )
        # Adam's own constants need promotion, which a strict caller may have forbidden.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = adam.update(gradients, carry["optimizer"])
        rates = {"alpha": inputs.lr, "scale": inputs.scale_lr}
        trainable = {
            kind: jax.tree.map(lambda w, u, r=rates[kind]: w - r * u, leaves, updates[kind])
            for kind, leaves in carry["trainable"].items()
        }
        return {**carry, "trainable": trainable, "optimizer": optimizer}, value

    return step


@jax.jit
def initial_optimizer(trainable: Mapping):
    """Adam's state for the trainable leaves (b1 0.9, b2 0.999, eps 1e-8, as torch's default)."""
    return optax.scale_by_adam().init(trainable)
