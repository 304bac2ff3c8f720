"""TDQ in its quantization-aware form: the whole network learns with its step-size networks.

So et al. 2023, and a re-hosted copy of the official code: the loss is that of diffusion training; all
weights are trained under learned step sizes (LSQ, one per tensor, symmetric, gradient factor
1 / sqrt(levels * elements)), activations under s(t) of each sample's own t. AdamW in three groups:
weights and networks at the rate with decay, biases and weight steps at a tenth of it without.
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

from qdiff_jax.quant.lsq import gradient_factor, learned, positive
from qdiff_jax.quant.qparams import QParams, from_range
from qdiff_jax.quant.quantizer import fake_quant
from qdiff_jax.quant.spec import QuantSpec, code_range
from qdiff_jax.sites import SiteQuant, flatten_sites, nest_sites, side_of
from qdiff_jax.stages.reconstruct_time_scales import insert_rows, step_inputs
from qdiff_jax.stages.resume_settings import described
from qdiff_jax.stages.stage import (
    Model,
    QuantState,
    Stage,
    decide_codes,
    kernel_at,
    leaves_by_path,
    replace_leaves,
)
from qdiff_jax.stages.time_scales import with_time_scales
from qdiff_jax.stages.whole_network import Carry, train_whole

_WEIGHT = QuantSpec(symmetric=True, signed=True)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The paper's figures for CIFAR-10. lr rises over `warmup` steps and stays. per_tensor: weights with
    one symmetric step each, as published; False keeps the grids of the plan. dropout: of the step-size
    networks. save_seconds: least time between two saves."""

    steps: int = 200_000
    batch_size: int = 128
    lr: float = 2e-4
    warmup: int = 5_000
    weight_decay: float = 0.01
    per_tensor: bool = True
    dropout: float = 0.2
    save_seconds: float = 60.0

    def __post_init__(self):
        for name in ("steps", "lr", "warmup", "weight_decay", "save_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"TrainConfig.{name} is {getattr(self, name)}; it is a number, at least 0."
                )
        if self.batch_size < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"TrainConfig.batch_size is {self.batch_size} and dropout {self.dropout}; the one is at least "
                "1, the other in [0, 1)."
            )


