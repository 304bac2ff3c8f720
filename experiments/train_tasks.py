"""What a training run trains: its config, and for each kind the loss and what is looked at on the way."""

import dataclasses
import pathlib
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from qdiff_jax.config import to_dataclass
from qdiff_jax.data.images import Images, load_images, to_uint8, to_unit_range
from qdiff_jax.diffusion.sample import sample
from qdiff_jax.diffusion.samplers import ddim
from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.diffusion.timesteps import make_timesteps
from qdiff_jax.models.classifier import Classifier, ClassifierConfig
from qdiff_jax.models.families import example_inputs, make_module, model_json, parse_model
from qdiff_jax.runtime.fit import RunConfig
from qdiff_jax.stages.train import OptimizerConfig, classifier_loss, diffusion_loss


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
    """kind: "diffusion" (model: "family" and its sizes) or "classifier" (model: ClassifierConfig)."""

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


def _diffusion(config: TrainConfig, data: Images, workdir: pathlib.Path) -> Task:
    model_config = parse_model(config.model, "config.model")
    _check_shape(data, (model_config.resolution, model_config.resolution, model_config.in_channels))
    classes = model_config.num_classes
    if classes is not None and data.num_classes > classes:
        raise ValueError(
            f"the data have {data.num_classes} classes, config.model.num_classes is {classes}."
        )
    if getattr(model_config, "learn_sigma", False):
        raise ValueError(
            "config.model learns its variance (learn_sigma), and training fits the noise estimate alone; "
            "set learn_sigma to False, or out_channels to in_channels."
        )
    model = make_module(model_config)
    schedule = make_schedule(config.diffusion.schedule, config.diffusion.timesteps)

    def apply(params, x, t, y, key):
        return model.apply({"params": params}, x, t, y, train=True, rngs={"dropout": key})

    loss_fn = diffusion_loss(
        apply,
        schedule,
        num_classes=classes,
        null_class=model_config.null_class,
        label_dropout=config.diffusion.label_dropout,
    )
    shape = data.images.shape[1:]
    example = example_inputs(model_config)
    params = jax.jit(model.init)(jax.random.key(config.seed), *example)["params"]

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
        "model": model_json(model_config),
        "schedule": dataclasses.asdict(config.diffusion),
    }
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


TASKS = types.MappingProxyType({"diffusion": _diffusion, "classifier": _classifier})


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
