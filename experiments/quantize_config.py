"""What a config of `experiments.quantize` holds, and what can be said of it without the model.

Everything that a config can get wrong is found here and in `quantize_job`, before the workdir is claimed and
before the first minute of work: a typo must cost neither.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.quantize_images import TrainingImages
from qdiff_jax.config import to_dataclass
from qdiff_jax.methods.closed_form import check_rounding
from qdiff_jax.methods.efficientdm import EfficientDMConfig
from qdiff_jax.methods.ptq4dit import PTQ4DiTConfig
from qdiff_jax.methods.ptqd import PTQDConfig
from qdiff_jax.methods.recipes import JOIN, PARTS
from qdiff_jax.methods.registry import (
    BINARY,
    METHODS,
    methods_of,
)
from qdiff_jax.methods.svdquant import SvdQuantConfig
from qdiff_jax.methods.tcaq import TcaqConfig
from qdiff_jax.methods.tdq import TdqConfig
from qdiff_jax.methods.tfmq import VARIANTS
from qdiff_jax.models.load_pipeline import Parts
from qdiff_jax.stages.row_weights import RULES
from qdiff_jax.stages.skip_split import SPLITS
from qdiff_jax.stages.train_binary import BinaryTrainConfig

# Selectors that draw one step for each item.
DRAWING = ("ndtc", "random_steps", "one_step")


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """guidance_scale: classifier-free guidance; negative for none (labels as they are). tensor_bits: of
    the sampler's own tensors under every quantized variant (PTQ4DM), 0 for full precision. offset: added
    to every timestep (1 in the latent diffusion code). final, variance, start, interpolation: options of
    samplers that have them (the last two: Euler's, which on leading grids starts with "unit"), "" for the
    sampler's own default. shift, mu: of `flow_euler` (`diffusion.flow.flow_sigmas`), 0 for none; its
    spacings are "scheduler" and "trailing". guided_channels: how many leading channels are guided, 0 for
    all of the noise estimate (DiT's code: 3)."""

    name: str = "ddim"
    spacing: str = "uniform"
    steps: int = 20
    eta: float = 0.0
    guidance_scale: float = -1.0
    tensor_bits: int = 0
    offset: int = 0
    final: str = ""
    variance: str = ""
    guided_channels: int = 0
    start: str = ""
    interpolation: str = ""
    shift: float = 0.0
    mu: float = 0.0

    def as_json(self) -> dict:
        options = {"eta": self.eta} if self.name == "ddim" else {}
        given = {
            name: getattr(self, name)
            for name in ("final", "variance", "start", "interpolation", "shift", "mu")
        }
        options.update({name: value for name, value in given.items() if value})
        # What is at its default is not written, so that older bundles and results compare equal.
        more = {"grid": {"offset": self.offset}} if self.offset else {}
        if self.guided_channels:
            more["guided_channels"] = self.guided_channels
        return {
            "name": self.name,
            "spacing": self.spacing,
            "steps": self.steps,
            "options": options,
            "guidance_scale": self.guidance_scale,
            **more,
        }


@dataclasses.dataclass(frozen=True)
class CalibrationConfig:
    """samples: full-precision trajectories; weight_steps: how many of their steps reconstruction sees
    (activation ranges see every step). selector: of that set, "uniform", or one of DRAWING, which take `count`
    items (0: one of each trajectory); position: of "one_step", 0 the least noisy; mean, std, mirror_bug: of
    "ndtc" (`observe.selectors.ndtc`)."""

    samples: int = 16
    weight_steps: int = 20
    selector: str = "uniform"
    count: int = 0
    position: int = 0
    mean: float = 0.4
    std: float = 0.4
    mirror_bug: bool = False


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """held_out: trajectories for teacher-forced error; samples: rollouts; batch: of both."""

    held_out: int = 16
    samples: int = 64
    batch: int = 32


@dataclasses.dataclass(frozen=True)
class VariantConfig:
    """method: of the registry, or a recipe of parts, "csb+svdquant+efficientdm" (`qdiff_jax.methods.recipes`).
    w_bits and a_bits: target bits, 2 to 8; 0 or 32 keeps that side in full precision. w_bits 1: binary, for
    the methods that can."""

    method: str
    w_bits: int
    a_bits: int

    @property
    def targets(self) -> tuple[int | None, int | None]:
        """(w_bits, a_bits) as policies take them: None for full precision."""
        return tuple(bits if 0 < bits < 32 else None for bits in (self.w_bits, self.a_bits))


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig:
    """The fields of ReconstructConfig that a config sets, and BRECQ's activation phase: steps (0: none), rate,
    and samples of each step (0: batch_size)."""

    steps: int = 150
    temporal_steps: int = 0
    batch_size: int = 32
    lr: float = 1e-2
    schedule: str = "cosine"
    rounding_weight: float = 0.01
    walk_batch: int = 64
    memory_mib: int = 1024
    save_seconds: float = 20.0
    activation_steps: int = 0
    activation_lr: float = 4e-4
    activation_batch: int = 0


@dataclasses.dataclass(frozen=True)
class ActivationsConfig:
    """The fields of ActivationConfig that a config sets."""

    observer: str = "ema"
    margin: float = 1.1
    batch_size: int = 64


@dataclasses.dataclass(frozen=True)
class RoundingConfig:
    """The fields of ClosedFormConfig that a config sets; batches and memory are those of `reconstruct`.
    tune_steps: of end-to-end tuning afterwards, in the method closed_form (0: none). step_weights: how much the
    samples of each step count, "uniform", "eps_coefficient" or "sensitivity" (`stages.row_weights`)."""

    target: str = "block_fp_output"
    act_order: bool = True
    damping: float = 0.01
    block: int = 128
    ridge: float = 0.05
    refit_bias: bool = True
    sweeps: int = 0
    kronecker_sweeps: int = 0
    kronecker_batch: int = 0
    rows: int = 24_576
    hessian_mib: int = 2048
    hessian_seconds: float = 0.0
    check_samples: int = 64
    activations: bool = True
    tune_steps: int = 0
    step_weights: str = "uniform"


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """model, classifier: shipped names or .safetensors paths (classifier "" for none); or model is the place of
    a published network, parts which that is and where its first stage and text encoder are
    (`models.load_pipeline`), and prompts, for one that reads them, a text file with one a line. data: real
    images for methods that can train on them (`quantize_images`). variants: {name: VariantConfig}, in the order
    of the report. rounding: "adaround" for each method's own way, or "closed_form" by the settings of that
    name, which the method closed_form has too; methods that decide otherwise refuse it (`settings_of`)."""

    model: str
    classifier: str
    seed: int
    policy: str
    variants: dict
    sampler: SamplerConfig
    calibration: CalibrationConfig
    evaluation: EvaluationConfig
    reconstruct: ReconstructionConfig
    activations: ActivationsConfig
    rounding: str = "adaround"
    closed_form: RoundingConfig = RoundingConfig()
    tfmq_variant: str = "fixed"
    tfmq_tiar: bool = True
    tfmq_fsc: bool = True
    tfmq_freeze: bool = False
    tfmq_margin: float = 1.0
    tfmq_split: str = "none"
    qdiffusion_split: str = "shortcut"
    ptqd: PTQDConfig = PTQDConfig()
    tdq: TdqConfig = TdqConfig()
    tcaq: TcaqConfig = TcaqConfig()
    ptq4dit: PTQ4DiTConfig = PTQ4DiTConfig()
    svdquant: SvdQuantConfig = SvdQuantConfig()
    efficientdm: EfficientDMConfig = EfficientDMConfig()
    binarydm: BinaryTrainConfig = BinaryTrainConfig()
    parts: Parts = Parts()
    prompts: str = ""
    data: TrainingImages = TrainingImages()


# How often a long unit is saved, and how much memory it may take, does not touch the codes.
FREE_TO_CHANGE = (
    "reconstruct.save_seconds",
    "reconstruct.memory_mib",
    "efficientdm.training.save_seconds",
    "efficientdm.training.remat",
    "binarydm.save_seconds",
    "binarydm.remat",
)


def read_config(config: Any) -> QuantizeConfig:
    """A ConfigDict as dataclasses, checked as far as it can be without the model.

    Variants are put in the order of the report: from little damage to much, simple method to complex
    (a ConfigDict sorts its keys). Raises ValueError naming the key.
    """
    config = to_dataclass(QuantizeConfig, config)
    variants = {name: _variant(name, given, config) for name, given in config.variants.items()}
    _check_choices(config)
    order = list(METHODS)

    def place(item):
        _, variant = item
        parts = methods_of(variant.method) if JOIN in variant.method else (variant.method,)
        first = order.index(PARTS[parts[0]].method)
        return -variant.w_bits, -variant.a_bits, len(parts), first

    return dataclasses.replace(config, variants=dict(sorted(variants.items(), key=place)))


def _variant(name: str, values: Any, config: QuantizeConfig) -> VariantConfig:
    where = f"config.variants.{name}"
    if name == "fp32":
        raise ValueError(f"{where}: this name belongs to full precision; choose another.")
    variant = to_dataclass(VariantConfig, values, where)
    try:
        parts = methods_of(variant.method, config.ptqd.base)
    except ValueError as error:
        raise ValueError(f"{where}.method: {error}") from error
    for side in ("w_bits", "a_bits"):
        bits = getattr(variant, side)
        if bits == 1 and side == "w_bits":
            decide = [p for p in parts if {"codes", "training"} & set(PARTS[p].kinds)]
            if variant.method in BINARY or (JOIN in variant.method and set(decide) <= set(BINARY)):
                continue
            raise ValueError(
                f"{where}.w_bits is 1, and {variant.method} rounds on uniform grids; binary weights "
                f"are for {BINARY}, or choose 2 to 8."
            )
        if bits not in (0, 32, *range(2, 9)):
            raise ValueError(f"{where}.{side} is {bits}; choose 2 to 8, or 32 for full precision.")
    return variant


def _check_choices(config: QuantizeConfig) -> None:
    """Raise ValueError for a word or number outside its choices."""
    check_rounding(config.rounding)
    if config.efficientdm.weighted and config.closed_form.step_weights == "uniform":
        raise ValueError(
            "config.efficientdm.weighted lets steps count by config.closed_form.step_weights, and that is "
            "'uniform': choose 'eps_coefficient' or 'sensitivity'."
        )
    if config.tfmq_variant not in VARIANTS:
        raise ValueError(
            f"config.tfmq_variant {config.tfmq_variant!r} is unknown; use one of {VARIANTS}."
        )
    if config.ptqd.base not in set(METHODS) - {"ptqd"}:
        raise ValueError(
            f"config.ptqd.base {config.ptqd.base!r} is unknown; there are "
            f"{sorted(set(METHODS) - {'ptqd'})}."
        )
    choices = {
        "calibration.selector": (config.calibration.selector, ("uniform", *DRAWING)),
        "sampler.tensor_bits": (config.sampler.tensor_bits, (0, *range(2, 9))),
        # Its recordings and corrections know the noise estimate alone, guided in all channels.
        "sampler.variance": (config.sampler.variance, ("", "fixed_small", "fixed_large")),
        "sampler.guided_channels": (config.sampler.guided_channels, (0,)),
        "qdiffusion_split": (config.qdiffusion_split, SPLITS),
        "tfmq_split": (config.tfmq_split, SPLITS),
        "closed_form.step_weights": (config.closed_form.step_weights, RULES),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"config.{key} is {value!r}; use one of {allowed}.")
    if config.calibration.std < 0:
        raise ValueError(f"config.calibration.std is {config.calibration.std}; it is not negative.")
