"""The benchmark runs, compares what it says it compares, and shows what it measured."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from experiments import bench
from experiments.bench_timing import Timing, interleave, ratio
from qdiff_jax.models import registry


def test_rivals_take_turns_and_warm_up_first():
    calls = []
    times = interleave({name: lambda n=name: calls.append(n) for name in "abc"}, rounds=3)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert all(timing.wall.shape == timing.cpu.shape == (3,) for timing in times.values())


def test_ratio_is_taken_within_a_round():
    """A round in which the machine was twice as slow for both says the same as the others."""
    ours, theirs = np.array([1.2, 2.4, 1.2]), np.array([1.0, 2.0, 1.0])
    found = ratio(Timing(2 * ours, ours), Timing(theirs, theirs))
    assert found["ratio"] == pytest.approx(1.2)
    assert found["ratio_wall"] == pytest.approx(2.4)
    assert found["ratio_low"] == found["ratio_high"] == pytest.approx(1.2)


def test_summary_is_per_repetition():
    timing = Timing(np.array([0.2, 0.4, 0.3]), np.array([0.1, 0.1, 0.1]))
    assert timing.summary(10) == pytest.approx({"wall_ms": 30.0, "cpu_ms": 10.0, "spread": 0.0})


@pytest.mark.slow
def test_quick_run_fills_every_row(tmp_path):
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "experiments.bench", "--quick", "--threads=1", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(out.read_text())["threads"]["1"]
    assert [row["unit"] for row in rows["steps"]] == ["mid_block_1", "temb"]
    for row in rows["steps"]:
        assert row["ours"]["cpu_ms"] > 0
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert rows["sampling"]["full precision"]["ratio"] == 1.0
    assert set(rows["sampling"]) == {"full precision", "simulated w4a8", "packed w4a8"}
    walk = rows["walk"]
    # Three equal residual blocks among nine units: one compile for them, none besides the distinct.
    assert (walk["units"], walk["distinct"], walk["step_compiles"]) == (9, 6, 6)
    assert walk["passes_weights"] + walk["passes_scales"] <= 3.0
    assert rows["ranges"]["warm_cpu_s"] < rows["ranges"]["first_cpu_s"]
    for name in ("(a)", "(b)", "(c)", "(d)", "(e)", "mid_block_1", "simulated w4a8"):
        assert name in done.stdout


def test_sizes_are_those_of_the_shipped_network():
    config = registry.load("unet_fashion").model.module.config
    assert dataclasses.replace(bench.SHIPPED, dropout=config.dropout) == config
