"""The images by which variants are compared: the same indices, noise and labels for every one.

`experiments.quantize` draws them for each variant and `experiments.sample` draws them again from a
bundle; both must come to the same bits.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qdiff_jax.diffusion.guidance import Guidance, classifier_free
from qdiff_jax.diffusion.hooks import IDENTITY, Hooks
from qdiff_jax.diffusion.sample import sample
from qdiff_jax.diffusion.samplers import LEARNED_RANGE, SamplerPlan
from qdiff_jax.models.registry import sampling_predictor

# Far from the indices of calibration trajectories, which count from 0.
FIRST_INDEX = 1_000_000
# Of the trajectories that errors are measured on: the same ones however many are calibrated on.
FIRST_HELD_OUT = FIRST_INDEX // 2


@dataclasses.dataclass(frozen=True)
class Samples:
    """What is stored of them. x: [N, H, W, C] float32."""

    x: np.ndarray


def labels(classes: int | None, indices: Sequence[int]) -> np.ndarray | None:
    """Every class in turn, by global sample index; None for an unconditional model."""
    return None if classes is None else np.asarray(indices, np.int32) % classes


def guidance_of(
    scale: float, null_class: int | None, channels: int | None = None
) -> Guidance | None:
    """Classifier-free guidance of a config's scale: negative for none (labels as they are).

    channels: as in `classifier_free`."""
    return classifier_free(None if scale < 0 else scale, null_class, channels=channels)


def noise_key(seed: int) -> jax.Array:
    """The key of all sampling noise of a run: trajectories and evaluation differ in their indices."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def draw_samples(
    module: Any,
    variables: Any,
    plan: SamplerPlan,
    *,
    seed: int,
    count: int,
    batch_size: int,
    shape: tuple[int, ...],
    classes: int | None,
    guidance_scale: float,
    guided_channels: int = 0,
    y: Any = None,
    null: Any = None,
    first: int = FIRST_INDEX,
    hooks: Hooks = IDENTITY,
    on_batch: Callable[[int], None] | None = None,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """x_0 of `count` samples, [count, *shape] float32: of global indices first, first + 1, ...

    shape: of what the network sees, of latents where there is a first stage.

    guided_channels: how many leading channels are guided, 0 for all of the noise estimate (DiT's code: 3).
    A learned variance is never guided.
    classes: number of classes, None for a model without labels; the null class is the module's own
    (`config.null_class`). y, null: conditions in place of labels and of the null class, a row of y for
    each sample (`models.pipeline`'s `conditions` and `null_condition`).
    hooks: of `methods.run.load_for_sampling`. mesh: as in `diffusion.sample.sample`.
    Raises ValueError for guidance of a model without a null class, and as `diffusion.sample.sample` does,
    above all for a step of the plan that the step tables of `variables["quant"]` were never calibrated for.
    """
    indices = range(first, first + count)
    predict = sampling_predictor(module, plan)
    learned = plan.sampler.name == LEARNED_RANGE
    channels = guided_channels or (shape[-1] if learned else None)
    return sample(
        predict,
        variables,
        plan,
        noise_key(seed),
        list(indices),
        shape=shape,
        y=labels(classes, indices) if y is None else y,
        guidance=guidance_of(
            guidance_scale, module.config.null_class if null is None else null, channels
        ),
        hooks=hooks,
        batch_size=batch_size,
        on_batch=on_batch,
        mesh=mesh,
    ).x
