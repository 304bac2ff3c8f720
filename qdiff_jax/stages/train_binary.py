"""Training a network with binary weights: BinaryDM's stage, from full precision to one bit a weight.

All weights and scales learn on the diffusion loss beside L_EBB = tau mean(sigma_II), which takes the second
basis of head and tail blocks away again, and lambda L_LRM (`feature_mimicking`). Phases are data: operands
begin to be quantized at their step (`quantize_phases`), and the second basis is dropped once the
prediction without it is nearly as good (`BinaryTrainConfig.tolerance`), at the latest at a given step.
Weights of more bits in the plan are trained as LSQ beside them.

Source: Zheng et al. 2025 (arXiv:2404.05662, version 5); progressive binarization from versions 1 to 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from qdiff_jax.stages.binary_step import batch_of, initial_moments, make_step, prediction_error
from qdiff_jax.stages.binary_student import decide_student, split_student
from qdiff_jax.stages.block_groups import image_blocks, tapped_program
from qdiff_jax.stages.feature_mimicking import projections
from qdiff_jax.stages.noising import Images, Noising
from qdiff_jax.stages.quantize_phases import Phase
from qdiff_jax.stages.reconstruct_time_scales import step_inputs
from qdiff_jax.stages.resume_settings import described
from qdiff_jax.stages.stage import Model, QuantState, Stage
from qdiff_jax.stages.whole_network import Carry, train_whole


@dataclasses.dataclass(frozen=True)
class BinaryTrainConfig:
    """The paper's figures for the DDIM of CIFAR-10, at a tenth of the rate of full-precision training.

    lr: constant, or with `schedule` "cosine" falling to 0. weight_decay: of AdamW, on everything, as in
    torch. ema: decay of the averages that are kept in the end, begun anew at the transition. two_bases:
    blocks at no less than this share of the input's side begin with two bases; 0 for all, above 1 for none.
    tau: weight of L_EBB, which
    pulls each scale with tau / (layers * channels), so that few steps need far more than the paper's: in
    1,000 steps of a toy 9e-2 moves them by a tenth and 10 to nothing. lrm: weight
    lambda of L_LRM, 0 to leave it out; divisor: K, of C channels C / K directions are followed; lrm_samples:
    from how many samples those are computed. interval: steps between two groups of progressive
    binarization, 0 to begin with all. transition, latest: shares of the steps from where on the second
    basis may go and where it must; it goes when the error of the prediction without it is within
    `tolerance` of the error with it, asked `checks` times on gate_samples held-out samples. remat: recompute
    each block's inside in the backward pass and keep block inputs alone. save_seconds: least time between two
    saves.
    """

    steps: int = 200_000
    batch_size: int = 64
    lr: float = 2e-5
    schedule: str = "constant"
    weight_decay: float = 0.01
    ema: float = 0.9999
    two_bases: float = 0.5
    tau: float = 9e-2
    lrm: float = 1e-4
    divisor: int = 4
    lrm_samples: int = 64
    interval: int = 1
    transition: float = 0.5
    latest: float = 0.9
    tolerance: float = 0.05
    checks: int = 8
    gate_samples: int = 64
    remat: bool = False
    save_seconds: float = 60.0

    def __post_init__(self):
        for name in ("lr", "weight_decay", "two_bases", "tau", "lrm", "tolerance", "save_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"binarydm.{name} is {getattr(self, name)}; it is a number, at least 0."
                )
        for name, least in (
            ("steps", 0),
            ("batch_size", 1),
            ("lrm_samples", 1),
            ("gate_samples", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"binarydm.{name} is {getattr(self, name)}; it is at least {least}."
                )
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"binarydm.schedule {self.schedule!r} is not 'constant' or 'cosine'.")
        if not 0.0 <= self.transition <= self.latest <= 1.0:
            raise ValueError(
                f"binarydm.transition {self.transition} and binarydm.latest {self.latest} must be shares "
                "of the steps, in this order."
            )
        if self.checks < 1 or self.divisor < 1 or self.interval < 0 or not 0 <= self.ema < 1:
            raise ValueError(
                f"binarydm: checks {self.checks} and divisor {self.divisor} must be at least 1, interval "
                f"{self.interval} at least 0 and ema {self.ema} in [0, 1)."
            )


def train_binary(
    model: Model,
    data: Any,
    held_out: Any,
    config: BinaryTrainConfig = BinaryTrainConfig(),
    *,
    phases: tuple[Phase, ...] | None = None,
    on_progress=None,
) -> Stage:
    """The stage that trains a state whose weights and activations have ranges.

    data: `noising.Images`, the paper's, noised anew at every step; or a calibration set (x, t, y, eps_fp),
    whose target is the full-precision prediction on sampling states and needs no images. held_out: the same of
    other samples, on which it is decided when the second basis may go (`training_sets` splits either). phases:
    who is quantized from when; by default `progressive` over the depths of the network. `finish` decides the
    codes of the averaged weights with one basis and puts every other parameter into `aux["params"]`; its report
    has the first and last loss and what the transition found. Memory: the model's parameters are the teacher
    and the data are shared, not copied; beside them the student with AdamW's two moments and its average. All
    gradients come on top: a step is 1.4 times that by the compiler's plan
    (tests/stages/test_finetune_memory.py). Raises FloatingPointError if the loss is not finite, ValueError for
    an activation with a step table, a weight without a range, or a phase that begins after the end, or after
    the first question about the second basis.
    """
    arrays, noising = _arrays(data)
    judged, judged_noising = _arrays(held_out)
    size, others = (len(jax.tree.leaves(held)[0]) for held in (arrays, judged))
    if not size or not others:
        raise ValueError(
            f"train_binary: there are {size} samples to train on and {others} to judge the transition by; give "
            "at least one of each."
        )
    taps = image_blocks(model.program)[:-1] if config.lrm and config.steps else ()
    unit = tapped_program(model.program, taps)
    points = _gate_points(config)

    def begin(state: QuantState):
        trainable, frozen = split_student(
            model, state, config.two_bases, config.interval, phases, _example(arrays)
        )
        _check_phases(frozen["starts"], bool(trainable["second"]), config, points)
        weights = {"tau": np.float32(config.tau), "lrm": np.float32(config.lrm)}
        frozen |= {"weights": weights, "directions": []}
        if taps:
            first = batch_of(arrays, np.arange(min(config.lrm_samples, size)), state.key, noising)
            first = {name: np.asarray(first[name]) for name in unit.inputs}
            frozen["directions"] = projections(
                unit, model.params, first, config.divisor, config.batch_size
            )
        return trainable, {}, {}, {**frozen, "data": arrays}

    def optimizer(trainable):
        gate = {"open": np.float32(bool(trainable["second"])), "at": np.float32(-1)}
        ratio = {"as_trained": np.float32(np.nan), "without": np.float32(np.nan)}
        return {"adam": initial_moments(trainable), "ema": trainable, "gate": {**gate, **ratio}}

    def inputs(state: QuantState, first: int, stop: int):
        rows, rates, keys = step_inputs(config, state.key, size, 0, first, stop)
        if config.schedule == "constant":
            rates = np.full_like(rates, config.lr)
        return np.arange(first, stop, dtype=np.int32), rows, rates, keys

    def run(carry: Carry, n: int) -> Carry:
        if carry.step in points:
            carry = transition(carry)
        later = [p for p in points if p > carry.step]
        return whole.run(carry, min(n, later[0] - carry.step) if later else n)

    def transition(carry: Carry) -> Carry:
        """Drop the second basis if it is no longer missed. Nothing but the carry decides, so that a run
        resumed here decides the same."""
        gate = carry.work["optimizer"]["gate"]
        if not float(gate["open"]):
            return carry
        rows = np.arange(min(config.gate_samples, others))
        batch = batch_of(judged, rows, carry.state.key, judged_noising)
        kept, dropped = (
            prediction_error(unit, model, carry, carry.step, g, batch) for g in (1.0, 0.0)
        )
        passed = dropped <= (1.0 + config.tolerance) * kept
        if not passed and carry.step < points[-1]:
            return carry
        if not passed:
            logging.warning(
                "train_binary: step %d is the latest for the second basis to go, and without it the error "
                "of the prediction is %.3g against %.3g; train longer, or raise tau (%g).",
                carry.step,
                dropped,
                kept,
                config.tau,
            )
        found = {"open": 0.0, "at": carry.step, "as_trained": kept, "without": dropped}
        found = {name: jnp.float32(value) for name, value in found.items()}
        # What is averaged from here on has been judged; weights with a second basis to help them were not.
        copied = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), carry.work["trainable"])
        held = {**carry.work["optimizer"], "gate": found, "ema": copied}
        return carry._replace(work={**carry.work, "optimizer": held})

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        if config.steps:  # `latest` 1 keeps two bases to the end, but one is exported
            carry = transition(carry)
        window = max(1, config.steps // 20)
        ends = {"first_loss": carry.losses[:window], "last_loss": carry.losses[-window:]}
        report = {k: float(np.mean(v)) if len(v) else None for k, v in ends.items()}
        gate = {k: float(v) for k, v in carry.work["optimizer"]["gate"].items()}
        if gate["at"] >= 0:
            report["transition"] = {
                "step": int(gate["at"]),
                "as_trained": gate["as_trained"],
                "without": gate["without"],
                "passed": gate["without"] <= (1.0 + config.tolerance) * gate["as_trained"],
            }
        made = jax.tree.map(jnp.asarray, jax.device_get(carry.work["optimizer"]["ema"]))
        return decide_student(carry.state, made, carry.fixed["grids"]), report

    whole = train_whole(
        "train_binary",
        config.steps,
        begin,
        inputs,
        make_step(unit, noising, config.weight_decay, config.ema, config.remat),
        finish,
        save_seconds=config.save_seconds,
        optimizer=optimizer,
        settings={
            "config": {
                k: v
                for k, v in dataclasses.asdict(config).items()
                if k not in ("save_seconds", "remat")
            },
            "phases": [tuple(phase) for phase in phases or ()],
            "data": described(arrays),
            "noising": noising and [*noising[1:], *described(noising.schedule.alpha_bar)],
            "held out": described(judged),
        },
        on_progress=on_progress,
    )
    return whole._replace(run=run)


def _gate_points(config: BinaryTrainConfig) -> tuple[int, ...]:
    """Steps before which the transition is asked for; the last one is where it happens in any case."""
    ends = tuple(round(share * config.steps) for share in (config.transition, config.latest))
    asked = np.append(np.linspace(*ends, config.checks).round(), ends[1])
    return tuple(int(p) for p in np.unique(asked))


def _check_phases(
    starts: Mapping[str, Any], second: bool, config: BinaryTrainConfig, points: tuple[int, ...]
) -> None:
    """Raise ValueError for an operand that is quantized too late, or never. starts: those above 0."""
    if not (starts and config.steps):
        return
    name = max(starts, key=lambda name: int(starts[name]))
    if starts[name] >= config.steps:
        raise ValueError(
            f"train_binary: {name} begins to be quantized at step {starts[name]}, and training ends after "
            f"{config.steps}; lower binarydm.interval ({config.interval}), or train longer."
        )
    if second and starts[name] > points[0]:
        raise ValueError(
            f"train_binary: {name} begins to be quantized at step {starts[name]}, and step {points[0]} asks "
            f"whether the second basis may go; lower binarydm.interval ({config.interval}) or raise "
            f"binarydm.transition ({config.transition})."
        )


def _arrays(data: Any) -> tuple[dict, Noising | None]:
    if isinstance(data, Images):
        return {"images": data.images, "labels": data.labels}, data.noising
    return {name: getattr(data, name) for name in ("x", "t", "y", "eps_fp")}, None


def _example(arrays: Mapping) -> dict:
    """{"x", "t", "y"} of one sample, for shapes alone."""
    x, y = (arrays.get(own, arrays.get(other)) for own, other in (("x", "images"), ("y", "labels")))
    return {"x": x[:1], "t": np.zeros(1, np.float32), "y": jax.tree.map(lambda leaf: leaf[:1], y)}
