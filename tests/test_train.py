"""Training end to end: it learns, resumes exactly, does not depend on devices, and exports."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.train import train
from qdiff_jax.config import load_config
from qdiff_jax.data.images import batches, load_images
from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.models import registry
from qdiff_jax.models.classifier import Classifier, ClassifierConfig
from qdiff_jax.runtime import checkpoint
from qdiff_jax.runtime.loop import run_steps
from qdiff_jax.runtime.mesh import data_mesh, replicate, shard_batch
from qdiff_jax.runtime.metrics import read_metrics
from qdiff_jax.runtime.weights import load_weights, save_weights
from qdiff_jax.stages import train as stage

ROOT = pathlib.Path(__file__).parents[1]
CLASSIFIER = str(ROOT / "configs" / "train_classifier_fashion.py:smoke")
UNET = str(ROOT / "configs" / "train_unet_fashion.py:smoke")
DIT = str(ROOT / "configs" / "train_dit_fashion.py:smoke")


def _classifier(**overrides):
    return load_config(CLASSIFIER, {f"{k.replace('__', '.')}": v for k, v in overrides.items()})


def _leaves_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


# --- the pure parts ---


def test_learning_rates():
    cosine = stage.learning_rate(stage.OptimizerConfig(total_steps=100, peak_lr=1.0, warmup=10))
    assert [float(cosine(i)) for i in (0, 5, 10, 100)] == pytest.approx([0, 0.5, 1, 0])
    assert float(cosine(55)) == pytest.approx(0.5)
    config = stage.OptimizerConfig(
        total_steps=100, peak_lr=1.0, warmup=10, schedule="constant", cooldown=20
    )
    constant = stage.learning_rate(config)
    found = [float(constant(i)) for i in (5, 10, 79, 80, 90, 100)]
    assert found == pytest.approx([0.5, 1, 1, 1, 0.5, 0])
    flat = dataclasses.replace(config, cooldown=0, warmup=0)
    assert float(stage.learning_rate(flat)(99)) == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(schedule="linear"), "'linear' is not one of"),
        (dict(warmup=10), "must lie in"),
        (dict(cooldown=5), "belongs to schedule 'constant'"),
        (dict(schedule="constant", cooldown=9, warmup=2), "does not fit"),
        (dict(ema=1.0), "must be in"),
        (dict(clip=0.0), "positive"),
    ],
)
def test_optimizer_configs_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        stage.OptimizerConfig(**{"total_steps": 10, "warmup": 0, **fields})


def test_weight_decay_spares_biases_and_scales():
    config = stage.OptimizerConfig(total_steps=9, peak_lr=0.1, warmup=0, weight_decay=0.5)
    optimizer = stage.make_optimizer(config)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    with jax.numpy_dtype_promotion("standard"):
        zero = jax.tree.map(jnp.zeros_like, params)
        updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_a_perfect_noise_predictor_has_no_loss():
    """Recovers eps from x_t in closed form for black images, where x0 = -1 is known."""
    schedule = make_schedule("linear", 50)
    ab = jnp.asarray(schedule.alpha_bar, jnp.float32)
    labels = []

    def apply(params, x, t, y, key):
        labels.append(y)
        a = ab[t.astype(jnp.int32)][:, None, None, None]
        return (x + jnp.sqrt(a)) / jnp.sqrt(1 - a) * params

    batch = {"image": jnp.zeros((256, 16, 16, 1), jnp.uint8), "label": jnp.full(256, 3)}
    loss_fn = stage.diffusion_loss(
        apply, schedule, num_classes=10, null_class=10, label_dropout=0.25
    )
    loss, _ = loss_fn(1.0, batch, jax.random.key(0))
    assert float(loss) < 1e-6
    assert float(loss_fn(0.0, batch, jax.random.key(0))[0]) == pytest.approx(1.0, abs=0.02)
    assert set(np.asarray(labels[0]).tolist()) == {3, 10}
    assert 0.15 < float(jnp.mean((labels[0] == 10).astype(jnp.float32))) < 0.35
    unconditional = stage.diffusion_loss(apply, schedule, num_classes=None, null_class=None)
    unconditional(1.0, batch, jax.random.key(0))
    assert labels[-1] is None
    # Classes without a null class: labels stay, or are refused to be dropped.
    kept = stage.diffusion_loss(apply, schedule, num_classes=10, null_class=None, label_dropout=0.0)
    kept(1.0, batch, jax.random.key(0))
    np.testing.assert_array_equal(labels[-1], batch["label"])
    with pytest.raises(
        ValueError, match=r"label_dropout=0\.1 .* null class, which this model does not"
    ):
        stage.diffusion_loss(apply, schedule, num_classes=10, null_class=None)


def test_augmentation_moves_whole_images():
    image = np.zeros((64, 9, 9, 1), np.uint8)
    image[:, 4, 3] = 200  # one bright pixel, left of the middle
    moved = np.asarray(stage.augment(jax.random.key(0), jnp.asarray(image), shift=2, flip=True))
    assert moved.shape == image.shape
    np.testing.assert_array_equal(moved.sum(axis=(1, 2, 3)), 200)
    rows, columns = np.nonzero(moved)[1:3]
    assert set(rows) == {2, 3, 4, 5, 6}
    assert set(columns) == {1, 2, 3, 4, 5, 6, 7}  # 3 +- 2, and mirrored 5 +- 2
    still = stage.augment(jax.random.key(0), jnp.asarray(image), shift=0, flip=False)
    np.testing.assert_array_equal(still, image)


def _tiny_task():
    model = Classifier(ClassifierConfig(widths=(4, 8), blocks=(0, 1), dropout=0.2))
    data = load_images("synthetic:64")
    params = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 1)))["params"]
    config = stage.OptimizerConfig(total_steps=20, warmup=2, peak_lr=1e-2, weight_decay=0.01)
    loss_fn = stage.classifier_loss(
        lambda p, x, key: model.apply({"params": p}, x, train=True, rngs={"dropout": key})
    )
    return data, params, config, loss_fn


def test_one_device_and_eight_train_alike():
    data, params, config, loss_fn = _tiny_task()
    finals = []
    for mesh in (data_mesh(jax.devices()[:1]), data_mesh()):
        optimizer = stage.make_optimizer(config)
        state = replicate(stage.init_state(params, optimizer, jax.random.key(1)), mesh)
        step = stage.make_step(loss_fn, config, mesh)
        xs = shard_batch(batches(data, 0, 0, 3, 16), mesh, axis=1)
        state, metrics = run_steps(step, state, xs)
        assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state))
        finals.append((state.params, metrics["loss"]))
    for one, eight in zip(*map(jax.tree.leaves, finals), strict=True):
        np.testing.assert_allclose(one, eight, rtol=2e-4, atol=2e-5)


def test_scan_and_host_loop_train_alike_and_the_loss_falls():
    data, params, config, loss_fn = _tiny_task()
    mesh = data_mesh(jax.devices()[:1])
    step = stage.make_step(loss_fn, config, mesh)
    first = stage.init_state(params, stage.make_optimizer(config), jax.random.key(1))
    xs = batches(data, 0, 0, 20, 32)
    host, metrics = run_steps(step, first, xs, scan=False)
    assert float(metrics["loss"][-5:].mean()) < float(metrics["loss"][:5].mean()) - 0.1
    assert int(host.step) == 20
    short = jax.tree.map(lambda leaf: leaf[:2], xs)
    for a, b in zip(
        jax.tree.leaves(run_steps(step, first, short, scan=False)[0].params),
        jax.tree.leaves(run_steps(step, first, short, scan=True)[0].params),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


# --- the experiment ---


def test_resumed_training_is_uninterrupted_training(tmp_path):
    assert train(_classifier(), tmp_path / "whole") == 8
    config = _classifier(run__checkpoint_every=4, run__keep=3)
    assert train(config, tmp_path / "parts") == 8
    # Go back to step 4 and run the rest again, in a fresh call.
    for step in checkpoint.all_steps(tmp_path / "parts" / "checkpoints"):
        if step > 4:
            (tmp_path / "parts" / "checkpoints" / str(step)).rename(tmp_path / f"dropped{step}")
    (tmp_path / "parts" / "weights.safetensors").unlink()
    assert train(config, tmp_path / "parts") == 8
    whole, parts = (load_weights(tmp_path / n / "weights.safetensors") for n in ("whole", "parts"))
    _leaves_equal(whole[0], parts[0])
    assert whole[1] == parts[1]
    assert [r["step"] for r in read_metrics(tmp_path / "parts")] == [4, 8]


def test_the_order_of_starts(tmp_path):
    train(_classifier(), tmp_path / "a")
    weights = tmp_path / "a" / "weights.safetensors"
    # Another workdir's checkpoint, with its step: nothing is left to do but to extend it.
    longer = _classifier(optimizer__total_steps=12, start__workdir=str(tmp_path / "a"))
    train(longer, tmp_path / "b")
    assert [r["step"] for r in read_metrics(tmp_path / "b")] == [12]
    # Weights only: from step 0, and with no learning the averaged weights are these weights.
    frozen = dict(optimizer__peak_lr=0.0, start__weights=str(weights))
    train(_classifier(**frozen), tmp_path / "c", export=str(tmp_path / "c.safetensors"))
    _leaves_equal(load_weights(tmp_path / "c.safetensors")[0], load_weights(weights)[0])
    assert [r["step"] for r in read_metrics(tmp_path / "c")] == [4, 8]
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        train(_classifier(start__workdir=str(tmp_path / "none")), tmp_path / "d")
    save_weights(weights, {"other": np.zeros(1)}, {})
    with pytest.raises(ValueError, match="does not fit this model"):
        train(_classifier(start__weights=str(weights)), tmp_path / "e")


def test_a_workdir_of_another_experiment_is_refused(tmp_path):
    train(_classifier(), tmp_path)
    with pytest.raises(ValueError, match="optimizer.peak_lr: 0.004 there, 0.1 now"):
        train(_classifier(optimizer__peak_lr=0.1), tmp_path)
    assert train(_classifier(run__log_every=2), tmp_path) == 8  # how it is watched may change


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(kind="gan"), "config.kind 'gan'"),
        (dict(model__in_channels=3), r"images are \(32, 32, 1\) where the model takes"),
        (dict(model__num_classes=4), r"outside \[0, 4\)"),
        (dict(data__batch=100), "larger than the set"),
        (dict(data__batch=12), "cannot be split over 8 devices"),
    ],
)
def test_wrong_configs_are_refused(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(_classifier(**overrides), tmp_path)


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (2, "set learn_sigma to False, or out_channels to in_channels"),
        (1, "label_dropout=0.1 makes"),
    ],
)
def test_guided_diffusions_models_are_not_trained_as_others_are(tmp_path, channels, message):
    """Two channels of output for one of input are a variance; labels without a null class stay."""
    config = load_config(UNET)
    model = dict(family="unet_ldm", channels=8, multipliers=(1,), res_blocks=1, groups=4, heads=1)
    model |= dict(head_channels=None, attention_downsampling=(), out_channels=channels)
    shared = dict(resolution=32, in_channels=1, num_classes=10)
    config.model = type(config.model)(model | shared)
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path)


@pytest.mark.parametrize("path", [UNET, DIT], ids=["unet", "dit"])
def test_diffusion_smoke(tmp_path, path):
    config = load_config(path)
    assert train(config, tmp_path) == 8
    loaded = registry.load(str(tmp_path / "weights.safetensors"))
    assert loaded.config["family"] == config.model.family
    assert loaded.schedule.num_timesteps == 1000
    eps = jax.jit(loaded.model.module.apply)(
        {"params": loaded.model.params},
        jnp.zeros((1, 32, 32, 1)),
        jnp.zeros(1),
        jnp.zeros(1, jnp.int32),
    )
    assert np.isfinite(eps).all()
    grids = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert grids == ["0000004.png", "0000008.png"]
    assert all(np.isfinite(r["sample_std"]) for r in read_metrics(tmp_path))
    # The finished run, asked again, only exports; half precision rounds and is read back as float32.
    half = tmp_path / "half.safetensors"
    assert train(config, tmp_path, str(half), 16) == 8
    assert half.stat().st_size < 0.6 * (tmp_path / "weights.safetensors").stat().st_size
    for rounded, leaf in zip(
        jax.tree.leaves(registry.load(str(half)).model.params),
        jax.tree.leaves(loaded.model.params),
        strict=True,
    ):
        assert rounded.dtype == jnp.float32
        np.testing.assert_allclose(rounded, leaf, rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_the_command_line_resumes_after_a_signal(tmp_path):
    command = [sys.executable, "-m", "experiments.train", f"--config={CLASSIFIER}"]
    command += [f"--workdir={tmp_path}", "--config.optimizer.total_steps=2000"]
    command += ["--config.run.visit_every=5000", "--config.data.source=synthetic:32"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log)
    metrics = tmp_path / "metrics.jsonl"
    while process.poll() is None and not metrics.exists():
        pass
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
    stopped = checkpoint.latest_step(tmp_path / "checkpoints")
    assert 0 < stopped < 2000
    assert not (tmp_path / "weights.safetensors").exists()
    subprocess.run(command, cwd=ROOT, env=environment, stderr=log, check=True)
    log.close()
    assert f"resuming from step {stopped} " in (tmp_path / "log").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["config"]["kind"] == "classifier"
    assert load_weights(tmp_path / "weights.safetensors")[1]["step"] == 2000
