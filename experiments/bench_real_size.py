"""Published models in their real size: seconds and peak memory of loading, W8A8 and one evaluation.

    python -m experiments.bench_real_size --model=sd-v1-4 --folder=/tmp/real

Random weights under the names of the released file are written to the folder once (`--weights=FILE` takes a
file that is there). Each part runs in a process of its own, so that its peak is its own: `load` reads the
file by the strict table of names; `quantize` rounds every weight (policy `common`, ranges by MSE search),
calibrates the activations on one sample and writes a bundle; `forward` reads the bundle and evaluates the
packed network twice. Peaks are of the whole process, Python and JAX included. The random file and the bundle,
a quarter of its size, are removed at the end.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from experiments import command_line
from experiments.inspect import aligned
from qdiff_jax.export.bundle import load_bundle, save_bundle, stored_bytes
from qdiff_jax.methods.rtn import rtn
from qdiff_jax.models.dit import DiTConfig
from qdiff_jax.models.families import (
    example_inputs,
    make_module,
    model_json,
    parameter_shapes,
    program_of,
)
from qdiff_jax.models.port import dit, unet_ldm
from qdiff_jax.models.published import PUBLISHED
from qdiff_jax.models.registry import from_config, predictor
from qdiff_jax.models.unet_ldm import UNetLDMConfig
from qdiff_jax.named_policies import policy
from qdiff_jax.observe.selectors import CalibrationSet
from qdiff_jax.policy import make_plan
from qdiff_jax.quant.timed import step_context
from qdiff_jax.runtime.progress import log_progress
from qdiff_jax.runtime.state_dicts import load_state_dict
from qdiff_jax.sites import list_sites
from qdiff_jax.stages.calibrate import ActivationConfig
from qdiff_jax.stages.stage import Model, initial_state, leaves_by_path, run_stage

PARTS = ("load", "quantize", "forward")
TIMESTEP = 500.0

# Our path -> name in the released file, in this order; the strict table of names has the last word.
_UNET_NAMES = (
    (r"_emb_layers_1/dense", r".emb_layers.1"),
    (r"_proj_in/norm", r".norm"),
    (r"_(proj_in|proj_out)/\1", r".\1"),
    (r"^time_embed/dense_", r"time_embed."),
    (r"^input_blocks_0_0/conv", r"input_blocks.0.0"),
    (r"^out/out_", r"out."),
    (r"^time_embed/label_emb", r"label_emb"),
    (r"^class_embedder/embedding", r"cond_stage_model.embedding"),
    (r"_transformer_blocks", r".transformer_blocks"),
    (r"(attn[12])_to", r"\1.to"),
    (r"ff_net_0_proj", r"ff.net.0.proj"),
    (r"ff_net", r"ff.net"),
)
_DIT_NAMES = (
    (r"^t_embedder/y_embedder", r"y_embedder.embedding_table"),
    (r"_adaLN/dense", r".adaLN_modulation.1"),
    (r"(attn|mlp)_(?=[a-z])", r"\1."),
)


def read_unet(tensors: Mapping, config: UNetLDMConfig, path: object) -> dict:
    """Parameters of a U-Net's tensors, or of a whole CompVis checkpoint's."""
    if any(name.startswith(unet_ldm.PARTS["unet"]) for name in tensors):
        tensors, _ = unet_ldm.unet_tensors(tensors, config, ema=False, source=path)
    return unet_ldm.from_native(tensors, config, path)


# The families that are measured: renaming, and the strict reader of the released names.
FAMILIES: Mapping[type, tuple[tuple, Callable]] = {
    UNetLDMConfig: (_UNET_NAMES, read_unet),
    DiTConfig: (_DIT_NAMES, dit.from_official),
}
_TORCH_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def released_name(path: str, config: Any) -> str:
    """The name in the released file of one of our parameters, "block/layer/leaf"."""
    module, _, leaf = path.rpartition("/")
    for pattern, theirs in FAMILIES[type(config)][0]:
        module = re.sub(pattern, theirs, module)
    module = re.sub(r"_(?=\d)", ".", module).replace("/", ".")
    return f"{module}.{_TORCH_LEAVES[leaf]}"


def torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the released file: OIHW or [out, in] for a kernel, else ours."""
    if not path.endswith("/kernel"):
        return tuple(shape)
    return (shape[-1], shape[-2], *shape[:-2])


