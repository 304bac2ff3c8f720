"""Fine-tuning of a quantized network by the full-precision one: phases, losses and rates as data.

What is trained and how it enters the network is a `Student`, where batches come from a `Source`, and a `Phase`
says for how long, which labels at which rates and by which losses. One compiled step serves all phases: rates
and loss weights are its arguments, and a label without a rate keeps its leaves and its moments to the last bit;
one that has none in any phase has no moments. The optimizer is AdamW as in torch (decay 1e-2, decoupled), its
rate falling linearly to 0 in each phase. Leaves that belong to sampling steps have moments of their own by row,
so that rows of steps that a batch does not contain do not move.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qdiff_jax.diffusion.guidance import evaluate
from qdiff_jax.models.registry import predictor
from qdiff_jax.observe.sources import Source
from qdiff_jax.quant.timed import StepContext, rowwise, select
from qdiff_jax.runtime.remat import recomputed_block
from qdiff_jax.stages.resume_settings import described
from qdiff_jax.stages.row_weights import by_step
from qdiff_jax.stages.stage import Model, QuantState, Stage
from qdiff_jax.stages.whole_network import Carry, train_whole

# (prediction, target), both [B, ...] and guided -> scalar. EfficientDM sums; Adam hardly minds the scale.
LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "eps_sum": lambda made, target: jnp.sum(jnp.square(made - target)),
    "eps_mse": lambda made, target: jnp.mean(jnp.square(made - target)),
}


class Phase(NamedTuple):
    """steps of training; labels: {label of a student: learning rate}, all other labels rest; losses:
    {name in LOSSES: weight}."""

    steps: int
    labels: Mapping[str, float]
    losses: Mapping[str, float]


class Student(NamedTuple):
    """A quantized network that can be trained.

    labels: what it has to train. by_step: those of them whose leaves lead with the row of a sampling step.
    begin(state) -> (trainable {label: tree}, fixed, factors {label: tree like it}): fixed are arrays that
    `variables` reads, factors multiply the rate of each leaf (labels without factors: 1). variables(
    trainable, fixed, params) -> {"params", "quant"}, and settle(before, after, fixed) -> trainable after an
    update: pure, and one function object for equal students. rows(fixed, ctx) -> [n], the rows that a
    batch visits. finish(state, trainable, fixed) -> (state, report). settings: what it was made with, as JSON.
    """

    labels: tuple[str, ...]
    by_step: tuple[str, ...]
    begin: Callable[[QuantState], tuple[dict, Any, dict]]
    variables: Callable[[dict, Any, Mapping], dict]
    settle: Callable[[dict, dict, Any], dict]
    rows: Callable[[Any, StepContext], jax.Array]
    finish: Callable[[QuantState, dict, Any], tuple[QuantState, dict]]
    settings: Any = None


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """weight_decay: of AdamW, for every label. remat: recompute each block's inside in the backward pass and
    keep block inputs alone, for networks whose activations do not fit. save_seconds: least time between two
    saves."""

    weight_decay: float = 1e-2
    remat: bool = False
    save_seconds: float = 60.0

    def __post_init__(self):
        for name in ("weight_decay", "save_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"FinetuneConfig.{name} is {getattr(self, name)}; it is a number, at least 0."
                )


def check_step_weights(name: str, step_weights: np.ndarray, source: Source) -> None:
    """Raise ValueError for weights of another schedule than the source's."""
    if len(step_weights) != len(source.timesteps):
        raise ValueError(
            f"{name}: there are weights for {len(step_weights)} steps, and the trajectories have "
            f"{len(source.timesteps)}; train on the sampler's own steps (source.sampling_steps=0), or weigh "
            "all alike."
        )


