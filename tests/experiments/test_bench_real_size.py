"""The bench of real sizes: names of released files, and the peak memory of reading one."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.bench_real_size import (
    load,
    one_sample,
    read_unet,
    released_name,
    table,
    torch_shape,
    write_random,
)
from qdiff_jax.models.dit import DiTConfig
from qdiff_jax.models.published import PUBLISHED
from qdiff_jax.runtime.state_dicts import load_state_dict
from qdiff_jax.stages.stage import leaves_by_path

from ..main_job import ROOT, environment
from ..models.ldm_cases import CONFIGS

TINY = {
    **CONFIGS,
    "dit": DiTConfig(width=16, depth=2, heads=2, resolution=4, num_classes=3),
}


@pytest.mark.parametrize("name", TINY)
def test_random_files_have_the_names_that_the_strict_reader_wants(name, tmp_path):
    config, path = TINY[name], tmp_path / "weights.safetensors"
    size = write_random(config, path)
    params, tensors = leaves_by_path(load(config, path)), load_state_dict(path)
    assert size > 4 * sum(leaf.size for leaf in params.values())
    assert len(tensors) == len(params)
    for ours, leaf in params.items():
        tensor = np.asarray(tensors[released_name(ours, config)])
        assert tensor.shape == torch_shape(ours, leaf.shape)
        if leaf.ndim == 4:
            tensor = tensor.transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(
            tensor.T if leaf.ndim == 2 and "kernel" in ours else tensor, leaf
        )


def test_a_whole_checkpoint_is_read_as_its_network_alone(tmp_path):
    config, path = TINY["text"], tmp_path / "weights.safetensors"
    write_random(config, path)
    alone = load_state_dict(path)
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in alone.items()}
    whole["betas"] = np.zeros(1000, np.float32)
    for mine, theirs in zip(
        jax.tree.leaves(read_unet(whole, config, path)),
        jax.tree.leaves(load(config, path)),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_a_sample_has_the_condition_of_its_network():
    assert one_sample(TINY["dit"]).y.dtype == np.int32
    assert one_sample(TINY["text"]).y.shape == (1, 7, 24)
    assert one_sample(TINY["ldm4"]).y is None


def test_the_table_sets_peaks_beside_the_file():
    row = {"cpu": 3.2, "wall": 4.6, "peak": 3.0, "details": {"loading": 2.9}}
    lines = table("sd-v1-4", 2**31, 2**29, {"load": row}).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["sd-v1-4", "2.00", "load", "3", "5", "loading 3", "3.00", "1.50"]
    assert "0.50 GiB" in lines[-1]


# A tenth of Stable Diffusion's U-Net, in a process of its own.
CHILD = """
import dataclasses, json, pathlib, re, sys
import jax.numpy as jnp
from experiments.bench_real_size import load, peak
from qdiff_jax.models.families import parameter_shapes
from qdiff_jax.models.published import PUBLISHED

config = dataclasses.replace(PUBLISHED["sd-v1-4"].network, channels=96)
parameter_shapes(config)  # traced before the count begins, as is the start of the backend
jnp.zeros(1).block_until_ready()
before = int(re.search(r"VmRSS:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 2**20
params = load(config, pathlib.Path(sys.argv[1]))
print(json.dumps({"before": before, "peak": peak()}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_peaks_below_1_3_times_the_file(tmp_path):
    config = dataclasses.replace(PUBLISHED["sd-v1-4"].network, channels=96)
    path = tmp_path / "weights.safetensors"
    size = write_random(config, path) / 2**30
    assert size > 0.25
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert size < found["peak"] - found["before"] < 1.3 * size, (found, size)