def write_random(config: Any, path: pathlib.Path) -> int:
    """Random weights under released names as one safetensors file, a tensor at a time; returns its bytes."""
    leaves = leaves_by_path(parameter_shapes(config))
    header, offset = {}, 0
    for name, leaf in leaves.items():
        shape = torch_shape(name, leaf.shape)
        end = offset + 4 * math.prod(shape)
        header[released_name(name, config)] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": (offset, end),
        }
        offset = end
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, leaf in leaves.items():
            values = rng.standard_normal(math.prod(leaf.shape), np.float32)
            if name.endswith("/kernel"):
                values /= np.float32(math.sqrt(math.prod(leaf.shape[:-1])))
            else:
                values = np.float32(0.1) * values + np.float32(name.endswith("/scale"))
            file.write(values.tobytes())
    return path.stat().st_size


def load(config: Any, path: pathlib.Path) -> dict:
    """The parameters of a file with released names, on the device."""
    tensors = load_state_dict(path)
    return jax.block_until_ready(FAMILIES[type(config)][1](tensors, config, path))


def one_sample(config: Any) -> CalibrationSet:
    """One noise image at one timestep, with a random condition."""
    x, _, y = example_inputs(config)
    rng = np.random.default_rng(1)

    def drawn(leaf):
        if leaf.dtype.kind == "i":
            return np.asarray(leaf)
        return rng.standard_normal(leaf.shape).astype(np.float32)

    x, y = jax.tree.map(lambda leaf: drawn(np.asarray(leaf)), (x, y))
    t, first = np.float32([TIMESTEP]), np.zeros(1, np.int32)
    return CalibrationSet(x, t, first, first, y, x)


def quantize(config: Any, params: dict, bundle: pathlib.Path) -> dict:
    """W8A8 by round-to-nearest from parameters to a bundle; CPU seconds of each stage, compiling included."""
    model = Model(make_module(config), program_of(config), params)
    sites = list_sites(model.module, *jax.eval_shape(lambda: example_inputs(config)))
    plan = make_plan(sites, policy("common", sites, 8, 8))
    sample = one_sample(config)
    # No averaging: there is one batch of one sample.
    method = rtn(model, sample, sample.t, activations=ActivationConfig(observer="minmax"))
    state, seconds = initial_state(plan, jax.random.key(0)), {}
    for stage in method.stages:
        began = time.process_time()
        state, _ = run_stage(stage, state)
        seconds[stage.name] = time.process_time() - began
        logging.info("%s: %.0f s, peak %.2f GiB", stage.name, seconds[stage.name], peak())
    save_bundle(
        bundle,
        params=params,
        quant=state.quant,
        plan_json=plan.to_json(),
        model_config=model_json(config),
        schedule_config={"schedule": "linear", "timesteps": 1000},
        sampler_config={"name": "ddim"},
        source={"sha256": "not taken"},
    )
    return seconds


def forward(bundle: pathlib.Path, sample: CalibrationSet) -> dict:
    """CPU seconds of the first (compiling included) and second evaluation of a bundle's packed network."""
    held = load_bundle(bundle)
    evaluate = jax.jit(predictor(from_config(held.manifest["model"])))
    variables = {"params": held.params, "quant": held.quant}
    seconds = []
    for _ in range(2):
        began = time.process_time()
        ctx = step_context(sample.t[0], 0)
        eps = np.asarray(evaluate(variables, sample.x, ctx, sample.y))
        seconds.append(time.process_time() - began)
    if eps.shape != sample.x.shape or not np.isfinite(eps).all():
        raise FloatingPointError(f"the quantized network gave {eps.shape} and not only numbers.")
    return {"first evaluation": seconds[0], "second": seconds[1]}