def train_time_scales(
    model: Model, data: Any, timesteps: np.ndarray, config: TrainConfig, *, on_progress=None
) -> Stage:
    """The stage that trains everything, from the state that `calibrate_time_scales` left.

    data: x, t, y and the target eps_fp: `noising.noised_set` gives the paper's, a calibration set the
    full-precision prediction on sampling states, which needs no images. timesteps: [S], what tables are
    baked for. `finish` decides the codes of the trained weights; biases and every other parameter go to
    `aux["params"]`. Raises FloatingPointError if the loss is not finite.
    """
    size = int(np.shape(data.t)[0])

    def begin(state: QuantState):
        trainable, frozen = _split(model, state, config)
        return trainable, frozen, {name: getattr(data, name) for name in ("x", "t", "y", "eps_fp")}

    def inputs(state: QuantState, first: int, stop: int):
        rows, _, keys = step_inputs(config, state.key, size, 0, first, stop)
        ramp = np.minimum((np.arange(first, stop) + 1.0) / max(config.warmup, 1), 1.0)
        return rows, np.float32(config.lr * ramp), keys

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        window = max(1, config.steps // 20)
        parts = {"first_loss": carry.losses[:window], "last_loss": carry.losses[-window:]}
        report = {
            name: float(np.mean(part)) if len(carry.losses) else None
            for name, part in parts.items()
        }
        trained = jax.tree.map(jnp.asarray, jax.device_get(carry.work["trainable"]))
        state = decide_trained(carry.state, trained, carry.work["frozen"]["grids"])
        return _with_layers(state, trained, timesteps), report

    return train_whole(
        "train_time_scales",
        config.steps,
        begin,
        inputs,
        _make_step(model.module, config.dropout, config.weight_decay),
        finish,
        save_seconds=config.save_seconds,
        settings={
            "config": {k: v for k, v in dataclasses.asdict(config).items() if k != "save_seconds"},
            "data": described([data.x, data.t, data.y, data.eps_fp]),
        },
        on_progress=on_progress,
    )


def _split(model: Model, state: QuantState, config: TrainConfig) -> tuple[dict, dict]:
    """(trainable, frozen). Trainable: "kernels", "others" by path, "steps" by site, "layers" by name."""
    leaves = leaves_by_path(model.params)
    grids: dict[str, QParams] = {}
    flat = flatten_sites(state.quant)
    for entry in state.plan.quantized("weight"):
        kernel = kernel_at(model.params, entry.site)
        grid = flat[entry.site].rhs
        if config.per_tensor:
            qmin, qmax = code_range(_WEIGHT, entry.bits)
            top = float(jnp.max(jnp.abs(kernel)))
            grid = from_range(_WEIGHT, -top, top, qmin, qmax)
        if not isinstance(grid, QParams):
            raise ValueError(
                f"{entry.site} has no range to train from; run calibrate_weights first."
            )
        grids[entry.site] = grid
    kernels = {f"{name}/kernel" for name in grids}
    # A rotation has no gradient, and decay alone would make it none.
    resting = {*kernels, *(path for path in leaves if path.endswith("/rotation"))}
    scales = state.aux.get("time_scales", {})
    trainable = {
        "kernels": {path: leaf for path, leaf in leaves.items() if path in kernels},
        "others": {path: leaf for path, leaf in leaves.items() if path not in resting},
        "steps": {name: grid.scale for name, grid in grids.items()},
        "layers": {name: scale.layers for name, scale in scales.items()},
    }
    frozen = {"params": model.params, "grids": grids, "scales": dict(scales)}
    return trainable, frozen


def _variables(trainable: Mapping, frozen: Mapping, t: jax.Array, key, dropout: float) -> dict:
    """The network as the step sees it: fake-quantized kernels, every activation by its sample's t."""
    leaves = dict(trainable["others"])
    for name, grid in frozen["grids"].items():
        kernel = trainable["kernels"][f"{name}/kernel"]
        levels = grid.qmax - grid.qmin + 1.0
        factor = gradient_factor(kernel.size, levels)
        grid = learned(grid.replace(scale=trainable["steps"][name]), gradient_factor=factor)
        leaves[f"{name}/kernel"] = fake_quant(grid, kernel)
    # One flat "unit" of a single node holds all sites: "0:site:side".
    sites, keys = {}, {}
    for name in frozen["scales"]:
        site, _, operand = name.rpartition(":")
        sites[site] = SiteQuant(product=operand in ("q", "k", "softmax", "v"))
        keys[f"0:{site}:{side_of(operand)}"] = name
    scales = {k: frozen["scales"][name] for k, name in keys.items()}
    layers = {k: trainable["layers"][name] for k, name in keys.items()}
    (quant,) = insert_rows((nest_sites(sites),), scales, layers, t, key, dropout)
    return {"params": replace_leaves(frozen["params"], leaves), "quant": quant}


@functools.lru_cache(maxsize=16)
def _make_step(module, dropout: float, weight_decay: float):
    adam = optax.scale_by_adam()

    def objective(trainable, frozen, batch, key):
        variables = _variables(trainable, frozen, batch["t"], key, dropout)
        prediction = module.apply(variables, batch["x"], batch["t"], batch["y"])
        prediction = prediction[..., : batch["x"].shape[-1]]
        return jnp.mean((prediction - batch["eps_fp"]) ** 2)

    def step(carry, inputs):
        rows, lr, key_data = inputs
        batch = jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), carry["data"])
        key = jax.random.wrap_key_data(key_data)
        loss, gradients = jax.value_and_grad(objective)(
            carry["trainable"], carry["frozen"], batch, key
        )
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = adam.update(gradients, carry["optimizer"])

        def moved(kind, path, weight, update):
            if kind == "steps" or path.endswith("/bias"):
                return weight - 0.1 * lr * update
            return weight - lr * (update + weight_decay * weight)

        trainable = {}
        for kind, leaves in carry["trainable"].items():
            trainable[kind] = {
                path: jax.tree.map(functools.partial(moved, kind, path), leaf, updates[kind][path])
                for path, leaf in leaves.items()
            }
        return {**carry, "trainable": trainable, "optimizer": optimizer}, loss

    return step


def decide_trained(state: QuantState, trained: Mapping, grids: Mapping[str, QParams]) -> QuantState:
    """The state of trained weights: packed codes, and every other parameter in aux["params"].

    trained: "kernels" by path, "steps" (their scales) by site, "others" by path. grids: by site.
    """
    flat = flatten_sites(state.quant)
    for name, grid in grids.items():
        grid = jax.tree.map(jnp.asarray, grid).replace(scale=positive(trained["steps"][name]))
        flat[name] = flat.get(name, SiteQuant()).replace(rhs=grid)
    quant = decide_codes(nest_sites(flat), replace_leaves({}, trained["kernels"]))
    params = {**state.aux.get("params", {}), **trained["others"]}
    return state.replace(quant=quant, aux={**state.aux, "params": params})


def _with_layers(state: QuantState, trained: Mapping, timesteps) -> QuantState:
    """The state with the tables of the trained networks baked, if it has any."""
    scales = {
        name: dataclasses.replace(scale, layers=trained["layers"][name])
        for name, scale in state.aux.get("time_scales", {}).items()
    }
    return with_time_scales(state, scales, timesteps) if scales else state
