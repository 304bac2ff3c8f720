"""PAR on another paper's rounding: the quantized sampler's states, the same decision on them, and again.

Source: TCAQ-DM (Huang et al. 2024), whose own reconstruction it repeats in `methods.tcaq`; `stages.progressive`
says how. What rounds bring is seen against (1 + share * rounds) times the steps without them, in the temporal
unit too (`temporal_steps`). Here it repeats that of the method before it in a recipe: of AdaRound with the
alphas that the round before has left, of the closed form anew. Ranges stay as the method has calibrated them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qdiff_jax.models.registry import predictor
from qdiff_jax.observe.quantization_noise import Paired
from qdiff_jax.stages.deferred import deferred
from qdiff_jax.stages.progressive import resample
from qdiff_jax.stages.stage import Method, Model, Stage


def par(
    model: Model,
    base: Method,
    source: Paired | None,
    calibration: Any,
    rounds: int,
    *,
    batch_size: int = 64,
    on_progress: Callable | None = None,
) -> Method:
    """`rounds` times: sample the network as it is, decide the weights again on its states.

    source: full-precision trajectories and the sampler. calibration: the set of the first decision, whose
    steps the later ones see too. Raises ValueError for a base that cannot decide its weights again, or without
    a source.
    """
    if base.again is None:
        raise ValueError(
            f"par repeats a reconstruction of weights, and {base.name!r} before it has none to repeat; put "
            "it behind brecq, qdiffusion, tfmq or closed_form, or behind svdquant in closed form."
        )
    if source is None:
        raise ValueError("par samples the quantized network: give CalibrationSets.paired.")
    steps = np.unique(calibration.index)
    stages: list[Stage] = []
    for i in range(1, rounds + 1):
        drawn = resample(
            model,
            predictor(model.module),
            source,
            steps,
            name=f"resample_{i}",
            batch_size=batch_size,
            on_progress=on_progress,
        )
        again = deferred(f"par_round_{i}", lambda state, i=i: base.again(state, i), "rounds")
        stages += [drawn, again]
    return Method("par", tuple(stages), notes=f"rounds={rounds}")
