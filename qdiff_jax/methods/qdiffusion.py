"""Q-Diffusion: steps drawn evenly, skips split in two, BRECQ on weights, then learned activation steps.

Source: Li et al. 2023 (Q-Diffusion, arXiv:2302.04304), sections 3.2 and 3.3, and its official code: 20 x 256
states of the full-precision sampler, MSE ranges and block-wise AdaRound of weights on inputs from the
quantized network, activation ranges as a running mean (0.95) over shuffled batches of the same set,
5,000 steps of learned activation scales; q, k, v and the softmax output are quantized, the last at 8
bits. Use it with the policy "official:qdiffusion", the site table of its code.

`split="shortcut"` (default) is the official code: the 1x1 shortcut of every up block gets two ranges for
[h, skip], and nothing else, because the first convolution reads the maps after a joint group norm; "both" is a
variant of ours, which splits that convolution too; "none" is the ablation.

Departures from the official code, all deliberate: the regulariser and the soft targets cover both parts of
a split weight (there: the first part only); ranges of one sign contain zero; activation ranges never come
from a single step; what `methods.brecq` lists of reconstruction holds here too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qdiff_jax.methods.brecq import brecq, paper_activation_steps
from qdiff_jax.stages.calibrate import ActivationConfig
from qdiff_jax.stages.layer_rounding import ClosedFormConfig
from qdiff_jax.stages.reconstruct import ReconstructConfig
from qdiff_jax.stages.skip_split import split_skips
from qdiff_jax.stages.stage import Method, Model

_PAPER_STEPS = paper_activation_steps()


def qdiffusion(
    model: Model,
    calibration: Any,
    timesteps: Any,
    *,
    split: str = "shortcut",
    weight_method: str = "mse",
    weights: ReconstructConfig = ReconstructConfig(),
    activations: ActivationConfig = ActivationConfig(observer="ema", momentum=0.95),
    activation_steps: ReconstructConfig | None = _PAPER_STEPS,
    rounding: str = "adaround",
    closed_form: ClosedFormConfig = ClosedFormConfig(),
    step_weights: np.ndarray | None = None,
    rounds: int = 0,
    round_share: float = 0.25,
    on_progress=None,
) -> Method:
    """Split, ranges, block reconstruction, running-mean activation ranges, learned activation steps.

    calibration: one set for weights and activations, from the selector `uniform` (20 steps x 256). timesteps:
    [S], the sampler's schedule by step index. split: "shortcut", "both" or "none". activation_steps: None skips
    the last phase. rounding, closed_form, step_weights, rounds: as in `brecq`; the two parts of a split weight
    keep their own scales in closed form too.

    Raises ValueError for an unknown rounding or split.
    """
    base = brecq(
        model,
        calibration,
        calibration,
        timesteps,
        weight_method=weight_method,
        weights=weights,
        activations=activations,
        activation_steps=activation_steps,
        rounding=rounding,
        closed_form=closed_form,
        step_weights=step_weights,
        rounds=rounds,
        round_share=round_share,
        on_progress=on_progress,
    )
    stages = (split_skips(model, split), *base.stages)
    notes = ", ".join(filter(None, [f"split={split}", base.notes]))
    return Method("qdiffusion", stages, notes, base.again)
