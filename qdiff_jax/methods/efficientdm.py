"""EfficientDM: low-rank updates rounded together with the weights, distilled along the teacher's sampling.

Source: He et al. 2024 (ICLR, arXiv:2310.03270) and its code. Naive ranges (weights min-max per channel,
activations by MSE), then one phase of 16,000 AdamW steps, one for each step of full-precision trajectories
(DDIM, 100 steps, eta 1, two samples): updates of rank 32 at mean(delta_w) / 2500 of each layer, delta_w at
1e-6, scale and zero point of every activation and sampling step (TALSQ) at 5e-4, all falling linearly to 0.
The updates are merged into the integers at the end. Departures (`variant="faithful"` undoes the first two):

- delta_w is one parameter and W0 keeps the scale it was made with; in the code both uses alias one storage,
  and each updates it.
- Zero points are rounded in training, straight through; the code trains floats, which have no integers.
- A zero point that leaves the codes is moved back to their nearest end after every step (in both variants):
  beyond them 0 has no code. The code lets it go.
- Who is quantized follows the policy. The code keeps shortcuts, downsampling and attention products in full
  precision and the ends and the time embedding at 8 bits (`official:efficientdm`); under `common` the first
  three, and the time embedding at the target bits, are quantized and trained like all others.
- Time embedding, first and last layer get neither update nor table, as in the code, but only where they are at
  8 bits: under a policy that gives them the target bits they are trained like all others.
- Moments are kept by sampling step, which the code has commented out: without it Adam would move steps that
  nobody visits.
- Tables on a schedule that is no every-n-th step of the trained one are interpolated over t.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qdiff_jax.models.families import example_inputs
from qdiff_jax.named_policies import embedding_and_ends
from qdiff_jax.observe.quantization_noise import Paired
from qdiff_jax.observe.sources import Sampling, SourceConfig, make_source
from qdiff_jax.policy import SitePlan
from qdiff_jax.quant.step_tables import check_served
from qdiff_jax.sites import list_sites
from qdiff_jax.stages.calibrate import ActivationConfig, calibrate_activations
from qdiff_jax.stages.deferred import deferred
from qdiff_jax.stages.finetune import LOSSES, FinetuneConfig, Phase, check_step_weights, finetune
from qdiff_jax.stages.qalora import QALoRAConfig, qalora
from qdiff_jax.stages.stage import Method, Model
from qdiff_jax.stages.weights import calibrate_weights

VARIANTS = ("fixed", "faithful")


@dataclasses.dataclass(frozen=True)
class EfficientDMConfig:
    """The paper's figures for LDM-4 on ImageNet.

    steps: of training. lora: False trains scales and tables alone (an ablation). lora_divisor: a layer's update
    learns at mean(delta_w) / lora_divisor, or at the mean of these over the layers with student.rates "mean";
    lora_lr: its rate with student.rates "constant". scale_lr, activation_lr: of delta_w and of the tables.
    loss: of `stages.finetune.LOSSES`. weight_method: ranges of weights, "minmax" or "mse". variant: "fixed" or
    "faithful". weighted: the errors of steps count as `step_weights` say (ours; False is the paper, all alike).
    source, student, training: where batches come from, what is trained, and how.
    """

    steps: int = 16_000
    lora: bool = True
    lora_divisor: float = 2500.0
    lora_lr: float = 1e-3
    scale_lr: float = 1e-6
    activation_lr: float = 5e-4
    loss: str = "eps_sum"
    weight_method: str = "minmax"
    variant: str = "fixed"
    weighted: bool = False
    source: SourceConfig = SourceConfig()
    student: QALoRAConfig = QALoRAConfig()
    training: FinetuneConfig = FinetuneConfig()

    def __post_init__(self):
        choices = {
            "variant": VARIANTS,
            "weight_method": ("minmax", "mse"),
            "loss": tuple(LOSSES),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"EfficientDMConfig.{name} is {getattr(self, name)!r}; use one of {allowed}."
                )
        if self.variant == "faithful" and self.student.base == "full_precision":
            raise ValueError(
                "EfficientDMConfig.variant 'faithful' shares one delta_w between W0 and its rounding, and "
                "student.base='full_precision' has a W0 without one: take 'quantized', or variant='fixed'."
            )
        if self.steps < 0 or not 0 < self.lora_divisor < float("inf"):
            raise ValueError(
                f"EfficientDMConfig: steps is {self.steps} and lora_divisor {self.lora_divisor}; the one is at "
                "least 0, the other positive."
            )
        for name in ("lora_lr", "scale_lr", "activation_lr"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"EfficientDMConfig.{name} is {getattr(self, name)}; a rate is at least 0, and 0 "
                    "leaves what it is for as it was."
                )


def phases_of(config: EfficientDMConfig) -> tuple[Phase, ...]:
    """The paper's one phase."""
    labels = {"scales": config.scale_lr, "tables": config.activation_lr}
    if config.lora:
        constant = config.student.rates == "constant"
        labels["lora"] = config.lora_lr if constant else 1.0 / config.lora_divisor
    if config.student.base_delta_shared:
        labels["base_scales"] = config.scale_lr
    return (Phase(config.steps, labels, {config.loss: 1.0}),)


