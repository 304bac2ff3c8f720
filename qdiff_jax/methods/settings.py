"""What methods are built from: calibration sets, and one record of every knob."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from qdiff_jax.methods.efficientdm import EfficientDMConfig
from qdiff_jax.methods.ptq4dit import PTQ4DiTConfig
from qdiff_jax.methods.ptqd import PTQDConfig
from qdiff_jax.methods.svdquant import SvdQuantConfig
from qdiff_jax.methods.tcaq import TcaqConfig
from qdiff_jax.methods.tdq import TdqConfig
from qdiff_jax.stages.batch_ranges import BatchRangeConfig
from qdiff_jax.stages.calibrate import ActivationConfig
from qdiff_jax.stages.layer_rounding import ClosedFormConfig
from qdiff_jax.stages.reconstruct import ReconstructConfig
from qdiff_jax.stages.train_binary import BinaryTrainConfig


class CalibrationSets(NamedTuple):
    """What methods calibrate on. weights: for reconstruction; activations: visits every step;
    timesteps: [S], the sampler's schedule by step index. step_weights: [S], how much the samples
    of each step count in closed-form rounding (`stages.row_weights`), None for equally. paired: an
    `observe.quantization_noise.Paired`, for methods that correct the sampling. sampling: an
    `observe.sources.Sampling`, for methods that sample while they train. images: `stages.noising.Images`, for
    BinaryDM, which without trains on all states of `paired`."""

    weights: Any
    activations: Any
    timesteps: Any
    step_weights: Any = None
    paired: Any = None
    sampling: Any = None
    images: Any = None


@dataclasses.dataclass(frozen=True)
class MethodSettings:
    """Every knob of the methods here; a method reads those it has, and so do its parts in a recipe.

    weight_method: "mse" or "minmax". activation_steps: steps of BRECQ's second phase, 0 to skip it;
    activation_batch: samples of each, 0 for as many as the first phase takes. variant: TFMQ-DM's "fixed" (the
    paper) or "faithful" (the official code), faithful_margin: of the latter's tables; tiar, fsc, freeze: its
    parts; tfmq_split: what it splits at a skip. rounding: "adaround" for each method's own way (of those that
    reconstruct weights AdaRound, by `weights`), or "closed_form", by `closed_form`, which methods refuse that
    decide codes otherwise (`methods.registry.check_rounds`). rounds: how often a recipe's PAR will decide the
    weights again after a method that reconstructs them (`build` sets it). tune_steps: of end-to-end tuning
    after the method closed_form. split: which layers Q-Diffusion splits at a skip, "shortcut", "both" or
    "none". batch_ranges: PTQ4DM's search of activation ranges, but for its batch size, which is that of
    `activations`.
    """

    weight_method: str = "mse"
    weights: ReconstructConfig = ReconstructConfig()
    activations: ActivationConfig = ActivationConfig()
    activation_steps: int = 0
    activation_lr: float = 4e-4
    activation_batch: int = 0
    variant: str = "fixed"
    tiar: bool = True
    fsc: bool = True
    freeze: bool = False
    faithful_margin: float = 1.0
    tfmq_split: str = "none"
    rounding: str = "adaround"
    closed_form: ClosedFormConfig = ClosedFormConfig()
    rounds: int = 0
    tune_steps: int = 0
    split: str = "shortcut"
    batch_ranges: BatchRangeConfig = BatchRangeConfig()
    ptqd: PTQDConfig = PTQDConfig()
    tdq: TdqConfig = TdqConfig()
    tcaq: TcaqConfig = TcaqConfig()
    ptq4dit: PTQ4DiTConfig = PTQ4DiTConfig()
    svdquant: SvdQuantConfig = SvdQuantConfig()
    efficientdm: EfficientDMConfig = EfficientDMConfig()
    binarydm: BinaryTrainConfig = BinaryTrainConfig()
