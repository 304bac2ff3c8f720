"""One step of training with binary weights: loss, moments, averages, and which numbers rest."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qdiff_jax.models.program import Unit, apply_unit, subtrees
from qdiff_jax.observe.capture import run_unit
from qdiff_jax.runtime.remat import recomputed_unit
from qdiff_jax.stages.binary_student import student
from qdiff_jax.stages.feature_mimicking import mimicking_loss
from qdiff_jax.stages.noising import Noising, noised
from qdiff_jax.stages.stage import Model
from qdiff_jax.stages.whole_network import Carry

# Kinds of trainables, see `binary_student.split_student`. Before an operand is quantized, the numbers of its
# quantizer rest, decay and moments included: Adam would make whole steps of whatever small gradient they have.
NETWORK = ("kernels", "others")

QUANTIZERS = {
    "steps": ":weight",
    "second": ":weight",
    "activations": "",
}  # name + this: the operand


def batch_of(arrays: Mapping, rows, key: jax.Array, noising: Noising | None) -> dict:
    """{"x", "t", "y", "eps_fp"} of some rows."""
    taken = jax.tree.map(lambda leaf: jnp.take(jnp.asarray(leaf), rows, axis=0), dict(arrays))
    if noising is None:
        return taken
    return noised(key, noising, taken["images"], taken["labels"])


def _forward(unit: Unit, params: Mapping, quant: Mapping, batch: Mapping, remat: bool = False):
    given = tuple(batch[name] for name in unit.inputs)
    apply = recomputed_unit if remat else apply_unit
    return apply(unit.signature, subtrees(params, unit), subtrees(quant, unit), given)


@functools.lru_cache(maxsize=16)
def make_step(
    unit: Unit, noising: Noising | None, weight_decay: float, ema: float, remat: bool = False
):
    adam = optax.scale_by_adam()

    def objective(trainable, frozen, batch, step, gate):
        *made, prediction = _forward(unit, *student(trainable, frozen, step, gate), batch, remat)
        prediction = prediction[..., : batch["eps_fp"].shape[-1]].astype(jnp.float32)
        loss = jnp.mean((prediction - batch["eps_fp"]) ** 2)
        if trainable["second"]:
            loss = loss + frozen["weights"]["tau"] * gate * _mean_second(trainable["second"])
        if frozen["directions"]:
            empty: dict = {name: {} for name in unit.nodes}
            full = _forward(unit, frozen["params"], empty, batch)[:-1]
            followed = mimicking_loss(made, full, frozen["directions"])
            loss = loss + frozen["weights"]["lrm"] * followed
        return loss

    def moved(weights, slopes, before, lr):
        with jax.numpy_dtype_promotion("standard"):
            updates, after = adam.update(slopes, before)
        return jax.tree.map(lambda w, u: w - lr * (u + weight_decay * w), weights, updates), after

    def step(carry, inputs, fixed):
        number, rows, lr, key_data = inputs
        batch = batch_of(fixed["data"], rows, jax.random.wrap_key_data(key_data), noising)
        held = carry["optimizer"]
        loss, gradients = jax.value_and_grad(objective)(
            carry["trainable"], fixed, batch, number, held["gate"]["open"]
        )
        trainable, moments = {}, {}
        for kind, leaves in carry["trainable"].items():
            given = (gradients[kind], held["adam"][kind])
            if kind in NETWORK:
                trainable[kind], moments[kind] = moved(leaves, *given, lr)
                continue
            trainable[kind], moments[kind] = {}, {}
            for name, leaf in leaves.items():
                slope, before = (tree[name] for tree in given)
                start = fixed["starts"].get(name + QUANTIZERS[kind])
                made = moved(leaf, slope, before, lr)
                if start is not None:
                    made = _chosen(number >= start, made, (leaf, before))
                trainable[kind][name], moments[kind][name] = made
        n = number.astype(jnp.float32) - jnp.maximum(held["gate"]["at"], 0.0)
        decay = jnp.minimum(ema, (1.0 + n) / (10.0 + n))
        average = jax.tree.map(lambda old, new: new + decay * (old - new), held["ema"], trainable)
        held = {"adam": moments, "ema": average, "gate": held["gate"]}
        return {**carry, "trainable": trainable, "optimizer": held}, loss

    return step


def initial_moments(trainable: Mapping) -> dict:
    """Adam's state by kind; every number of a quantizer has a state, and so a count, of its own."""
    adam = optax.scale_by_adam()
    made = {kind: adam.init(trainable[kind]) for kind in NETWORK}
    own = {k: {n: adam.init(leaf) for n, leaf in trainable[k].items()} for k in QUANTIZERS}
    return {**made, **own}


def _chosen(begun: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(begun, a, b), new, old)


def _mean_second(second: Mapping[str, jax.Array]) -> jax.Array:
    """The mean over layers of the mean |sigma_II|; its gradient at 0 is 0, where `jnp.abs` has 1."""
    terms = [jnp.mean(s * jax.lax.stop_gradient(jnp.sign(s))) for s in second.values()]
    return sum(terms) / len(terms)


def prediction_error(
    unit: Unit, model: Model, carry: Carry, step: int, gate: float, batch
) -> float:
    """Mean squared difference of the prediction from the teacher's, as a share of the teacher's square."""
    given = tuple(batch[name] for name in unit.inputs)
    empty = tuple({} for _ in unit.nodes)
    full = run_unit(unit.signature, subtrees(model.params, unit), empty, given, None)[-1]
    frozen = {name: leaf for name, leaf in carry.fixed.items() if name != "data"}
    made = _predict(unit, carry.work["trainable"], frozen, np.int32(step), np.float32(gate), batch)
    channels = batch["eps_fp"].shape[-1]  # those of the objective
    made, full = (np.asarray(v, np.float64)[..., :channels] for v in (made, full))
    return float(np.sum((made - full) ** 2) / np.sum(full**2))


@functools.partial(jax.jit, static_argnames="unit")
def _predict(unit, trainable, frozen, step, gate, batch):
    return _forward(unit, *student(trainable, frozen, step, gate), batch)[-1]
