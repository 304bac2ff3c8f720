"""PTQD: quantization noise split into what can be divided out and what the sampler's noise can absorb.

Source: He et al. 2023 (PTQD, arXiv:2305.10657) and its official code. It is added to a method that quantizes
(`base`): per step of the sampler, the error of the estimate is regressed on the full-precision estimate
over paired evaluations; the correlated part and the bias per channel are taken out of the estimate, and
the variance of the residual is taken out of the noise that a stochastic sampler adds (variance schedule
calibration). A deterministic sampler has no noise to calibrate: there only the estimate is corrected, and
the report and the bundle's notes say so. With `step_bits`, the bits of the activations follow the step.

Departures from the official code: `variant="fixed"` takes the bias of the residual and its variance over all
elements, "faithful" the bias of the raw error and the mean of per-sample deviations (on estimates with zero
mean the same to a per cent). The paper's base is BRECQ, with one range for each weight tensor
(`per_tensor`), 10,000 steps a unit at batch 8 and 5,000 of activation scales at batch 16. Kept: a negative
slope is not corrected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from qdiff_jax.observe.quantization_noise import VARIANTS, Paired
from qdiff_jax.policy import SitePlan
from qdiff_jax.stages.correct import correct_estimates
from qdiff_jax.stages.replan import replan
from qdiff_jax.stages.stage import Method, Model
from qdiff_jax.stages.step_bits import step_bits


@dataclasses.dataclass(frozen=True)
class PTQDConfig:
    """base: the method underneath, by name. variant: "fixed" or "faithful" statistics. slope, bias: False
    leaves that term of the correction out. calibrate_variance: lower the sampler's noise by the residual's.
    step_bits: candidate widths of activations by step, () for one width. per_tensor: one range for each
    weight tensor, in place of one for each output channel. batch_size: of the paired evaluations.

    Raises ValueError for another variant, widths outside 2..8, or a batch size below 1."""

    base: str = "rtn"
    variant: str = "fixed"
    slope: bool = True
    bias: bool = True
    calibrate_variance: bool = True
    step_bits: tuple[int, ...] = ()
    per_tensor: bool = False
    batch_size: int = 64

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"ptqd.variant {self.variant!r} is unknown; use one of {VARIANTS}.")
        if any(not 2 <= width <= 8 for width in self.step_bits):
            raise ValueError(f"ptqd.step_bits are {self.step_bits}; choose widths from 2 to 8.")
        if self.batch_size < 1:
            raise ValueError(f"ptqd.batch_size must be at least 1, got {self.batch_size}.")


def ptqd(
    model: Model,
    base: Method,
    source: Paired,
    config: PTQDConfig = PTQDConfig(),
    *,
    on_progress: Callable | None = None,
) -> Method:
    """(Optionally) weights per tensor, the base method's stages, (optionally) bits by step, the correction.

    source: full-precision trajectories under the sampler that will be used, its every step.
    """
    stages = list(base.stages)
    if config.per_tensor:
        stages.insert(0, replan("per_tensor_weights", lambda plan: (_one_range(plan), {})))
    if config.step_bits:
        stages.append(
            step_bits(
                model,
                source,
                config.step_bits,
                batch_size=config.batch_size,
                on_progress=on_progress,
            )
        )
    stages.append(
        correct_estimates(
            model,
            source,
            variant=config.variant,
            slope=config.slope,
            bias=config.bias,
            calibrate_variance=config.calibrate_variance,
            batch_size=config.batch_size,
            on_progress=on_progress,
        )
    )
    notes = [f"base={base.name}", f"variant={config.variant}", *filter(None, [base.notes])]
    if config.step_bits:
        notes.append(f"step_bits={','.join(map(str, config.step_bits))}")
    if config.per_tensor:
        notes.append("weights per tensor")
    notes += [f"without {word}" for word in ("slope", "bias") if not getattr(config, word)]
    if not config.calibrate_variance:
        notes.append("nominal noise")
    elif not (source.plan.rows["sigma"] > 0).any():
        notes.append(f"{source.plan.sampler.name} is deterministic: no variance to calibrate")
    return Method("ptqd", tuple(stages), notes="; ".join(notes))


def _one_range(plan: SitePlan) -> SitePlan:
    """The plan with every quantized weight on one grid of its kind for the whole tensor."""

    def changed(entry):
        if entry.operand != "weight" or entry.bits is None:
            return entry
        spec = dataclasses.replace(entry.spec, granularity="tensor", axis=-1)
        return dataclasses.replace(entry, spec=spec)

    return SitePlan(tuple(changed(entry) for entry in plan.entries))
