"""Where training steps take their batches from: a teacher's trajectory as it unfolds, or one recorded.

A source is three pure functions and the arrays they read. What a step sees depends on the run's key and the
number of the step alone, and what must be carried from one step to the next (the state of a trajectory) is
an array like any other, saved with the training.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.diffusion.guidance import Guidance, branches, classifier_free
from qdiff_jax.diffusion.noise import initial_noise, normal, sample_keys, step_keys
from qdiff_jax.diffusion.samplers import SamplerPlan, ddim
from qdiff_jax.diffusion.schedule import NoiseSchedule
from qdiff_jax.diffusion.timesteps import make_timesteps
from qdiff_jax.observe.quantization_noise import Paired, reference_at
from qdiff_jax.quant.timed import StepContext

KINDS = ("online", "cached")
ORDERS = ("trajectory", "mixed")
TARGETS = ("teacher", "noise")

# (x, ctx, y) -> the teacher's guided estimate
Estimate = Callable[[jax.Array, StepContext, Any], jax.Array]


class Batch(NamedTuple):
    """x: [B, ...] network inputs. ctx: scalars (all of one step) or [B]. y: labels or None. target: [B, ...],
    what the guided prediction is to be."""

    x: jax.Array
    ctx: StepContext
    y: Any
    target: jax.Array


class Source(NamedTuple):
    """data: arrays the steps read. guidance: under which the prediction is compared. timesteps: [S], those
    that occur, by step index.

    init(key) -> memory, a pytree of arrays that steps hand on. inputs(key, first, stop) -> what steps
    first..stop-1 read, [n, ...]. draw(memory, visit, data, estimate) -> (memory, Batch), pure; one function
    object for all sources of a kind, so that equal sources share a compiled step.
    """

    data: Any
    guidance: Guidance | None
    timesteps: np.ndarray
    init: Callable[[jax.Array], Any]
    inputs: Callable[[jax.Array, int, int], Any]
    draw: Callable[[Any, Any, Any, Estimate], tuple[Any, Batch]]


class Sampling(NamedTuple):
    """What trajectories are made of beside the network. schedule: None for a flow model, which has no online
    trajectories here. spacing, steps, grid: of the sampler's timesteps, as `make_timesteps` takes them; steps
    None for as many as the sampler calls the network, which with PLMS is one more. guidance: of the sampler.
    shape: of one sample. classes: number of classes, None for an unconditional model. null_class: None for a
    model that has none. options: of DDIM beside eta (final, prediction)."""

    schedule: NoiseSchedule | None
    spacing: str
    guidance: Guidance | None
    shape: tuple[int, ...]
    classes: int | None
    null_class: int | None
    steps: int | None = None
    grid: Mapping[str, Any] = types.MappingProxyType({})
    options: Mapping[str, Any] = types.MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """kind: "online" or "cached" (the recorded calibration trajectories; order and target: see `cached`).
    batch_size: samples at a time. Of online trajectories: DDIM with sampling_steps (0 for those of the
    sampler) and eta; guidance_scale, negative for that of the sampler. The defaults are EfficientDM's."""

    kind: str = "online"
    batch_size: int = 2
    sampling_steps: int = 100
    eta: float = 1.0
    guidance_scale: float = -1.0
    order: str = "trajectory"
    target: str = "teacher"

    def __post_init__(self):
        for name, allowed in (("kind", KINDS), ("order", ORDERS), ("target", TARGETS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"SourceConfig.{name} is {getattr(self, name)!r}; use one of {allowed}."
                )
        if self.kind == "online" and (self.target, self.order) != ("teacher", "trajectory"):
            raise ValueError(
                "SourceConfig: order and target choose among recorded states; take kind='cached'."
            )
        if self.batch_size < 1 or self.sampling_steps < 0:
            raise ValueError(
                f"SourceConfig: batch_size is {self.batch_size} and sampling_steps {self.sampling_steps}; the "
                "one is at least 1, the other not negative."
            )


def make_source(
    config: SourceConfig, steps: int, sampling: Sampling | None, recorded: Paired | None
) -> Source:
    """The source of a config. steps: calls of the sampler. Raises ValueError if what it is made of is missing
    (`sampling` for online trajectories, `recorded` for cached ones), or if the sampler's grid cannot have
    `sampling_steps` timesteps."""
    if config.kind == "cached":
        if recorded is None:
            raise ValueError("a cached source needs recorded trajectories: give `paired`.")
        return cached(
            recorded, batch_size=config.batch_size, order=config.order, target=config.target
        )
    if sampling is None:
        raise ValueError(
            "an online source samples the teacher during training: give `sampling` (its schedule, spacing and "
            "shape), or take kind='cached' with recorded trajectories."
        )
    if sampling.schedule is None:
        raise ValueError(
            "an online source samples the teacher by DDIM, and a flow model has no noise schedule; take "
            "kind='cached', whose trajectories are the sampler's own."
        )
    guidance = sampling.guidance
    if config.guidance_scale >= 0:
        if sampling.classes is None:
            raise ValueError(
                f"SourceConfig.guidance_scale is {config.guidance_scale}, but the model has no classes to "
                "guide by; leave it negative."
            )
        guidance = classifier_free(config.guidance_scale, sampling.null_class)
    total = sampling.schedule.num_timesteps
    count = config.sampling_steps or sampling.steps or steps
    grid = make_timesteps(sampling.spacing, total, count, **sampling.grid)
    return online(
        ddim(sampling.schedule, grid, eta=config.eta, **sampling.options),
        shape=sampling.shape,
        batch_size=config.batch_size,
        guidance=guidance,
        classes=sampling.classes,
    )


def online(
    plan: SamplerPlan,
    *,
    shape: tuple[int, ...],
    batch_size: int,
    guidance: Guidance | None = None,
    classes: int | None = None,
) -> Source:
    """Trajectories of the teacher, one sampler step for each training step, noisiest first.

    Source: EfficientDM (He et al. 2024), section 3.5 and its trainer: x is advanced by the teacher's
    guided estimate with the plan's fresh noise, never by the student. Trajectory n starts from new noise
    with new labels (uniform over `classes`); samples depend on the key and their global index alone.

    plan: of the sampler that is followed. shape: of one sample.
    """

    def init(key):
        x = jnp.zeros((batch_size, *shape), jnp.float32)
        return {"x": x, "sampler": plan.sampler.init(x), "key": jax.random.key_data(key)}

    def inputs(key, first, stop):
        number = np.arange(first, stop)
        trajectory = number // plan.steps
        visit = {
            "position": np.int32(plan.steps - 1 - number % plan.steps),
            "sample": np.uint32(trajectory[:, None] * batch_size + np.arange(batch_size)),
        }
        if classes is not None:
            draws = [_generator(key, n).integers(0, classes, batch_size) for n in trajectory]
            visit["y"] = np.asarray(draws, np.int32)
        return visit

    return Source(
        jax.tree.map(jnp.asarray, plan), guidance, plan.timesteps, init, inputs, _draw_online
    )


def _draw_online(memory, visit, plan: SamplerPlan, estimate: Estimate):
    position, y = visit["position"], visit.get("y")
    keys = sample_keys(jax.random.wrap_key_data(memory["key"]), visit["sample"])
    begins = position == len(plan.timesteps) - 1
    fresh = initial_noise(keys, memory["x"].shape[1:])
    x = jnp.where(begins, fresh, memory["x"])
    held = jax.tree.map(
        lambda new, old: jnp.where(begins, new, old), plan.sampler.init(x), memory["sampler"]
    )
    row = jax.tree.map(lambda leaf: leaf[position], plan.rows)
    ctx = StepContext(plan.timesteps[position], plan.index[position], jnp.zeros((), jnp.int32))
    target = estimate(x, ctx, y)
    eps, sigma = plan.sampler.read(row, target)
    noise = normal(step_keys(keys, plan.index[position], 0), x)
    held, ahead = plan.sampler.step(row, held, x, eps, sigma, noise)
    return {**memory, "x": ahead, "sampler": held}, Batch(x, ctx, y, target)


def cached(
    paired: Paired, *, batch_size: int, order: str = "trajectory", target: str = "teacher"
) -> Source:
    """Recorded trajectories, whose estimates are the targets: the teacher is not evaluated again.

    order: "trajectory" visits the steps as the sampler does, noisiest first, with other samples at every
    visit; "mixed" draws step and sample anew for each item of a batch. target: "teacher", or "noise": the
    last states of the trajectories are taken for images, noised anew to the step visited, and the noise is
    the target, without guidance: ordinary diffusion training on the same data. To compare distillation with
    it, take both in one order: what a batch holds is then drawn alike, and the target alone differs.

    Raises ValueError for another order or target.
    """
    if order not in ORDERS or target not in TARGETS:
        raise ValueError(
            f"order {order!r} and target {target!r}: use one of {ORDERS} and one of {TARGETS}."
        )
    trajectory, every = paired.trajectory, len(branches(paired.guidance))
    steps, size = len(trajectory.t), trajectory.x.shape[1] // every
    mixed = order == "mixed"
    x = trajectory.x[:, ::every]
    data = {"t": np.float32(trajectory.t), "index": np.int32(trajectory.index)}
    guidance, draw = paired.guidance, _draw_cached
    if target == "noise":
        if paired.alpha_bar is None:
            raise ValueError(
                "target='noise' noises images by a schedule, and a flow model has none; take "
                "target='teacher'."
            )
        guidance, draw = None, _draw_noised
        alpha_bar = np.asarray(paired.alpha_bar)
        signal, noise = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
        image = (x[0] - noise[0] * reference_at(paired, 0)) / signal[0]
        data |= {"image": np.float32(image), "signal": np.float32(signal)}
        data["noise"] = np.float32(noise)
    else:
        data |= {"x": x, "target": np.stack([reference_at(paired, s) for s in range(steps)])}
        if mixed and guidance is not None and guidance.form == "batch":
            guidance = guidance.replace(form="calls")  # A batch of two halves has one step.
    if trajectory.y is not None:
        data["y"] = jax.tree.map(lambda leaf: leaf[::every], trajectory.y)

    def init(key):
        return {"key": jax.random.key_data(key)}

    def inputs(key, first, stop):
        visits = []
        for number in range(first, stop):
            generator = _generator(key, number)
            row = generator.choice(size, batch_size, replace=size < batch_size).astype(np.int32)
            position = np.int32(steps - 1 - number % steps)
            if mixed:
                position = generator.integers(0, steps, batch_size).astype(np.int32)
            visits.append({"position": position, "row": row, "number": np.uint32(number)})
        return {name: np.stack([v[name] for v in visits]) for name in ("position", "row", "number")}

    data = jax.tree.map(jnp.asarray, data)
    return Source(data, guidance, trajectory.t, init, inputs, draw)


def _context(data, position) -> StepContext:
    return StepContext(data["t"][position], data["index"][position], jnp.zeros((), jnp.int32))


def _draw_cached(memory, visit, data, estimate):
    del estimate
    position, row = visit["position"], visit["row"]
    y = jax.tree.map(lambda leaf: leaf[row], data.get("y"))
    batch = Batch(
        data["x"][position, row], _context(data, position), y, data["target"][position, row]
    )
    return memory, batch


def _draw_noised(memory, visit, data, estimate):
    del estimate
    position, row = visit["position"], visit["row"]
    image = data["image"][row]
    key = jax.random.fold_in(jax.random.wrap_key_data(memory["key"]), visit["number"])
    noise = jax.random.normal(key, image.shape)
    column = (-1,) + (1,) * (image.ndim - 1)
    signal, level = (data[name][position].reshape(column) for name in ("signal", "noise"))
    y = jax.tree.map(lambda leaf: leaf[row], data.get("y"))
    return memory, Batch(signal * image + level * noise, _context(data, position), y, noise)


def _generator(key: jax.Array, number: int) -> np.random.Generator:
    seed = np.asarray(jax.random.key_data(key)).astype(np.uint32).reshape(-1).tolist()
    return np.random.default_rng([*seed, int(number)])