def left_alone(model: Model, plan: SitePlan) -> frozenset[str]:
    """Sites of the time embedding and the ends that are at 8 bits or more on every planned side."""
    sites = list_sites(model.module, *example_inputs(model.module.config))
    names = embedding_and_ends(sites)
    return frozenset(n for n in names if all(e.bits >= 8 for e in plan.of(n).values()))


def efficientdm(
    model: Model,
    activation_calibration: Any,
    timesteps: Any,
    *,
    sampling: Sampling | None = None,
    recorded: Paired | None = None,
    config: EfficientDMConfig = EfficientDMConfig(),
    activations: ActivationConfig = ActivationConfig(observer="mse"),
    step_weights: np.ndarray | None = None,
    on_progress=None,
) -> Method:
    """Ranges of weights, ranges of activations, fine-tuning.

    activation_calibration: of the ranges that learning starts from. timesteps: [S], the sampler's schedule,
    which the tables serve. step_weights: [S], of the same steps, for `config.weighted`. sampling: what online
    trajectories are made of; recorded: full-precision trajectories with every step, for a cached source. Raises
    ValueError if what the source needs is missing, or if tables of its timesteps cannot serve the schedule.
    """
    if config.weighted and step_weights is None:
        raise ValueError(
            "efficientdm.weighted needs weights of the steps: choose closed_form.step_weights."
        )
    source = make_source(config.source, len(timesteps), sampling, recorded)
    if config.weighted:
        check_step_weights("efficientdm", step_weights, source)
    if config.student.talsq:
        check_served(source.timesteps, timesteps, config.student.subsample)
    if config.variant == "faithful":
        student = dataclasses.replace(config.student, base_delta_shared=True, zp_ste=False)
        config = dataclasses.replace(config, student=student)

    def build(state):
        kept = left_alone(model, state.plan)
        student = qalora(model, config.student, source.timesteps, timesteps, kept)
        phases = phases_of(config)
        own = dict(step_weights=step_weights if config.weighted else None, on_progress=on_progress)
        return finetune(
            "efficientdm", model, student, source, phases, config.training, **own
        ), state

    stages = (
        calibrate_weights(model, method=config.weight_method),
        calibrate_activations(
            model, activation_calibration, timesteps, activations, on_progress=on_progress
        ),
        deferred("efficientdm", build, "training"),
    )
    weighted = ", weighted" if config.weighted else ""
    notes = f"{config.variant}, source={config.source.kind}, steps={config.steps}{weighted}"
    return Method("efficientdm", stages, notes=notes)
