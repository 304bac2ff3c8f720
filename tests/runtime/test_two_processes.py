"""A real two-process run trains like one process, saves once, and resumes."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from qdiff_jax.runtime import checkpoint
from qdiff_jax.runtime.metrics import read_metrics
from qdiff_jax.runtime.weights import load_weights

ROOT = pathlib.Path(__file__).parents[2]

_RUN = """
import sys
import jax
count, rank, port, workdir, total = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2 // int(count))
if int(count) > 1:
    jax.distributed.initialize(f"localhost:{port}", int(count), int(rank))
assert jax.device_count() == 2
from experiments.train import train
from qdiff_jax.config import load_config
config = load_config("configs/train_classifier_fashion.py:smoke", {
    "optimizer.total_steps": 8, "run.checkpoint_every": 4, "run.keep": 9, "run.visit_every": 8})
if total == "4":  # stop half-way, as a preemption would
    from experiments import train as module
    module.fit = lambda *a, fit=module.fit, **k: fit(*a, **{**k, "total": 4})
train(config, workdir)
"""


def _free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def _run(workdir, count, total=8):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    port = _free_port()
    arguments = [str(port), str(workdir), str(total)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _RUN, str(count), str(rank), *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, outputs


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    _run(tmp_path / "one", 1)
    _run(tmp_path / "two", 2, total=4)
    assert checkpoint.all_steps(tmp_path / "two" / "checkpoints") == [4]
    _run(tmp_path / "two", 2)
    assert checkpoint.all_steps(tmp_path / "two" / "checkpoints") == [4, 8]
    assert [r["step"] for r in read_metrics(tmp_path / "two")] == [4, 8]
    one, two = (load_weights(tmp_path / name / "weights.safetensors")[0] for name in ("one", "two"))
    for layer in one:
        for name in one[layer]:
            np.testing.assert_allclose(one[layer][name], two[layer][name], rtol=1e-4, atol=1e-5)
