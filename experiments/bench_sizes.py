"""Closed-form rounding at real sizes: the seconds of each distinct layer of a network, and of all of them.

    python -m experiments.bench_sizes --model=sd-v1-4 --rows=24576 --out=W
    python -m experiments.bench_sizes --kernels=3x3x2560x1280,1x1x2560x1280 --out=W

Random rows and weights: time does not depend on values. Timed, compiling apart, in CPU seconds of all threads
(on an accelerator in seconds): the sums over rows in chunks of --chunk, the two factors, rounding to 4 bits; a
layer whose whole Hessian does not fit --hessian_mib is cut as `quant.hessian_size` says. A layer that occurs n
times counts n times; one whose estimate exceeds --most_seconds is left out and extrapolated by its
multiply-adds from the largest measured one whose Hessian is cut alike (whole, into taps, or further); without
any such it is not counted. Writes sizes_<name>.md, sizes_<name>.json.
"""

from __future__ import annotations

import collections
import json
import math
import pathlib
import resource
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from experiments import command_line
from experiments.quantize_report import made_at
from qdiff_jax.eval.files import write_atomic
from qdiff_jax.eval.tables import significant
from qdiff_jax.models.families import parameter_shapes
from qdiff_jax.models.published import PUBLISHED
from qdiff_jax.quant.hessian_size import hessian_parts, rounding_cost
from qdiff_jax.quant.moments import chunk_moments, merge
from qdiff_jax.quant.qparams import from_range
from qdiff_jax.quant.spec import QuantSpec, code_range
from qdiff_jax.runtime.progress import log_progress, progress
from qdiff_jax.stages.layer_rounding import ClosedFormConfig, round_layer


def kernels_of(model: str) -> dict[tuple[int, ...], int]:
    """{shape of a kernel: how often it occurs}. Raises ValueError for an unknown model."""
    if model not in PUBLISHED:
        raise ValueError(f"model {model!r} is unknown; there are {sorted(PUBLISHED)}.")
    leaves = jax.tree_util.tree_flatten_with_path(parameter_shapes(PUBLISHED[model].network))[0]
    shapes = (leaf.shape for path, leaf in leaves if path[-1].key == "kernel")
    return dict(collections.Counter(shapes))


