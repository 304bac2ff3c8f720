"""Checkpoints bring back any tree bit for bit, and never pass a damaged one off as good."""

import logging as python_logging
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qdiff_jax.runtime import checkpoint
from qdiff_jax.runtime.mesh import data_mesh, replicate, shard_batch


@flax.struct.dataclass
class State:
    params: dict
    opt_state: object
    key: jax.Array
    note: str = flax.struct.field(pytree_node=False, default="static")


def _state(value=0.0):
    params = {
        "kernel": jnp.arange(6.0).reshape(2, 3) + value,
        "half": jnp.ones(4, jnp.bfloat16),
        "codes": np.arange(-3, 3, dtype=np.int8),
        "empty": jnp.zeros((0, 5), jnp.int32),
        "flag": jnp.array(True),
    }
    return State(params, optax.adam(1e-3).init(params["kernel"]), jax.random.key(7)), {"n": 3}


def _same(a, b):
    keyless = lambda t: jax.tree.map(  # noqa: E731
        lambda x: jax.random.key_data(x) if checkpoint._is_key(x) else x, t
    )
    chex.assert_trees_all_equal(keyless(a), keyless(b))
    assert [np.asarray(x).dtype for x in jax.tree.leaves(keyless(a))] == [
        np.asarray(x).dtype for x in jax.tree.leaves(keyless(b))
    ]


def test_any_pytree_round_trips(tmp_path):
    tree = _state()
    checkpoint.save(tmp_path, 5, tree)
    restored = checkpoint.restore(tmp_path, tree)
    assert restored.step == 5
    _same(restored.tree, tree)
    assert jax.tree.structure(restored.tree) == jax.tree.structure(tree)
    assert isinstance(restored.tree[0].params["codes"], np.ndarray)
    assert isinstance(restored.tree[1]["n"], int)
    # The key must go on working as a key.
    assert jax.random.normal(restored.tree[0].key) == jax.random.normal(jax.random.key(7))


def test_newest_are_kept_and_found(tmp_path):
    assert checkpoint.latest_step(tmp_path / "none") is None
    for step in (1, 2, 30):
        checkpoint.save(tmp_path, step, {"x": jnp.float32(step)}, keep=2)
    assert checkpoint.all_steps(tmp_path) == [2, 30]
    assert checkpoint.latest_step(tmp_path) == 30
    template = {"x": jnp.float32(0)}
    assert checkpoint.restore(tmp_path, template, 2).tree["x"] == 2
    checkpoint.save(tmp_path, 30, {"x": jnp.float32(-1)})
    assert checkpoint.restore(tmp_path, template).tree["x"] == -1
    with pytest.raises(checkpoint.CheckpointError, match=r"step 1 under .* it has \[2, 30\]"):
        checkpoint.restore(tmp_path, template, 1)
    with pytest.raises(checkpoint.CheckpointError, match="no complete checkpoint"):
        checkpoint.restore(tmp_path / "none", template)


def test_restores_onto_the_templates_devices(tmp_path):
    many, one = data_mesh(), data_mesh(jax.devices()[:1])
    x = np.arange(16.0, dtype=np.float32).reshape(8, 2)
    checkpoint.save(tmp_path, 0, {"x": shard_batch(x, many), "w": replicate(x, many)})
    for template in (
        {"x": replicate(x, one), "w": shard_batch(x, many)},
        {"x": x, "w": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicate(x, many).sharding)},
    ):
        restored = checkpoint.restore(tmp_path, template).tree
        for name, leaf in template.items():
            np.testing.assert_array_equal(restored[name], x)
            if isinstance(leaf, np.ndarray):
                assert isinstance(restored[name], np.ndarray)
            else:
                assert restored[name].sharding == leaf.sharding


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"a": jnp.zeros(2)}, r"has .*\['b'\].* more"),
        ({"a": jnp.zeros(2), "b": jnp.zeros(3), "c": jnp.zeros(1)}, r"lacks .*\['c'\]"),
        ({"a": jnp.zeros(2), "b": jnp.zeros(4)}, r"\['b'\] was saved as float32\[3\]"),
        ({"a": jnp.zeros(2), "b": jnp.zeros(3, jnp.int32)}, r"int32\[3\] is expected"),
    ],
)
def test_another_tree_is_refused_by_name(tmp_path, template, message):
    checkpoint.save(tmp_path, 0, {"a": jnp.zeros(2), "b": jnp.zeros(3)})
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.restore(tmp_path, template)


def test_leaves_that_are_no_arrays_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"\['name'\] is a str"):
        checkpoint.save(tmp_path, 0, {"name": "x"})


def _damage(folder: pathlib.Path):
    """Flips one bit in the largest stored file."""
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


@pytest.fixture
def warnings_seen():
    """absl does not hand its records to the root logger that caplog listens on."""
    records = []
    handler = python_logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = python_logging.getLogger("absl")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def test_damage_is_found_and_the_step_before_used_with_a_warning(tmp_path, warnings_seen):
    rng = np.random.default_rng(0)
    trees = [{"x": rng.normal(size=(64, 64)).astype(np.float32)} for _ in range(2)]
    for step, tree in enumerate(trees):
        checkpoint.save(tmp_path, step, tree)
    _damage(tmp_path / "1")
    restored = checkpoint.restore(tmp_path, trees[0])
    assert restored.step == 0
    np.testing.assert_array_equal(restored.tree["x"], trees[0]["x"])
    assert any("1 is damaged" in message for message in warnings_seen)
    with pytest.raises(checkpoint.CheckpointError, match="1 is damaged .* delete that folder"):
        checkpoint.restore(tmp_path, trees[0], 1)
    _damage(tmp_path / "0")
    with pytest.raises(checkpoint.CheckpointError, match="0 is damaged"):
        checkpoint.restore(tmp_path, trees[0])


def test_a_full_disk_is_said_so(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 0, {"x": jnp.ones(3)})
    usage = type("Usage", (), {"free": 5})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        checkpoint.CheckpointError, match="disk is too full to save step 1 .*5 free"
    ):
        checkpoint.save(tmp_path, 1, {"x": jnp.ones(3)})
    monkeypatch.undo()
    assert checkpoint.restore(tmp_path, {"x": jnp.zeros(3)}).step == 0


_SAVER = """
import os, sys, numpy as np
from qdiff_jax.runtime import checkpoint
x = np.ones((64, 256), np.float32)
for step in range(10**6):
    checkpoint.save(sys.argv[1], step, {"x": x * step}, keep=2)
    print(step, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05])
def test_kill_while_saving_leaves_only_whole_steps(tmp_path, delay):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_SAVER), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    for line in process.stdout:
        if int(line) == 2:
            break
    try:
        process.wait(delay + 1e-3)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    restored = checkpoint.restore(tmp_path, {"x": np.zeros((64, 256), np.float32)})
    assert restored.step >= 2
    np.testing.assert_array_equal(restored.tree["x"], np.float32(restored.step))
    # The remains of the interrupted save are no obstacle, and the next one sweeps them away.
    checkpoint.save(tmp_path, restored.step + 1, restored.tree, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [str(restored.step + 1)]
