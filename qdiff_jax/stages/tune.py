"""End-to-end tuning with codes fixed: weight scales, biases and norm affines of the whole network.

The codes stay what an earlier stage decided; what is trained are the numbers beside them, against the
full-precision prediction on the calibration set: Adam with a cosine rate, scales through their
logarithm, so that the rate is relative and a scale stays positive. A network that ends further from full
precision than it began is put back as it was, and the report says so.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from qdiff_jax.export.qtensor import QTensor
from qdiff_jax.export.qtensor import codes as codes_of
from qdiff_jax.observe.capture import batch_bounds, slice_rows
from qdiff_jax.quant.quantizer import dequantize
from qdiff_jax.quant.timed import StepContext, select
from qdiff_jax.sites import flatten_sites, nest_sites
from qdiff_jax.stages.stage import (
    Model,
    QuantState,
    Stage,
    fold_weights,
    leaves_by_path,
    replace_leaves,
    tuned_params,
)
from qdiff_jax.stages.whole_network import Carry, train_whole


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """steps, batch_size, lr: of Adam, cosine to 0. scales, biases, norms: what is trained (norms: scale
    and shift of normalisation layers). save_seconds: least time between two saves."""

    steps: int = 50
    batch_size: int = 32
    lr: float = 1e-3
    scales: bool = True
    biases: bool = True
    norms: bool = True
    save_seconds: float = 20.0

    def __post_init__(self):
        if not (self.scales or self.biases or self.norms):
            raise ValueError("TuneConfig trains nothing: set scales, biases or norms.")


def tune(
    model: Model, calibration: Any, config: TuneConfig = TuneConfig(), *, on_progress=None
) -> Stage:
    """The stage that tunes the numbers beside the codes of a state whose weights are all decided.

    calibration: x, t, index, branch, y, and eps_fp, the full-precision prediction. `finish` returns the
    state with new scales (in the `QTensor`s), biases (`SiteQuant.bias`) and norm affines
    (`aux["params"]`, which `stage.tuned_params` puts into parameters), and a report with the relative
    error before and after. Raises FloatingPointError if the loss is not finite.
    """
    size = int(np.shape(calibration.t)[0])
    batch_size = min(config.batch_size, size)

    def begin(state: QuantState):
        trainable, frozen = _split(model, state, config)
        names = ("x", "t", "index", "branch", "y", "eps_fp")
        return trainable, frozen, {name: getattr(calibration, name) for name in names}

    def inputs(state: QuantState, first: int, stop: int):
        return _step_inputs(config, state.key, size, batch_size, first, stop)

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        tuned = _joined(carry.state, jax.device_get(carry.work["trainable"]))
        before, after = (_error(model, s, calibration, batch_size) for s in (carry.state, tuned))
        report = {"before": before, "after": after, "kept": bool(after < before)}
        if not after < before:
            logging.warning(
                "tune: the prediction is %.3g from full precision after tuning and %.3g before; "
                "nothing is changed.",
                after,
                before,
            )
            return carry.state, report
        return tuned, report

    return train_whole(
        "tune",
        config.steps,
        begin,
        inputs,
        _make_step(model.module),
        finish,
        save_seconds=config.save_seconds,
        on_progress=on_progress,
    )


def _split(model: Model, state: QuantState, config: TuneConfig) -> tuple[dict, dict]:
    """(trainable, frozen): {"scale": log factor, "bias", "norm"} by name, and all that the steps read."""
    flat = flatten_sites(state.quant)
    held = {n: s for n, s in flat.items() if isinstance(s.rhs, QTensor)}
    params, activations = fold_weights(tuned_params(model.params, state.aux), state.quant)
    leaves = leaves_by_path(params)
    layers = {path.rpartition("/")[0] for path in leaves if path.endswith("/kernel")}
    trainable: dict[str, dict] = {}
    if config.scales:
        trainable["scale"] = {n: jnp.zeros_like(s.rhs.qparams.scale) for n, s in held.items()}
    if config.biases:
        trainable["bias"] = {n: leaves[f"{n}/bias"] for n in held if f"{n}/bias" in leaves}
    if config.norms:
        trainable["norm"] = {
            path: leaf
            for path, leaf in leaves.items()
            if leaf.ndim == 1 and path.rpartition("/")[0] not in layers
        }
    frozen = {
        "params": params,
        "quant": activations,
        "codes": {n: (codes_of(s.rhs), s.rhs.qparams) for n, s in held.items()},
    }
    return trainable, frozen


def _parameters(trainable: Mapping, frozen: Mapping) -> dict:
    """The network's parameters with what is trained in its place."""
    leaves = dict(trainable.get("norm", {}))
    leaves |= {f"{name}/bias": bias for name, bias in trainable.get("bias", {}).items()}
    for name, factor in trainable.get("scale", {}).items():
        codes, grid = frozen["codes"][name]
        leaves[f"{name}/kernel"] = dequantize(
            grid.replace(scale=grid.scale * jnp.exp(factor)), codes
        )
    return replace_leaves(frozen["params"], leaves)