def parse_kernels(text: str) -> dict[tuple[int, ...], int]:
    """ "3x3x2560x1280,..." as shapes. Raises ValueError for what is none."""
    try:
        shapes = [tuple(int(part) for part in item.split("x")) for item in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--kernels={text} must be like 3x3x320x320,1280x320.") from error
    if any(len(shape) not in (2, 4) or min(shape) < 1 for shape in shapes):
        raise ValueError(f"--kernels={text}: kernels have two or four axes of at least 1.")
    return dict(collections.Counter(shapes))


def time_layer(shape: tuple[int, ...], rows: int, chunk: int, config: ClosedFormConfig) -> dict:
    """Seconds of one layer: {"sums", "rounding", "parts"}; every program is warmed first."""
    inputs, outputs = math.prod(shape[:-1]), shape[-1]
    parts = hessian_parts(shape, config.hessian_mib)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((chunk, inputs), np.float32))
    r = jnp.asarray(0.1 * rng.standard_normal((chunk, outputs), np.float32))
    weights = jnp.ones(chunk)
    kernel = jnp.asarray(rng.standard_normal(shape, np.float32)) / np.float32(math.sqrt(inputs))
    spec = QuantSpec(granularity="channel")
    axes = tuple(range(len(shape) - 1))
    grid = from_range(spec, kernel.min(axes), kernel.max(axes), *code_range(spec, 4))
    summed = jax.jit(chunk_moments, static_argnums=3)

    # On a CPU its own seconds, which others on the machine do not lengthen.
    clock = time.process_time if jax.default_backend() == "cpu" else time.monotonic
    chunks = -(-rows // chunk)
    total = merge(*(summed(x, r, weights, parts) for _ in range(2)))
    began = clock()
    total = jax.block_until_ready(merge(total, summed(x, r, weights, parts)))
    sums = (clock() - began) * chunks
    rounded = jax.block_until_ready(round_layer(kernel, jnp.zeros(outputs), grid, total, config))
    began = clock()
    rounded = jax.block_until_ready(round_layer(kernel, jnp.zeros(outputs), grid, total, config))
    if not np.isfinite(float(rounded.loss)):
        raise FloatingPointError(f"rounding a kernel {shape} left a loss that is not finite.")
    return {"sums": sums, "rounding": clock() - began, "parts": parts}


def measure(
    kernels: Mapping[tuple[int, ...], int],
    rows: int,
    chunk: int,
    config: ClosedFormConfig,
    most_seconds: float,
) -> list[dict]:
    """One row a distinct kernel, those of few multiply-adds first.

    One that would take longer than most_seconds is extrapolated from the last measured one of its `cut`;
    without any, its seconds are None.
    """
    found: list[dict] = []
    parts = {shape: hessian_parts(shape, config.hessian_mib) for shape in kernels}
    costs = {shape: rounding_cost(shape, rows, parts[shape]).multiply_adds for shape in kernels}
    rates: dict[str, float] = {}
    rate = 2e10
    with progress("kernels", len(kernels)) as tell:
        for position, shape in enumerate(sorted(kernels, key=costs.get)):
            row = {"kernel": shape, "count": kernels[shape], "multiply_adds": costs[shape]}
            row["parts"] = parts[shape]
            kind = cut(shape, parts[shape])
            # The rate of another kind is no figure, but says whether to begin at all.
            guess = costs[shape] / rates.get(kind, rate)
            if guess > most_seconds:
                logging.info("%s would take about %.0f s: not measured", shape, guess)
                row |= {"seconds": guess if kind in rates else None, "measured": False}
            else:
                timed = time_layer(shape, rows, chunk, config)
                row |= {**timed, "seconds": timed["sums"] + timed["rounding"], "measured": True}
                rates[kind] = rate = costs[shape] / row["seconds"]
            found.append(row)
            tell(position + 1)
    return found


def cut(shape: tuple[int, ...], parts: int) -> str:
    """How a Hessian of this many parts is cut, which decides at what rate it is worked on."""
    if parts == 1:
        return "whole"
    return "taps" if parts == math.prod(shape[:-2]) else "further"


def write_results(name: str, found: list[dict], rows: int, command: str, out: pathlib.Path) -> str:
    """sizes_<name>.md and .json under out; returns the former."""
    unit = "CPU s" if jax.default_backend() == "cpu" else "s"
    lines = [
        f"| kernel | times | parts | {unit} each | {unit} in all |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in found:
        shape = "x".join(map(str, row["kernel"]))
        mark = "" if row["measured"] else " (extrapolated)"
        if row["seconds"] is None:
            each, whole = "too long, and none of its kind measured", "not counted"
        else:
            each = significant(row["seconds"]) + mark
            whole = significant(row["seconds"] * row["count"])
        lines.append(f"| {shape} | {row['count']} | {row['parts']} | {each} | {whole} |")
    counted = [row for row in found if row["seconds"] is not None]
    total = sum(row["seconds"] * row["count"] for row in counted)
    missing = sum(row["count"] for row in found) - sum(row["count"] for row in counted)
    without = f" without {missing} layers that are not counted" if missing else ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    made = made_at()
    text = "\n".join(
        [
            f"# Rounding {name} in closed form",
            "",
            f"{rows:,} rows a layer, float32, 4 bits: {significant(total)} {unit} in all{without} "
            f"({total / 60:.1f} minutes), {peak:.1f} GiB at the peak; passes of the network not included.",
            "",
            *lines,
            "",
            f"Made by `{command}` at commit {made['commit']}, jax {made['jax_version']}, on {made['machine']}.",
            "",
        ]
    )
    write_atomic(out / f"sizes_{name}.md", text)
    write_atomic(out / f"sizes_{name}.json", json.dumps(found, indent=1) + "\n")
    return text


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    log_progress()
    args = flags.FLAGS
    kernels = parse_kernels(args.kernels) if args.kernels else kernels_of(args.model)
    name = "kernels" if args.kernels else args.model
    config = ClosedFormConfig(hessian_mib=args.hessian_mib)
    found = measure(kernels, args.rows, args.chunk, config, args.most_seconds)
    given = f"--kernels={args.kernels}" if args.kernels else f"--model={args.model}"
    command = (
        f"python -m experiments.bench_sizes {given} --rows={args.rows} "
        f"--hessian_mib={args.hessian_mib} --most_seconds={args.most_seconds:g}"
    )
    print(write_results(name, found, args.rows, command, pathlib.Path(args.out)))


if __name__ == "__main__":
    flags.DEFINE_string("model", "DiT-XL-2-256x256", f"One of {', '.join(PUBLISHED)}.")
    flags.DEFINE_string("kernels", "", "Kernel shapes instead of a model, 3x3x320x320,1280x320.")
    flags.DEFINE_integer("rows", 24_576, "Rows a layer.", lower_bound=1)
    flags.DEFINE_integer("chunk", 2048, "Rows at once.", lower_bound=1)
    flags.DEFINE_integer("hessian_mib", 2048, "Memory for one layer's Hessian.", lower_bound=1)
    flags.DEFINE_float("most_seconds", 300.0, "Longer layers are extrapolated.", lower_bound=0)
    flags.DEFINE_string("out", None, "Folder of the table.")
    flags.mark_flags_as_required(["out"])
    command_line.run(main)
