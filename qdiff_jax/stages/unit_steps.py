"""How one pass of reconstruction runs, and what each of its steps is given.

A step's minibatch, noise, rates and beta are functions of the state's key, the unit's position and the
step's number alone, so that a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from absl import logging

from qdiff_jax.models.program import Unit
from qdiff_jax.quant.rounding import beta_schedule
from qdiff_jax.stages.objective import StepInputs


@dataclasses.dataclass(frozen=True)
class ReconstructConfig:
    """How one pass of reconstruction runs. Defaults are BRECQ's for diffusion models.

    trains: "weights" (alpha), "scales" (static activation steps) or "both". inputs: "quantized",
    "full_precision" or "mixed" (each element quantized with probability input_prob). rounding_weight:
    lambda; off for the first `warmup` of the steps, then beta falls linearly over beta_range.
    lr, scale_lr: Adam rates of alpha and of activation scales. schedule: "constant" or "cosine" to 0
    (for lr; scale_lr is always cosine). save_seconds: least time between saves inside a unit.
    temporal_steps: steps of a unit that depends on the timestep and the label alone; such a unit is a few
    dense layers and hundreds of times cheaper than a block. 0 means `steps`, as in the papers.
    devices: over how many of jax.devices() a minibatch is split; it must divide batch_size.
    """

    steps: int = 20_000
    batch_size: int = 32
    lr: float = 1e-3
    scale_lr: float = 4e-4
    schedule: str = "constant"
    trains: str = "weights"
    inputs: str = "quantized"
    input_prob: float = 0.5
    p: float = 2.0
    rounding_weight: float = 0.01
    warmup: float = 0.2
    beta_range: tuple[float, float] = (20.0, 2.0)
    walk_batch: int = 64
    memory_mib: int = 2048
    save_seconds: float = 20.0
    devices: int = 1
    temporal_steps: int = 0

    def __post_init__(self):
        choices = {
            "trains": ("weights", "scales", "both"),
            "inputs": ("quantized", "full_precision", "mixed"),
            "schedule": ("constant", "cosine"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"ReconstructConfig.{field}={getattr(self, field)!r}: use one of {allowed}."
                )
        if self.batch_size % self.devices:
            raise ValueError(
                f"ReconstructConfig.batch_size={self.batch_size} cannot be split over "
                f"devices={self.devices}; choose a multiple."
            )
        if self.trains != "scales" and self.steps * self.lr < 2 and self.schedule == "constant":
            logging.warning(
                "reconstruction: %d steps at rate %g move alpha by at most %.2g, while a decision "
                "needs about 2; expect little change from nearest rounding.",
                self.steps,
                self.lr,
                self.steps * self.lr,
            )


def for_unit(config: ReconstructConfig, unit: Unit) -> ReconstructConfig:
    """The config with the number of steps that this unit gets."""
    temporal = set(unit.inputs) <= {"t", "y"}
    if not (temporal and config.temporal_steps):
        return config
    return dataclasses.replace(config, steps=config.temporal_steps)


def step_inputs(
    config: ReconstructConfig, key: jax.Array, samples: int, unit: int, start: int, stop: int
) -> StepInputs:
    """The inputs of steps start..stop-1 of a unit, host arrays with leading axis stop - start.

    key: of the state. samples: size of the calibration set, from which each minibatch is drawn
    (without replacement, if it is large enough). unit: position of the unit in the walk.
    """
    total, count = config.steps, stop - start
    steps = np.arange(start, stop)
    seed = np.asarray(jax.random.key_data(key)).astype(np.uint32).reshape(-1).tolist()
    rows = np.empty((count, config.batch_size), np.int32)
    keys = np.empty((count, 2), np.uint32)
    for i, step in enumerate(steps):
        generator = np.random.default_rng([*seed, unit, int(step)])
        rows[i] = generator.choice(samples, config.batch_size, replace=samples < config.batch_size)
        keys[i] = generator.integers(0, 2**32, 2, np.uint32)
    cosine = 0.5 * (1.0 + np.cos(np.pi * steps / total))
    decay = cosine if config.schedule == "cosine" else np.ones(count)
    active = steps >= config.warmup * total
    return StepInputs(
        rows=rows,
        lr=np.asarray(config.lr * decay, np.float32),
        scale_lr=np.asarray(config.scale_lr * cosine, np.float32),
        beta=_betas(total, *config.beta_range, config.warmup)[steps],
        rounding_weight=np.asarray(config.rounding_weight * active, np.float32),
        key_data=keys,
    )


# All steps at once: taken chunk by chunk, every length of chunk would compile its own operations.
@functools.lru_cache(maxsize=8)
def _betas(steps: int, start: float, end: float, warmup: float) -> np.ndarray:
    return np.asarray(beta_schedule(np.arange(steps), steps, start, end, warmup), np.float32)
