"""Trains a diffusion model or the classifier that judges its images.

    python -m experiments.train --config=configs/train_unet_fashion.py --workdir=W \
        --config.data.source=idx:/data/fashion_mnist

Where a run starts from, in this order:
  1. the newest checkpoint of its own workdir (so the same command again resumes it);
  2. `config.start.workdir`: the newest checkpoint of another one, optimizer and step included;
  3. `config.start.weights`: the weights of a .safetensors file, at step 0;
  4. scratch.

Leaves in the workdir: config.json, metrics.jsonl, checkpoints/, samples/ and, when done, the
averaged weights as weights.safetensors (or as the file of --export).
"""

import dataclasses
import pathlib
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from qdiff_jax.config import claim_workdir, to_dataclass
from qdiff_jax.data.images import Images, batches, load_images, to_uint8, to_unit_range
from qdiff_jax.diffusion.sample import sample
from qdiff_jax.diffusion.samplers import ddim
from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.diffusion.timesteps import make_timesteps
from qdiff_jax.models.classifier import Classifier, ClassifierConfig
from qdiff_jax.models.unet_ddpm import UNetConfig, UNetDDPM
from qdiff_jax.runtime import checkpoint
from qdiff_jax.runtime.cache import enable_compile_cache
from qdiff_jax.runtime.fit import RunConfig, fit
from qdiff_jax.runtime.mesh import data_mesh, replicate, shard_batch
from qdiff_jax.runtime.metrics import metrics_writer
from qdiff_jax.runtime.progress import log_progress
from qdiff_jax.runtime.weights import fit_weights, load_weights, save_weights
from qdiff_jax.stages.train import (
    OptimizerConfig,
    classifier_loss,
    diffusion_loss,
    init_state,
    make_optimizer,
    make_step,
)

# What may change between a run and its resumption: it does not touch the result.
FREE_TO_CHANGE = ("run", "sample")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """source: see data/images.py; pad_to: side to pad to; limit: first so many images; batch:
    global."""

    source: str
    batch: int
    pad_to: int | None = None
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The forward process, and how often a label becomes the null class."""

    schedule: str = "linear"
    timesteps: int = 1000
    label_dropout: float = 0.1


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """For the classifier: shift in pixels, mirroring, label smoothing."""

    shift: int = 2
    flip: bool = True
    label_smoothing: float = 0.1


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Grids drawn while training: DDIM steps, and images (a row of ten classes each ten)."""

    steps: int = 20
    count: int = 40


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """Where to start when the workdir has no checkpoint; at most one of the two."""

    workdir: str = ""
    weights: str = ""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """kind: "diffusion" (model: UNetConfig) or "classifier" (model: ClassifierConfig)."""

    kind: str
    seed: int
    data: DataConfig
    model: dict
    optimizer: OptimizerConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    augment: AugmentConfig = AugmentConfig()
    sample: SampleConfig = SampleConfig()
    start: StartConfig = StartConfig()
    run: RunConfig = RunConfig()


class Task(NamedTuple):
    """What differs between the kinds: parameters, loss, what to look at while training,
    metadata."""

    params: dict
    loss_fn: object
    visit: object
    metadata: dict


def train(config, workdir, export: str | None = None) -> int:
    """Runs a training config to its end, or until asked to stop; returns the steps taken.

    Args:
      config: ConfigDict or mapping with the fields of TrainConfig.
      workdir: where everything goes; used again, it resumes.
      export: file for the weights; by default workdir/weights.safetensors.
    """
    config = to_dataclass(TrainConfig, config)
    workdir = pathlib.Path(workdir)
    if config.kind not in _TASKS:
        raise ValueError(f"config.kind {config.kind!r} is not one of {', '.join(_TASKS)}.")
    data = load_images(
        config.data.source, "train", pad_to=config.data.pad_to, limit=config.data.limit
    )
    task = _TASKS[config.kind](config, data, workdir)
    claim_workdir(workdir, config, FREE_TO_CHANGE, write=jax.process_index() == 0)

    mesh = data_mesh()
    optimizer = make_optimizer(config.optimizer)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    state = replicate(init_state(task.params, optimizer, key), mesh)
    state, start = _start(config, workdir, state)
    total = config.optimizer.total_steps

    def load(first: int, count: int):
        return shard_batch(
            batches(data, config.seed, first, count, config.data.batch), mesh, axis=1
        )

    state, done = fit(
        make_step(task.loss_fn, config.optimizer, mesh),
        state,
        load,
        start=start,
        total=total,
        run=config.run,
        checkpoints=workdir / "checkpoints",
        write=metrics_writer(workdir, tensorboard=config.run.tensorboard),
        visit=task.visit,
        what=f"training {config.kind}",
    )
    if done == total and jax.process_index() == 0:
        path = pathlib.Path(export or workdir / "weights.safetensors")
        save_weights(path, jax.device_get(state.ema), {**task.metadata, "step": done})
        logging.info("wrote %s", path)
    return done


def _start(config: TrainConfig, workdir: pathlib.Path, state):
    """The state to go on from and its step; the order is in the module's docstring."""
    for folder in (workdir, pathlib.Path(config.start.workdir or workdir)):
        if checkpoint.latest_step(folder / "checkpoints") is not None:
            restored = checkpoint.restore(folder / "checkpoints", state)
            logging.info("resuming from step %d of %s", restored.step, folder)
            return restored.tree, restored.step
    if config.start.workdir:
        raise ValueError(f"config.start.workdir {config.start.workdir} has no complete checkpoint.")
    if config.start.weights:
        weights, _ = load_weights(config.start.weights)
        weights = fit_weights(weights, state.params, config.start.weights)
        weights = jax.tree.map(
            lambda old, new: jax.device_put(jnp.asarray(new), old.sharding), state.params, weights
        )
        copy = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), weights)
        logging.info("starting from the weights %s", config.start.weights)
        return state.replace(params=weights, ema=copy), 0
    return state, 0


