"""What an analysis looks at: a model with its own full-precision trajectories, and quantized variants."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from qdiff_jax.diffusion.samplers import SamplerPlan
from qdiff_jax.diffusion.schedule import NoiseSchedule
from qdiff_jax.eval.samples import labels, noise_key
from qdiff_jax.methods.rtn import rtn
from qdiff_jax.models.families import example_inputs
from qdiff_jax.models.program import temporal_nodes
from qdiff_jax.models.registry import DiffusionModel, predictor
from qdiff_jax.named_policies import policy
from qdiff_jax.observe.selectors import every_step
from qdiff_jax.observe.trajectory import Trajectory, record_trajectories
from qdiff_jax.policy import make_plan
from qdiff_jax.sites import Site, list_sites
from qdiff_jax.stages.calibrate import ActivationConfig
from qdiff_jax.stages.stage import Model, fold_weights, initial_state, run_stage


class NotApplicable(ValueError):
    """The analysis has no meaning on this model; the message says why in one sentence."""


class Subject(NamedTuple):
    """A model on its own sampler.

    sites: in order of execution. calibration: full-precision trajectories that variants are
    calibrated on; trajectory: others, which everything is measured on. Both have one branch and S
    recorded steps in ascending order of timestep. classes, feature_class: as in
    `models.registry.DiffusionModel`. batch: samples at a time while sampling.
    """

    model: Model
    sites: tuple[Site, ...]
    schedule: NoiseSchedule
    sampler: SamplerPlan
    shape: tuple[int, ...]
    classes: int | None
    feature_class: int | None
    seed: int
    batch: int
    calibration: Trajectory
    trajectory: Trajectory

    @property
    def full(self) -> dict:
        """The variables of the full-precision network."""
        return {"params": self.model.params, "quant": {}}


def make_subject(
    diffusion: DiffusionModel,
    sampler: SamplerPlan,
    *,
    samples: int,
    calibration: int,
    seed: int = 0,
    batch: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> Subject:
    """Records the trajectories: `calibration` of them, then `samples` others.

    Raises ValueError for less than two samples, of which nothing can be said.
    """
    if samples < 2 or calibration < 1:
        raise ValueError(
            f"an analysis needs at least 2 samples and 1 to calibrate on; got {samples} and "
            f"{calibration}."
        )
    recorded = record_trajectories(
        predictor(diffusion.model.module),
        {"params": diffusion.model.params, "quant": {}},
        sampler,
        noise_key(seed),
        list(range(calibration + samples)),
        shape=diffusion.image_shape,
        y=labels(diffusion.classes, range(calibration + samples)),
        batch_size=batch,
        on_batch=on_batch,
    )
    return Subject(
        diffusion.model,
        list_sites(diffusion.model.module, *example_inputs(diffusion.model.module.config)),
        diffusion.schedule,
        sampler,
        diffusion.image_shape,
        diffusion.classes,
        diffusion.feature_class,
        seed,
        batch,
        take_rows(recorded, slice(0, calibration)),
        take_rows(recorded, slice(calibration, None)),
    )


def take_rows(trajectory: Trajectory, rows: slice) -> Trajectory:
    """Some of the samples of a trajectory, all of its steps."""
    return trajectory.replace(
        x=trajectory.x[:, rows],
        y=jax.tree.map(lambda leaf: leaf[rows], trajectory.y),
        eps=trajectory.eps[:, rows],
        branch=trajectory.branch[rows],
        sample=trajectory.sample[rows],
    )


def parse_bits(text: str) -> tuple[int | None, int | None]:
    """ "w4a8" -> (4, 8); 32 stands for full precision and becomes None.

    Raises ValueError for anything else.
    """
    found = re.fullmatch(r"w(\d+)a(\d+)", text)
    widths = [int(value) for value in found.groups()] if found else []
    if not widths or any(width not in (*range(2, 9), 32) for width in widths):
        raise ValueError(
            f"bits {text!r} are not understood; write w4a8 for 4-bit weights and 8-bit activations, "
            "each 2 to 8, or 32 for full precision."
        )
    return tuple(None if width == 32 else width for width in widths)


def round_to_nearest(
    subject: Subject,
    bits: str,
    *,
    policy_name: str = "common",
    on_progress: Callable | None = None,
) -> dict:
    """Variables of the model at bits such as "w4a8", every weight to its nearest code.

    Weights are folded; activations have one range for all steps. Raises ValueError for bits or a
    policy that are unknown.
    """
    rules = policy(policy_name, subject.sites, *parse_bits(bits))
    steps = every_step(jax.random.key(subject.seed), subject.calibration)
    batch = max(d for d in range(1, 65) if len(steps) % d == 0)
    method = rtn(
        subject.model,
        steps,
        subject.trajectory.t,
        activations=ActivationConfig(batch_size=batch),
        on_progress=on_progress,
    )
    state = initial_state(make_plan(subject.sites, rules), jax.random.key(subject.seed))
    for stage in method.stages:
        state, _ = run_stage(stage, state)
    params, quant = fold_weights(subject.model.params, state.quant)
    return {"params": params, "quant": quant}


def is_temporal(model: Model, name: str) -> bool:
    """Whether a site (or "site:operand") depends on the timestep and the label alone."""
    return name.split("/")[0] in temporal_nodes(model.program)


def to_json(value: Any) -> Any:
    """A result as JSON values: arrays become lists, and what is not finite becomes None."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return to_json(np.asarray(value).tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
