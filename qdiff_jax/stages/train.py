"""Training steps as pure functions: (state, batch) -> (state, metrics).

Everything random in a step is drawn from the state's key and step number, and everything else is
in the batch, so that a resumed run repeats an uninterrupted one exactly.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from qdiff_jax.data.images import to_unit_range
from qdiff_jax.diffusion.schedule import NoiseSchedule, q_sample
from qdiff_jax.runtime.mesh import replicated

# (params, batch, key) -> (loss, metrics); both scalar float32
LossFn = Callable[[Any, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, dict]]


@flax.struct.dataclass
class TrainState:
    """step: int32 scalar, steps taken. params, ema: float32 trees of one structure. key: the run's
    PRNG key, never advanced: step n uses fold_in(key, n)."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with global-norm clipping and a warm-up.

    peak_lr is reached after `warmup` steps, from 0; `schedule` "cosine" then falls to 0 at
    total_steps, "constant" stays, except for the last `cooldown` steps, which fall linearly to 0
    (so that a constant run can be ended whenever it is good enough). weight_decay is decoupled and
    applies to kernels (rank >= 2) only. clip: largest global gradient norm. ema: decay of the
    averaged weights, 0 for none.
    """

    total_steps: int
    peak_lr: float = 1e-3
    warmup: int = 200
    schedule: str = "cosine"
    cooldown: int = 0
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.999

    def __post_init__(self):
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule {self.schedule!r} is not one of 'cosine', 'constant'.")
        if not 0 <= self.warmup < self.total_steps:
            raise ValueError(
                f"warmup {self.warmup} must lie in 0..total_steps - 1 = {self.total_steps - 1}."
            )
        if self.schedule == "cosine" and self.cooldown:
            raise ValueError(
                "cooldown belongs to schedule 'constant'; 'cosine' ends at 0 by itself."
            )
        if not 0 <= self.cooldown <= self.total_steps - self.warmup:
            raise ValueError(
                f"cooldown {self.cooldown} does not fit between warmup and total_steps."
            )
        if not 0.0 <= self.ema < 1.0 or self.clip <= 0.0:
            raise ValueError(f"ema {self.ema} must be in [0, 1) and clip {self.clip} positive.")


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Step number -> learning rate."""
    if config.schedule == "constant":
        flat = config.total_steps - config.warmup - config.cooldown
        after = optax.constant_schedule(config.peak_lr)
        if config.cooldown:
            fall = optax.linear_schedule(config.peak_lr, 0.0, config.cooldown)
            after = optax.join_schedules([after, fall], [flat])
    else:
        after = optax.cosine_decay_schedule(config.peak_lr, config.total_steps - config.warmup)
    if config.warmup == 0:
        return after
    rise = optax.linear_schedule(0.0, config.peak_lr, config.warmup)
    return optax.join_schedules([rise, after], [config.warmup])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping, then AdamW on the schedule of `learning_rate`."""

    def kernels(params):
        return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            learning_rate(config),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=kernels,
        ),
    )


def init_state(params, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step; the averaged weights start at the parameters."""
    ema = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params), key)


def make_step(loss_fn: LossFn, config: OptimizerConfig, mesh: jax.sharding.Mesh):
    """The training step for `run_steps`: (state, batch) -> (state, metrics).

    The batch is split over the mesh's data axis by its caller; the state is held replicated, so
    XLA sums the gradients over devices. metrics: those of loss_fn, and loss, grad_norm (before
    clipping), lr.

    The averaged weights use min(ema, (1 + n) / (10 + n)) at step n, so that early steps are
    forgotten fast.
    """
    optimizer, lr = make_optimizer(config), learning_rate(config)

    def step(state: TrainState, batch):
        key = jax.random.fold_in(state.key, state.step)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, key)
        # optax multiplies Python floats with int32 counts: the one place that needs promotion.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            rate = lr(state.step)
        params = optax.apply_updates(state.params, updates)
        n = state.step.astype(jnp.float32)
        decay = jnp.minimum(config.ema, (1.0 + n) / (10.0 + n))
        ema = jax.tree.map(lambda old, new: new + decay * (old - new), state.ema, params)
        new = TrainState(state.step + 1, params, ema, opt_state, state.key)
        new = jax.lax.with_sharding_constraint(new, replicated(mesh))
        metrics = {**metrics, "loss": loss, "grad_norm": optax.tree.norm(grads), "lr": rate}
        return new, metrics

    return step