# --- the two kinds: (config, data, workdir) -> Task ---


def _diffusion(config: TrainConfig, data: Images, workdir: pathlib.Path) -> Task:
    model_config = to_dataclass(UNetConfig, config.model, "config.model")
    _check_shape(data, (model_config.resolution, model_config.resolution, model_config.in_channels))
    classes = model_config.num_classes
    if classes is not None and data.num_classes > classes:
        raise ValueError(
            f"the data have {data.num_classes} classes, config.model.num_classes is {classes}."
        )
    model = UNetDDPM(model_config)
    schedule = make_schedule(config.diffusion.schedule, config.diffusion.timesteps)
    shape = data.images.shape[1:]
    labels = None if classes is None else jnp.zeros((1,), jnp.int32)
    params = jax.jit(model.init)(
        jax.random.key(config.seed), jnp.zeros((1, *shape)), jnp.zeros((1,)), labels
    )["params"]

    def apply(params, x, t, y, key):
        return model.apply({"params": params}, x, t, y, train=True, rngs={"dropout": key})

    def predict(variables, x, ctx, y):
        return model.apply(variables, x, jnp.full(len(x), ctx.t), y)

    grid = make_timesteps("leading", config.diffusion.timesteps, config.sample.steps)
    plan = ddim(schedule, grid)
    indices = np.arange(config.sample.count)
    y = None if classes is None else indices.astype(np.int32) % classes

    def visit(step: int, state) -> dict:
        params = jax.tree.map(jnp.asarray, jax.device_get(state.ema))
        key = jax.random.key(config.seed)  # the same noise each time, so that grids can be compared
        x = sample(predict, {"params": params}, plan, key, indices, shape=shape, y=y).x
        _save_grid(workdir / "samples" / f"{step:07d}.png", to_uint8(x))
        return {"sample_std": float(x.std())}

    metadata = {
        "kind": "diffusion",
        "model": dataclasses.asdict(model_config),
        "schedule": dataclasses.asdict(config.diffusion),
    }
    loss_fn = diffusion_loss(
        apply, schedule, num_classes=classes, label_dropout=config.diffusion.label_dropout
    )
    return Task(params, loss_fn, visit, metadata)


def _classifier(config: TrainConfig, data: Images, workdir: pathlib.Path) -> Task:
    model_config = to_dataclass(ClassifierConfig, config.model, "config.model")
    _check_shape(data, (model_config.resolution, model_config.resolution, model_config.in_channels))
    test = load_images(
        config.data.source,
        "test",
        pad_to=config.data.pad_to,
        limit=config.data.limit,
        num_classes=model_config.num_classes,
    )
    model = Classifier(model_config)
    shape = data.images.shape[1:]
    params = jax.jit(model.init)(jax.random.key(config.seed), jnp.zeros((1, *shape)))["params"]

    def apply(params, x, key):
        return model.apply({"params": params}, x, train=True, rngs={"dropout": key})

    @jax.jit
    def predict(params, images):
        logits, _ = model.apply({"params": params}, to_unit_range(images))
        return jnp.argmax(logits, axis=-1)

    def visit(step: int, state) -> dict:
        params = jax.tree.map(jnp.asarray, jax.device_get(state.ema))
        size = min(500, len(test.images))
        correct = 0
        for first in range(0, len(test.images), size):
            images, labels = test.images[first : first + size], test.labels[first : first + size]
            padded = np.pad(images, ((0, size - len(images)), (0, 0), (0, 0), (0, 0)))
            correct += int(np.sum(np.asarray(predict(params, padded))[: len(images)] == labels))
        accuracy = correct / len(test.images)
        logging.info("step %d: test accuracy %.4f", step, accuracy)
        return {"test_accuracy": accuracy}

    metadata = {"kind": "classifier", "model": dataclasses.asdict(model_config)}
    loss_fn = classifier_loss(apply, **dataclasses.asdict(config.augment))
    return Task(params, loss_fn, visit, metadata)


_TASKS = types.MappingProxyType({"diffusion": _diffusion, "classifier": _classifier})


def _check_shape(data: Images, shape: tuple[int, ...]) -> None:
    if data.images.shape[1:] != shape:
        raise ValueError(
            f"images are {data.images.shape[1:]} where the model takes {shape}; set "
            "config.data.pad_to or the model's resolution and in_channels."
        )


def _save_grid(path: pathlib.Path, images: np.ndarray, columns: int = 10) -> None:
    """uint8 [N, H, W, C] as one PNG of `columns` images a row; process 0 only."""
    if jax.process_index() != 0:
        return
    from PIL import Image

    count, height, width, channels = images.shape
    rows = -(-count // columns)
    sheet = np.zeros((rows * columns, height, width, channels), np.uint8)
    sheet[:count] = images
    sheet = sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    sheet = sheet.reshape(rows * height, columns * width, channels)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(path)


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    log_progress()
    if flags.FLAGS.distributed:
        jax.distributed.initialize()
    enable_compile_cache(flags.FLAGS.compile_cache)
    train(flags.FLAGS.config, flags.FLAGS.workdir, flags.FLAGS.export)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file, path:arg.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Checkpoints, metrics and samples go here.")
    flags.DEFINE_string("export", None, "Where the final weights go, a .safetensors file.")
    flags.DEFINE_string("compile_cache", None, "Folder for compiled programs.")
    flags.DEFINE_bool("distributed", False, "Join the other processes of a multi-host run.")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
