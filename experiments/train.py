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

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from experiments import command_line
from experiments.train_tasks import TASKS, TrainConfig
from qdiff_jax.config import claim_workdir, to_dataclass
from qdiff_jax.data.images import batches, load_images
from qdiff_jax.runtime import checkpoint
from qdiff_jax.runtime.cache import enable_compile_cache
from qdiff_jax.runtime.fit import fit
from qdiff_jax.runtime.mesh import data_mesh, replicate, shard_batch
from qdiff_jax.runtime.metrics import metrics_writer
from qdiff_jax.runtime.progress import log_progress
from qdiff_jax.runtime.weights import fit_weights, load_weights, save_weights
from qdiff_jax.stages.train import init_state, make_optimizer, make_step

# What may change between a run and its resumption: it does not touch the result.
FREE_TO_CHANGE = ("run", "sample")


def train(config, workdir, export: str | None = None, export_bits: int = 32) -> int:
    """Runs a training config to its end, or until asked to stop; returns the steps taken.

    Args:
      config: ConfigDict or mapping with the fields of TrainConfig.
      workdir: where everything goes; used again, it resumes.
      export: file for the weights; by default workdir/weights.safetensors.
      export_bits: 32, or 16 for IEEE half precision (read back as float32).
    """
    config = to_dataclass(TrainConfig, config)
    workdir = pathlib.Path(workdir)
    if config.kind not in TASKS:
        raise ValueError(f"config.kind {config.kind!r} is not one of {', '.join(TASKS)}.")
    data = load_images(
        config.data.source, "train", pad_to=config.data.pad_to, limit=config.data.limit
    )
    task = TASKS[config.kind](config, data, workdir)
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
        kind = {16: np.float16, 32: np.float32}[export_bits]
        weights = jax.tree.map(lambda leaf: leaf.astype(kind), jax.device_get(state.ema))
        save_weights(path, weights, {**task.metadata, "step": done})
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


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    log_progress()
    if flags.FLAGS.distributed:
        jax.distributed.initialize()
    enable_compile_cache(flags.FLAGS.compile_cache)
    bits = int(flags.FLAGS.export_bits)
    train(flags.FLAGS.config, flags.FLAGS.workdir, flags.FLAGS.export, bits)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file, path:arg.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Checkpoints, metrics and samples go here.")
    flags.DEFINE_string("export", None, "Where the final weights go, a .safetensors file.")
    flags.DEFINE_enum("export_bits", "32", ["16", "32"], "Bits of a weight in that file.")
    flags.DEFINE_string("compile_cache", None, "Folder for compiled programs.")
    flags.DEFINE_bool("distributed", False, "Join the other processes of a multi-host run.")
    flags.mark_flags_as_required(["config", "workdir"])
    command_line.run(main)