def _joined(state: QuantState, trainable: Mapping) -> QuantState:
    flat = flatten_sites(state.quant)
    for name, factor in trainable.get("scale", {}).items():
        tensor = flat[name].rhs
        scale = jnp.asarray(tensor.qparams.scale) * jnp.exp(jnp.asarray(factor))
        tensor = tensor.replace(qparams=tensor.qparams.replace(scale=scale))
        flat[name] = flat[name].replace(rhs=tensor)
    for name, bias in trainable.get("bias", {}).items():
        flat[name] = flat[name].replace(bias=jnp.asarray(bias))
    norms = {path: jnp.asarray(leaf) for path, leaf in trainable.get("norm", {}).items()}
    aux = {**state.aux, "params": {**state.aux.get("params", {}), **norms}}
    return state.replace(quant=nest_sites(flat), aux=aux)


@functools.lru_cache(maxsize=16)
def _make_step(module):
    adam = optax.scale_by_adam()

    def objective(trainable, frozen, batch):
        ctx = StepContext(t=batch["t"], index=batch["index"], branch=batch["branch"])
        variables = {
            "params": _parameters(trainable, frozen),
            "quant": select(frozen["quant"], ctx),
        }
        error = module.apply(variables, batch["x"], batch["t"], batch["y"]) - batch["eps_fp"]
        return jnp.sum(error**2) / jnp.sum(batch["eps_fp"] ** 2)

    def step(carry, inputs):
        rows, lr = inputs
        batch = jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), carry["data"])
        loss, gradients = jax.value_and_grad(objective)(carry["trainable"], carry["frozen"], batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = adam.update(gradients, carry["optimizer"])
        trainable = jax.tree.map(lambda w, u: w - lr * u, carry["trainable"], updates)
        return {**carry, "trainable": trainable, "optimizer": optimizer}, loss

    return step


def _step_inputs(config, key, size, batch_size, start, stop):
    """(rows [n, batch], rates [n]): functions of the key and the step's number alone."""
    seed = np.asarray(jax.random.key_data(key)).astype(np.uint32).reshape(-1).tolist()
    rows = np.stack(
        [
            np.random.default_rng([*seed, step]).choice(size, batch_size, replace=False)
            for step in range(start, stop)
        ]
    )
    rates = config.lr * 0.5 * (1.0 + np.cos(np.pi * np.arange(start, stop) / config.steps))
    return rows.astype(np.int32), rates.astype(np.float32)


@functools.partial(jax.jit, static_argnames="module")
def _apply(module, params, quant, batch):
    ctx = StepContext(t=batch["t"], index=batch["index"], branch=batch["branch"])
    variables = {"params": params, "quant": select(quant, ctx)}
    return module.apply(variables, batch["x"], batch["t"], batch["y"])


def _error(model: Model, state: QuantState, calibration, batch_size: int) -> float:
    params, quant = fold_weights(tuned_params(model.params, state.aux), state.quant)
    wrong = whole = 0.0
    for start, stop in batch_bounds(len(calibration.t), batch_size):
        names = ("x", "t", "index", "branch", "y")
        batch = slice_rows({k: getattr(calibration, k) for k in names}, start, stop)
        target = np.asarray(calibration.eps_fp[start:stop], np.float64)
        made = np.asarray(_apply(model.module, params, quant, batch), np.float64)
        wrong += np.sum((made - target) ** 2)
        whole += np.sum(target**2)
    return float(wrong / whole)
