"""Speed of the parts that users wait for, each against a rival in the same run.

    python -m experiments.bench                 # one core and two, about six minutes
    python -m experiments.bench --threads=1     # one core alone
    python -m experiments.bench --quick         # a miniature network, to see that everything runs

Rows: (a) a step of block reconstruction against a forward and backward pass written by hand; (b) sampling
with folded weights, and with packed integers, against full precision; (c) the search of weight ranges; (d)
passes over the calibration set for all inputs and targets; (e) compiles against distinct units.

Each number of cores is measured in a process of its own, which may only run there and, for one core, with
XLA's thread pool off. Rivals are interleaved; times are medians. CPU seconds count all threads.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from experiments import command_line
from experiments.bench_sampling import sampling
from experiments.bench_units import (
    counted_loss,
    random_model,
    random_set,
    range_search,
    unit_inputs,
    unit_step,
    walk,
)
from qdiff_jax.diffusion.timesteps import make_timesteps
from qdiff_jax.eval.files import write_atomic
from qdiff_jax.models.program import units_with_projections
from qdiff_jax.models.unet_ddpm import UNetConfig
from qdiff_jax.named_policies import policy
from qdiff_jax.policy import make_plan
from qdiff_jax.sites import list_sites

# The shipped network's sizes (see its card); speed does not depend on its weights.
SHIPPED = UNetConfig(
    channels=32,
    multipliers=(1, 2, 2),
    res_blocks=1,
    attention_resolutions=(8,),
    in_channels=1,
    out_channels=1,
    groups=8,
    num_classes=10,
)
MINIATURE = UNetConfig(
    channels=8,
    multipliers=(1,),
    res_blocks=1,
    attention_resolutions=(),
    resolution=4,
    in_channels=1,
    out_channels=1,
    groups=4,
    num_classes=10,
)
RESIDUAL = ("down_2_block_0", "down_1_block_0", "down_0_block_0")  # at 8x8, 16x16, 32x32
STEP_LIMIT, SAMPLING_LIMIT = 1.3, 1.1


def measure(quick: bool, once: bool) -> dict:
    """All rows on the cores this process may use. once: also what is counted or done only once."""
    if quick:
        config, names, packed = MINIATURE, ("mid_block_1", "temb"), ("w4a8",)
        rounds, seconds, samples = 2, 0.01, 32
    else:
        config, names, packed = SHIPPED, (*RESIDUAL, "temb"), ("w8a8", "w4a8")
        rounds, seconds, samples = 9, 0.5, 64
    model = random_model(config)
    shape = (config.resolution, config.resolution, config.in_channels)
    steps = make_timesteps("leading", 1000, 2)
    calibration = random_set(shape, samples, config.num_classes, steps)
    example = (calibration.x[:2], calibration.t[:2], calibration.y[:2])
    sites = list_sites(model.module, *example)
    plans = {name: make_plan(sites, policy("common", sites, int(name[1]), 8)) for name in packed}
    state, search = range_search(model, plans["w4a8"])
    loss, traced = counted_loss()
    result = {}
    if once:
        result["ranges"] = search
        result["walk"] = walk(model, state, calibration, loss, traced)
    data = unit_inputs(model, calibration, set(names))
    units = {unit.name: unit for unit in units_with_projections(model.program)}
    result["steps"] = [
        unit_step(model, state, units[name], data[name], calibration, loss, rounds, seconds)
        for name in names
    ]
    result["sampling"] = sampling(model, shape, plans, calibration, steps, rounds)
    return result


def in_process_on(threads: int, quick: bool, once: bool) -> dict:
    """`measure` in a fresh process confined to that many cores."""
    environment = dict(os.environ)
    if threads == 1:
        flag = "--xla_cpu_multi_thread_eigen=false"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flag}".strip()
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "rows.json"
        command = [sys.executable, "-m", "experiments.bench", f"--worker={out}"]
        command += [f"--threads={threads}", f"--quick={quick}", f"--once={once}"]
        subprocess.run(command, env=environment, check=True)
        return json.loads(out.read_text())


def confine(threads: int) -> None:
    """Keep this process, and threads it will start, on the last cores of those it may use."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[-threads:])


def show(result: dict) -> None:
    """Print what `main` writes to --out."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file has no width; 80 columns would cut the tables
    steps = Table(title="(a) a reconstruction step / forward and backward by hand, batch 32")
    runs = Table(title="(b) sampling, batch 32, an evaluation of the network")
    for column in (
        "threads",
        "unit",
        "inputs",
        "ms",
        "by hand ms",
        "CPU ratio",
        "quartiles",
        "wall",
    ):
        steps.add_column(column, justify="left" if column in ("unit", "inputs") else "right")
    for column in ("threads", "network", "ms", "CPU ms", "per s", "CPU ratio", "quartiles", "wall"):
        runs.add_column(column, justify="left" if column == "network" else "right")
    for threads, rows in result["threads"].items():
        for row in rows["steps"]:
            times = (f"{row[side]['wall_ms']:.2f}" for side in ("ours", "theirs"))
            steps.add_row(threads, row["unit"], row["inputs"], *times, *_ratio_cells(row))
        for name, row in rows["sampling"].items():
            cells = (f"{row['wall_ms']:.1f}", f"{row['cpu_ms']:.1f}", f"{row['samples_per_s']:.0f}")
            runs.add_row(threads, name, *cells, *_ratio_cells(row))
    console.print(steps, f"target: at most {STEP_LIMIT} for residual blocks", runs)
    console.print(f"target: at most {SAMPLING_LIMIT} for simulated")
    for rows in result["threads"].values():
        if "walk" not in rows:
            continue
        c, w = rows["ranges"], rows["walk"]
        console.print(
            f"(c) MSE search over {c['weights']} weights: {c['first_cpu_s']:.2f} CPU s the first time "
            f"({c['compile_s']:.2f} s of it compiling), {c['warm_cpu_s']:.2f} CPU s warm"
        )
        console.print(
            f"(d) passes over the set for all inputs and targets: {w['passes_weights']} for weights, "
            f"{w['passes_scales']} for activation steps, {w['passes_ranges']} for ranges"
        )
        console.print(
            f"(e) {w['units']} units, {w['distinct']} distinct: {w['step_compiles']} steps compiled, "
            f"{w['backend_compiles']} programs in all, {w['compile_s']:.1f} s of compiling"
        )


def _ratio_cells(row: dict) -> tuple[str, str, str]:
    quartiles = f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}"
    return f"{row['ratio']:.2f}", quartiles, f"{row['ratio_wall']:.2f}"


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    options = flags.FLAGS
    if options.worker:
        logging.set_verbosity(logging.WARNING)
        confine(int(options.threads[0]))
        rows = measure(options.quick, options.once)
        write_atomic(pathlib.Path(options.worker), json.dumps(rows))
        return
    counts = [int(count) for count in options.threads]
    result = {
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": {
            str(count): in_process_on(count, options.quick, count == counts[0]) for count in counts
        },
    }
    show(result)
    if options.out:
        write_atomic(pathlib.Path(options.out), json.dumps(result, indent=1))


if __name__ == "__main__":
    flags.DEFINE_list("threads", ["1", "2"], "Numbers of cores to measure on, comma-separated.")
    flags.DEFINE_bool("quick", False, "A miniature network and two rounds: seconds, not figures.")
    flags.DEFINE_string("out", None, "JSON file for the figures.")
    flags.DEFINE_string("worker", None, "Set by this program for its own processes.")
    flags.DEFINE_bool("once", True, "Set by this program for its own processes.")
    command_line.run(main)