def diffusion_loss(
    apply: Callable,
    schedule: NoiseSchedule,
    *,
    num_classes: int | None,
    null_class: int | None,
    label_dropout: float = 0.1,
) -> LossFn:
    """Mean squared error of the predicted noise, t uniform (Ho et al. 2020, equation 14).

    With classes, a label becomes the null class with probability `label_dropout`, which trains the
    unconditional branch that classifier-free guidance needs (Ho and Salimans 2022, algorithm 1).

    Args:
      apply: (params, x [B, H, W, C], t [B] float32, y [B] int32 or None, dropout_key) -> eps like
        x.
      schedule: of the forward process.
      num_classes: None for an unconditional model; the batch's labels are then not used.
      null_class: None for a model that has none.
      label_dropout: in [0, 1]; 0 for classes without a null class.

    Returns:
      A loss over batches {"image": uint8 [B, H, W, C], "label": int32 [B]}.

    Raises ValueError for labels to be dropped where there is no null class.
    """
    if num_classes is not None and null_class is None and label_dropout > 0:
        raise ValueError(
            f"label_dropout={label_dropout} makes labels the null class, which this model does not have; "
            "set it to 0."
        )

    def loss_fn(params, batch, key):
        x0 = to_unit_range(batch["image"])
        t_key, noise_key, label_key, dropout_key = jax.random.split(key, 4)
        t = jax.random.randint(t_key, (len(x0),), 0, schedule.num_timesteps)
        eps = jax.random.normal(noise_key, x0.shape)
        y = None
        if num_classes is not None:
            y = batch["label"]
        if y is not None and null_class is not None:
            drop = jax.random.bernoulli(label_key, label_dropout, (len(x0),))
            y = jnp.where(drop, null_class, y)
        x = q_sample(schedule, x0, t, eps)
        predicted = apply(params, x, t.astype(jnp.float32), y, dropout_key)
        return jnp.mean(jnp.square(predicted.astype(jnp.float32) - eps)), {}

    return loss_fn


def classifier_loss(
    apply: Callable, *, label_smoothing: float = 0.1, shift: int = 2, flip: bool = True
) -> LossFn:
    """Cross-entropy with smoothed labels on randomly shifted and mirrored images.

    Args:
      apply: (params, x [B, H, W, C] in [-1, 1], dropout_key) -> (logits [B, K], features).
      label_smoothing: share of the target spread over all classes.
      shift: largest shift in pixels in each direction; what comes in is black.
      flip: mirror left to right with probability one half.
    """

    def loss_fn(params, batch, key):
        augment_key, dropout_key = jax.random.split(key)
        images = augment(augment_key, batch["image"], shift=shift, flip=flip)
        logits, _ = apply(params, to_unit_range(images), dropout_key)
        labels = jax.nn.one_hot(batch["label"], logits.shape[-1])
        targets = optax.smooth_labels(labels, label_smoothing)
        loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
        correct = jnp.argmax(logits, axis=-1) == batch["label"]
        return loss, {"accuracy": jnp.mean(correct.astype(jnp.float32))}

    return loss_fn


def augment(key: jax.Array, images: jax.Array, *, shift: int, flip: bool) -> jax.Array:
    """Shifts images by -shift..shift pixels and mirrors half of them; uint8 [B, H, W, C]."""
    count, height, width, _ = images.shape
    shift_key, flip_key = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    offsets = jax.random.randint(shift_key, (count, 2), 0, 2 * shift + 1)

    def crop(image, offset):
        start = (offset[0], offset[1], 0)
        return jax.lax.dynamic_slice(image, start, (height, width, image.shape[-1]))

    images = jax.vmap(crop)(padded, offsets)
    if not flip:
        return images
    mirrored = jax.random.bernoulli(flip_key, 0.5, (count, 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)