def finetune(
    name: str,
    model: Model,
    student: Student,
    source: Source,
    phases: Sequence[Phase],
    config: FinetuneConfig = FinetuneConfig(),
    *,
    step_weights: np.ndarray | None = None,
    on_progress=None,
) -> Stage:
    """The stage `name`: the student's guided prediction is drawn to the source's targets, phase by phase.

    Memory: the model's parameters are the teacher and are shared, not copied; beside them the student's own
    arrays, and moments for what is trained alone. `finish` reports the mean loss of the first and of the last
    round over the source's steps. step_weights: [S], how much the squared errors of each step of the source
    count (scaled to mean 1), None for equally. Raises ValueError for a label or a loss that does not exist, or
    weights of another schedule, FloatingPointError if a loss is not finite.
    """
    if step_weights is not None:
        check_step_weights(name, step_weights, source)
    for phase in phases:
        unknown = [*set(phase.labels) - set(student.labels), *set(phase.losses) - set(LOSSES)]
        if unknown or phase.steps < 0:
            raise ValueError(
                f"{name}: a phase of {phase.steps} steps names {sorted(unknown)}; labels are "
                f"{sorted(student.labels)}, losses {sorted(LOSSES)}."
            )
    steps = sum(phase.steps for phase in phases)
    losses = tuple(sorted({loss for phase in phases for loss in phase.losses}))
    learning = {label for phase in phases for label, rate in phase.labels.items() if rate > 0}

    def begin(state: QuantState):
        started, fixed, factors = student.begin(state)
        trainable = {label: tree for label, tree in started.items() if label in learning}
        key = jax.random.fold_in(state.key, 1)
        memory = source.init(key) if steps else {}
        beside = {
            "teacher": model.params,
            "student": fixed,
            "resting": {label: tree for label, tree in started.items() if label not in learning},
            "factors": factors,
            "source": source.data if steps else {},
            "guidance": source.guidance,
        }
        if step_weights is not None:
            index = np.arange(len(step_weights))
            beside["step_weights"] = by_step(step_weights, index)
        return trainable, {}, memory, beside

    def inputs(state: QuantState, first: int, stop: int):
        visit = source.inputs(jax.random.fold_in(state.key, 1), first, stop)
        return (visit, *schedule(phases, student.labels, losses, first, stop))

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        window = min(len(source.timesteps), max(1, len(carry.losses) // 2))
        parts = {"first_loss": carry.losses[:window], "last_loss": carry.losses[-window:]}
        means = {n: float(np.mean(part)) if part else None for n, part in parts.items()}
        trained = {**carry.fixed["resting"], **carry.work["trainable"]}
        state, report = student.finish(carry.state, trained, carry.fixed["student"])
        return state, {"steps": steps, **means, **report}

    return train_whole(
        name,
        steps,
        begin,
        inputs,
        make_step(
            model.module,
            model.program if config.remat else None,
            source.draw,
            student.variables,
            student.settle,
            student.rows,
            student.by_step,
            losses,
            config.weight_decay,
        ),
        finish,
        save_seconds=config.save_seconds,
        optimizer=functools.partial(
            initial_moments, by_step=student.by_step, weight_decay=config.weight_decay
        ),
        kept=("trainable", "optimizer", "data"),
        settings={
            "phases": [phase._asdict() for phase in phases],
            "weight_decay": config.weight_decay,
            "student": student.settings,
            "source": _source_described(source) if steps else [],
            "step_weights": described(step_weights),
        },
        on_progress=on_progress,
    )


def _source_described(source: Source) -> list:
    """Its kind, its schedule and guidance, and how its batches are drawn, without the states themselves."""
    visit = source.inputs(jax.random.key(0), 0, 1)
    shapes = jax.tree.map(lambda leaf: np.zeros(np.shape(leaf), np.asarray(leaf).dtype), visit)
    held = (source.data, source.guidance, source.timesteps, shapes)
    return [source.draw.__name__, *described(held)]


def schedule(
    phases: Sequence[Phase], labels: Sequence[str], losses: Sequence[str], first: int, stop: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """({label: rate [n]}, {loss: weight [n]}) of steps first..stop-1: linear to 0 in each phase, 0 for what
    rests."""
    number, begun = np.arange(first, stop), 0
    rates = {label: np.zeros(len(number), np.float32) for label in labels}
    weights = {loss: np.zeros(len(number), np.float32) for loss in losses}
    for phase in phases:
        inside = (number >= begun) & (number < begun + phase.steps)
        left = 1.0 - (number - begun) / max(phase.steps, 1)
        for label, rate in phase.labels.items():
            rates[label] = np.where(inside, np.float32(rate * left), rates[label])
        for loss, weight in phase.losses.items():
            weights[loss] = np.where(inside, np.float32(weight), weights[loss])
        begun += phase.steps
    return rates, weights


def _adamw(weight_decay: float) -> optax.GradientTransformation:
    """AdamW but for its rate, which is not part of the moments."""
    return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(weight_decay))


def initial_moments(trainable: dict, *, by_step: Sequence[str], weight_decay: float) -> dict:
    """{label: optimizer state}; labels by step have one for each row."""
    adamw = _adamw(weight_decay)
    return {
        label: (rowwise(adamw) if label in by_step else adamw).init(tree)
        for label, tree in trainable.items()
    }


@functools.cache
def rematerialised(module, program):
    """`models.registry.predictor` of a network that keeps nothing but what its blocks read."""

    def predict(variables, x, ctx: StepContext, y):
        t = jnp.broadcast_to(ctx.t, x.shape[:1])
        params, quant = variables["params"], select(variables["quant"], ctx)
        env = {"x": x, "t": t, "y": y}
        for node in program:
            own = tuple(tree.get(node.name, {}) for tree in (params, quant))
            values = tuple(env[name] for name in node.reads)
            env[node.name] = recomputed_block(node.module, *own, values)
        return env[program[-1].name][..., : x.shape[-1]]

    return predict


@functools.lru_cache(maxsize=16)
def make_step(
    module, program, draw, variables, settle, rows_of, by_step, losses, weight_decay: float
):
    """The step for `run_steps`: (work, (visit, rates, loss weights), fixed) -> (work, loss)."""
    adamw = _adamw(weight_decay)
    by_row = rowwise(adamw)
    teach = predictor(module)
    predict = teach if program is None else rematerialised(module, program)

    def step(work, inputs, fixed):
        visit, rates, weights = inputs
        guidance, params = fixed["guidance"], fixed["teacher"]

        def estimate(x, ctx, y):
            return evaluate(teach, guidance, {"params": params, "quant": {}}, x, ctx, y)[0]

        memory, batch = draw(work["data"], visit, fixed["source"], estimate)
        target = jax.lax.stop_gradient(batch.target)

        def objective(trainable):
            made = variables({**fixed["resting"], **trainable}, fixed["student"], params)
            prediction, _ = evaluate(predict, guidance, made, batch.x, batch.ctx, batch.y)
            pair = (prediction, target)
            if "step_weights" in fixed:
                share = jnp.sqrt(fixed["step_weights"][batch.ctx.index])
                share = share.reshape(share.shape + (1,) * (target.ndim - 1) * share.ndim)
                pair = (share * prediction, share * target)
            return sum(weights[name] * LOSSES[name](*pair) for name in losses)

        loss, gradients = jax.value_and_grad(objective)(work["trainable"])
        rows = rows_of(fixed["student"], batch.ctx)
        trainable, optimizer = {}, {}
        for label, tree in work["trainable"].items():
            before = work["optimizer"][label]
            with jax.numpy_dtype_promotion("standard"):
                if label in by_step:
                    updates, after = by_row.update(gradients[label], before, tree, rows=rows)
                else:
                    updates, after = adamw.update(gradients[label], before, tree)
            active = rates[label] > 0
            rate = jnp.where(active, rates[label], 0.0)
            moved = _moved(tree, updates, rate, fixed["factors"].get(label))
            trainable[label] = _chosen(active, moved, tree)
            optimizer[label] = _chosen(active, after, before)
        before, after = ({**fixed["resting"], **tree} for tree in (work["trainable"], trainable))
        settled = settle(before, after, fixed["student"])
        trainable = {label: settled[label] for label in trainable}
        return {**work, "trainable": trainable, "optimizer": optimizer, "data": memory}, loss

    return step


def _moved(tree: Any, updates: Any, rate: jax.Array, factors: Any) -> Any:
    """p - rate * factor * update: the factor after Adam, which would divide it out of a gradient."""
    if factors is None:
        return jax.tree.map(lambda p, u: p - rate * u, tree, updates)
    return jax.tree.map(lambda p, u, f: p - rate * f * u, tree, updates, factors)


def _chosen(active: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(active, a, b), new, old)