def peak() -> float:
    """GiB of host memory at the peak of this process so far."""
    # Where there is one: `getrusage` may answer with the peak of the process that started this one.
    status = pathlib.Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run_part(part: str, config: Any, weights: pathlib.Path, bundle: pathlib.Path) -> dict:
    """One part, here and now: {"cpu" and "wall" seconds, "peak", "details"}."""
    began, cpu_began, details = time.monotonic(), time.process_time(), {}
    if part == "forward":
        details = forward(bundle, one_sample(config))
    else:
        params = load(config, weights)
        details["loading"] = time.process_time() - cpu_began
        if part == "quantize":
            details |= quantize(config, params, bundle)
    cpu, wall = time.process_time() - cpu_began, time.monotonic() - began
    return {"cpu": cpu, "wall": wall, "peak": peak(), "details": details}


def measure(name: str, weights: pathlib.Path, folder: pathlib.Path) -> dict[str, dict]:
    """Every part of a model, each in a process of its own, one after the other."""
    found = {}
    for part in PARTS:
        result = folder / f"{part}.json"
        command = [sys.executable, "-m", "experiments.bench_real_size", f"--model={name}"]
        command += [f"--folder={folder}", f"--weights={weights}", f"--part={part}"]
        subprocess.run(command, check=True)
        found[part] = json.loads(result.read_text("utf-8"))
        result.unlink()
    return found


def table(name: str, size: int, stored: int, found: Mapping[str, dict]) -> str:
    """Markdown: a row for each part."""
    header = ["model", "file (GiB)", "part", "CPU s", "wall s", "of the CPU seconds"]
    header += ["peak (GiB)", "peak / file"]
    lines = []
    for part, row in found.items():
        details = ", ".join(f"{k} {v:.0f}" for k, v in row["details"].items())
        gib = size / 2**30
        lines.append(
            [name, f"{gib:.2f}", part, f"{row['cpu']:.0f}", f"{row['wall']:.0f}", details]
            + [f"{row['peak']:.2f}", f"{row['peak'] / gib:.2f}"]
        )
    made = f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}"
    return "\n".join(
        [
            aligned(header, lines, left=("model", "part", "of the CPU seconds")),
            "",
            f"The bundle is {stored / 2**30:.2f} GiB. {made}, jax {jax.__version__}.",
        ]
    )


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    log_progress()
    args = flags.FLAGS
    measured = [name for name, row in PUBLISHED.items() if type(row.network) in FAMILIES]
    if args.model not in measured:
        raise ValueError(f"--model={args.model} is unknown here; there are {', '.join(measured)}.")
    config, folder = PUBLISHED[args.model].network, pathlib.Path(args.folder)
    bundle = folder / "bundle"
    folder.mkdir(parents=True, exist_ok=True)
    if args.part:
        if not args.weights:
            raise ValueError(f"--part={args.part} needs --weights, the file that it reads.")
        found = run_part(args.part, config, pathlib.Path(args.weights), bundle)
        (folder / f"{args.part}.json").write_text(json.dumps(found))
        return
    weights = pathlib.Path(args.weights or folder / f"{args.model}.safetensors")
    results = [folder / f"{part}.json" for part in PARTS]
    for path in (bundle, *results, *(() if args.weights else (weights,))):
        if path.exists():
            raise ValueError(f"{path} is there already; give another --folder, or remove it.")
    try:
        if not args.weights:
            write_random(config, weights)
        found = measure(args.model, weights, folder)
        stored = stored_bytes(bundle).files
        print(table(args.model, weights.stat().st_size, stored, found))
    finally:
        shutil.rmtree(bundle, ignore_errors=True)
        if not args.weights:
            weights.unlink(missing_ok=True)


if __name__ == "__main__":
    flags.DEFINE_string("model", "sd-v1-4", "Published name (experiments.inspect lists them).")
    flags.DEFINE_string("folder", None, "Where weights and bundle stand meanwhile.")
    flags.DEFINE_string("weights", "", "A file with released names instead of random weights.")
    flags.DEFINE_enum("part", None, PARTS, "One part alone, with its peak into the folder.")
    flags.mark_flags_as_required(["folder"])
    command_line.run(main)
