"""TCAQ-DM: even channels, the right grid for attention, and calibration on the quantized sampler's states.

Source: Huang et al. 2024 ("TCAQ-DM: Timestep-Channel Adaptive Quantization for Diffusion Models"), of which no
code and no full text could be opened; written from reviews. TCR moves a factor of each input channel into
the weights (`stages.channel_factors`), DAQ gives each softmax output log2 or uniform by step
(`stages.softmax_grids`), PAR repeats a shorter reconstruction on states of the quantized sampler
(`stages.progressive`). Reconstructed or chosen by us:

- the form of the factors, their exponent by the layer's output error (`factors.exponent="search"`; 1.0 is the
  paper's, and hurts where weights have few bits), layers of transformers;
- factors are not folded into the modulation of a transformer's blocks, though they could be: those are
  temporal features, which other stages quantize and the report compares;
- DAQ compares with an exponential, not with the log-normal, and its criterion is likelihood, not error: with
  softmax outputs at 8 bits it takes log2 where uniform is better by two orders of magnitude
  (`softmax.criterion` has others; the report says which rows are log2);
- two rounds after the first, a quarter of its steps each, one beta schedule over all rounds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qdiff_jax.methods.closed_form import check_rounding, round_units
from qdiff_jax.models.families import example_inputs
from qdiff_jax.models.program import temporal_nodes, units_with_projections
from qdiff_jax.models.registry import predictor
from qdiff_jax.models.unet_ddpm import AttnBlock
from qdiff_jax.observe.quantization_noise import Paired
from qdiff_jax.sites import list_sites
from qdiff_jax.stages.calibrate import ActivationConfig, calibrate_activations
from qdiff_jax.stages.channel_factors import FactorConfig, move_channel_factors
from qdiff_jax.stages.deferred import deferred, on_left_parameters
from qdiff_jax.stages.layer_rounding import ClosedFormConfig
from qdiff_jax.stages.progressive import reopened, resample, round_configs, unrounded
from qdiff_jax.stages.reconstruct import ReconstructConfig, reconstruct
from qdiff_jax.stages.softmax_grids import SoftmaxGridConfig, choose_softmax_grids
from qdiff_jax.stages.stage import Method, Model, QuantState, Stage, tuned_params
from qdiff_jax.stages.weights import calibrate_weights


@dataclasses.dataclass(frozen=True)
class TcaqConfig:
    """tcr, daq: whether that part is used; without daq a softmax output has one range for all steps, while
    softmax.criterion="uniform" keeps the tables and leaves out the choice alone. rounds: of PAR after the first
    reconstruction, 0 for none; round_share: their steps in steps of the first. factors, softmax: of the
    parts."""

    tcr: bool = True
    daq: bool = True
    rounds: int = 2
    round_share: float = 0.25
    factors: FactorConfig = FactorConfig()
    softmax: SoftmaxGridConfig = SoftmaxGridConfig()


def attention_norms(model: Model) -> dict[str, tuple[str, ...]]:
    """{path of a normalization: the layers that alone read it, without anything in between}."""
    return {
        f"{node.name}/norm": tuple(f"{node.name}/{op}" for op in ("q", "k", "v"))
        for node in model.program
        if isinstance(node.module, AttnBlock)
    }


def tcaq(
    model: Model,
    weight_calibration: Any,
    activation_calibration: Any,
    timesteps: Any,
    source: Paired | None,
    *,
    weight_method: str = "mse",
    weights: ReconstructConfig = ReconstructConfig(),
    activations: ActivationConfig = ActivationConfig(),
    config: TcaqConfig = TcaqConfig(),
    rounding: str = "adaround",
    closed_form: ClosedFormConfig = ClosedFormConfig(),
    step_weights: np.ndarray | None = None,
    on_progress=None,
) -> Method:
    """TCR, ranges, DAQ, reconstruction of rounding and activation steps, and its rounds on new states.

    source: full-precision trajectories and the sampler, needed for rounds. activation_calibration visits
    every step of `timesteps`. rounding: "adaround" (the paper's: rounding and activation steps learned
    together), or "closed_form", which decides the weights anew in every round (steps weighted by
    `step_weights` [S]) and then learns the activation steps for them. Raises ValueError for rounds without a
    source, or an unknown rounding.
    """
    check_rounding(rounding)
    if config.rounds and source is None:
        raise ValueError(
            "tcaq samples the quantized network between rounds: give `source` (CalibrationSets.paired), or "
            "rounds=0."
        )
    solved = rounding == "closed_form"
    weights = dataclasses.replace(weights, trains="scales" if solved else "both")
    configs = round_configs(weights, config.rounds, config.round_share)
    batch_size, units = activations.batch_size, units_with_projections(model.program)
    steps = np.unique(weight_calibration.index)

    def tuned(state: QuantState) -> Model:
        return model._replace(params=tuned_params(model.params, state.aux))

    def ranges(own: Model) -> tuple[Stage, ...]:
        given = dict(on_progress=on_progress)
        found = (
            calibrate_weights(own, method=weight_method),
            calibrate_activations(own, activation_calibration, timesteps, activations, **given),
        )
        if not config.daq:
            return found
        grids = choose_softmax_grids(
            own,
            activation_calibration,
            timesteps,
            config.softmax,
            batch_size=batch_size,
            on_progress=on_progress,
        )
        return *found, grids

    def states_of(state, i: int):
        return state.aux["calibration"] if i else weight_calibration

    def solution(i: int):
        def build(state):
            stage = round_units(
                tuned(state),
                units,
                states_of(state, i),
                closed_form,
                name=f"tcaq_weights_{i}",
                step_weights=step_weights,
                on_progress=on_progress,
            )
            return stage, unrounded(state) if i else state

        return deferred(f"tcaq_weights_{i}", build, "rounds" if i else "codes")

    def reconstruction(i: int):
        def build(state):
            own = tuned(state)
            stage = reconstruct(
                own,
                units,
                states_of(state, i),
                configs[i],
                name=f"tcaq_round_{i}",
                keep_alphas=config.rounds > 0 and not solved,
                on_progress=on_progress,
            )
            return stage, reopened(state, own.params) if i and not solved else state

        return deferred(f"tcaq_round_{i}", build, "rounds" if i else "codes")

    def one_round(i: int):
        return (solution(i), reconstruction(i)) if solved else (reconstruction(i),)

    stages = []
    if config.tcr:
        sites = list_sites(model.module, *example_inputs(model.module.config))
        factors = move_channel_factors(
            model,
            activation_calibration,
            len(timesteps),
            config.factors,
            operators={site.name: site.operator for site in sites},
            shared=attention_norms(model),
            skip=temporal_nodes(model.program),
            batch_size=batch_size,
            on_progress=on_progress,
        )
        stages.append(factors)
    stages += on_left_parameters(model, ranges)
    stages += one_round(0)
    for i in range(1, config.rounds + 1):
        drawn = resample(
            model,
            predictor(model.module),
            source,
            steps,
            name=f"resample_{i}",
            batch_size=batch_size,
            on_progress=on_progress,
        )
        stages += [drawn, *one_round(i)]
    parts = [word for word, used in (("tcr", config.tcr), ("daq", config.daq)) if used]
    notes = ", ".join([*parts, f"rounds={config.rounds}", f"rounding={rounding}"])
    return Method("tcaq", tuple(stages), notes=notes)
