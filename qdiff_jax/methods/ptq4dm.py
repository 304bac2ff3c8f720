"""PTQ4DM: calibration at steps drawn from a normal distribution, and nothing but ranges.

Source: Shang et al. 2023 (PTQ4DM, arXiv:2211.15736) and its official code: 1,024 states, one step of each
denoising trajectory drawn by NDTC (selector `ndtc`); symmetric weights per channel and activations per
tensor, both by the MSE observer, activation ranges averaged over batches with momentum 0.9; nearest
rounding. The sampler's own tensors in 8 bits are `diffusion.quantized_tensors`, switched on by the
sampler of a config (`sampler.tensor_bits`).

`selectors.random_steps` and `selectors.one_step` give the sets NDTC is compared with; the comparison is a
choice of the calibration set and touches nothing here. Departures from the official code: state and timestep
belong together (there they are mirrored in time, selector option `mirror_bug`); the rounding optimisation,
which its flags switch off, is not offered; the search reads a histogram of each batch (2,048 bins).
"""

from __future__ import annotations

from typing import Any

from qdiff_jax.stages.batch_ranges import BatchRangeConfig, calibrate_by_batch
from qdiff_jax.stages.replan import replan, symmetric_weights
from qdiff_jax.stages.stage import Method, Model
from qdiff_jax.stages.weights import calibrate_weights, round_to_nearest


def ptq4dm(
    model: Model,
    calibration: Any,
    *,
    weight_method: str = "mse2d",
    activations: BatchRangeConfig = BatchRangeConfig(),
    rounding: str = "nearest",
    on_progress=None,
) -> Method:
    """Symmetric weight grids, ranges by MSE, nearest codes, activation ranges averaged over batches.

    calibration: from the selector `ndtc` (or one it is compared with), 1,024 items in the paper.
    weight_method: "mse2d" is the paper's (100 widths). rounding: "nearest", the paper's.

    Raises ValueError for another rounding.
    """
    if rounding != "nearest":
        raise ValueError(
            f"ptq4dm rounds to the nearest code, not by {rounding!r}; use method 'brecq' on the same "
            "calibration set to learn the rounding."
        )
    return Method(
        "ptq4dm",
        (
            replan("symmetric_weights", lambda plan: (symmetric_weights(plan), {})),
            calibrate_weights(model, method=weight_method),
            round_to_nearest(model),
            calibrate_by_batch(model, calibration, activations, on_progress=on_progress),
        ),
    )
