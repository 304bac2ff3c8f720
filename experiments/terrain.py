"""Quantizes a third party's one-step U-Net by several methods and tables the SQNR of what it draws.

    python -m experiments.terrain --config=configs/terrain.py --weights=WHEEL --workdir=W

SQNR: power of the full-precision height maps (in the model's space, [-1, 1]) over that of the error, in
dB, over all maps. Writes W/variants/NAME/sqnr.json as variants finish and W/sqnr.md; killed at any moment and
started again, it goes on with the stage and unit where it was.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from experiments import command_line
from experiments.quantize_config import FREE_TO_CHANGE, QuantizeConfig, read_config
from experiments.quantize_settings import method_settings
from qdiff_jax.config import claim_workdir
from qdiff_jax.diffusion.consistency import SIGMA_MAX, denoised, preconditioning
from qdiff_jax.eval.agreement import sqnr_db
from qdiff_jax.eval.files import write_atomic
from qdiff_jax.eval.networks.state_dict import fingerprint
from qdiff_jax.methods.registry import CalibrationSets, build
from qdiff_jax.models.families import example_inputs, make_module, parameter_shapes, program_of
from qdiff_jax.models.port.terrain import CONFIG, load_terrain
from qdiff_jax.models.registry import predictor, random_params
from qdiff_jax.models.unet_ldm import UNetLDMConfig
from qdiff_jax.named_policies import policy
from qdiff_jax.observe.archive import load_record, save_record
from qdiff_jax.observe.selectors import CalibrationSet
from qdiff_jax.policy import make_plan
from qdiff_jax.quant.timed import step_context
from qdiff_jax.runtime.cache import enable_compile_cache
from qdiff_jax.runtime.progress import log_progress
from qdiff_jax.sites import list_sites
from qdiff_jax.stages.stage import Model, fold_weights, initial_state, run_stage

MINIATURE = dataclasses.replace(
    CONFIG,
    channels=8,
    multipliers=(1,),
    res_blocks=1,
    attention_downsampling=(1,),
    resolution=8,
    head_channels=4,
    groups=4,
)
# Of methods whose weights do not depend on activations: the stage after which they are decided.
DECIDED = {"rtn": "round_to_nearest", "brecq": "brecq_weights", "qdiffusion": "brecq_weights"}
ORDER = ("rtn", "closed_form", "svdquant", "brecq", "qdiffusion")


class Maps(NamedTuple):
    """noisy: [N, H, W, 1] at sigma 80. x: what the network reads. y: difficulty in [0, 1], [N, 1]."""

    noisy: np.ndarray
    x: np.ndarray
    y: np.ndarray


AT = preconditioning(SIGMA_MAX)


def draw(seed: int, count: int, side: int) -> Maps:
    """Noise and difficulties as the model's own code draws them: all of 1 to 100 equally likely."""
    rng = np.random.default_rng(seed)
    y = rng.integers(1, 101, size=count)
    noisy = rng.standard_normal((count, side, side, 1), dtype=np.float32) * np.float32(SIGMA_MAX)
    return Maps(noisy, noisy * AT.inward, ((y - 1) / 99).astype(np.float32)[:, None])


def heights(module: Any, params: Any, quant: Any, maps: Maps, batch: int) -> np.ndarray:
    """[N, H, W, 1] float32 in [-1, 1]: the maps that a network draws from the noise."""
    predict, ctx = jax.jit(predictor(module)), step_context(AT.t, 0)
    variables, found = {"params": params, "quant": quant}, []
    for first in range(0, len(maps.x), batch):
        part = slice(first, first + batch)
        estimate = predict(variables, jnp.asarray(maps.x[part]), ctx, jnp.asarray(maps.y[part]))
        found.append(np.asarray(denoised(AT, maps.noisy[part], estimate)))
    return np.concatenate(found)


def calibration_set(module: Any, params: Any, maps: Maps, batch: int) -> CalibrationSet:
    count = len(maps.x)
    return CalibrationSet(
        x=maps.x,
        t=np.full(count, AT.t, np.float32),
        index=np.zeros(count, np.int32),
        branch=np.zeros(count, np.int32),
        y=maps.y,
        eps_fp=heights(module, params, {}, maps, batch),
    )


def run(config: QuantizeConfig, network: UNetLDMConfig, params: Any, workdir: pathlib.Path) -> None:
    """Every variant that is not finished yet, and the table of all that are."""
    if config.rounding != "adaround" or config.closed_form.step_weights != "uniform":
        raise ValueError(
            "experiments.terrain has one step, and closed form as a method of its own: leave config.rounding "
            "and config.closed_form.step_weights as they are."
        )
    digest, record = fingerprint(params), workdir / "weights.json"
    if record.exists() and load_record(record)["sha256"] != digest:
        raise ValueError(
            f"{workdir} was begun with other weights than --weights; take a new workdir."
        )
    save_record(record, {"sha256": digest})
    module = make_module(network)
    model = Model(module, program_of(network), params)
    sites = list_sites(module, *example_inputs(network))
    batch = config.evaluation.batch
    held_out = draw(config.seed + 1, config.evaluation.samples, network.resolution)
    reference = heights(module, params, {}, held_out, batch)
    maps = draw(config.seed, config.calibration.samples, network.resolution)
    chosen = calibration_set(module, params, maps, batch)
    sets = CalibrationSets(chosen, chosen, np.asarray([AT.t], np.float32))
    settings = method_settings(config)

    def sqnr(state):
        variables = fold_weights(params, state.quant)
        error = heights(module, *variables, held_out, batch) - reference
        return sqnr_db(float(np.square(error, dtype=np.float64).sum() / np.square(reference).sum()))

    # What takes seconds comes first, and 4 bits before 8.
    ordered = sorted(
        config.variants.items(), key=lambda one: (ORDER.index(one[1].method), one[1].w_bits)
    )
    for name, v in ordered:
        folder = workdir / "variants" / name
        if not (folder / "sqnr.json").exists():
            chosen_policy = "official:svdquant" if v.method == "svdquant" else config.policy
            plan = make_plan(sites, policy(chosen_policy, sites, *v.targets))
            key = jax.random.fold_in(jax.random.key(config.seed), 3)
            state = initial_state(plan, key, digest)
            found: dict[str, float] = {}
            for i, stage in enumerate(build(v.method, model, sets, settings).stages):
                logging.info("%s: %s", name, stage.name)
                state, report = run_stage(stage, state, folder / "stages" / f"{i}_{stage.name}")
                for kind in ("cpu_seconds", "compile_seconds"):
                    found[kind] = found.get(kind, 0.0) + report[kind]
                if stage.name == DECIDED.get(v.method):
                    found[f"w{v.w_bits}a32"] = sqnr(state)
            found[f"w{v.w_bits}a{v.a_bits}"] = sqnr(state)
            logging.info("%s: %s", name, found)
            write_atomic(folder / "sqnr.json", json.dumps({"method": v.method, **found}))
        write_atomic(workdir / "sqnr.md", table(workdir))


def table(workdir: pathlib.Path) -> str:
    """Markdown: a row for each method that is finished somewhere under workdir, SQNR in dB."""
    columns = ("w8a32", "w8a8", "w4a32", "w4a8")
    rows: dict[str, dict] = {}
    for path in sorted(workdir.glob("variants/*/sqnr.json")):
        found = json.loads(path.read_text("utf-8"))
        row = rows.setdefault(found["method"], {"seconds": 0.0})
        row["seconds"] += found["cpu_seconds"]
        row.update({key: found[key] for key in columns if key in found})
    lines = ["| method | W8 | W8A8 | W4 | W4A8 | CPU s |", "|---|---:|---:|---:|---:|---:|"]
    for method, row in rows.items():
        cells = (f"{row[key]:.1f}" if key in row else "" for key in columns)
        lines.append(f"| {method} | {' | '.join(cells)} | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    log_progress()
    enable_compile_cache(flags.FLAGS.compile_cache)
    config, workdir = read_config(flags.FLAGS.config), pathlib.Path(flags.FLAGS.workdir)
    if config.model == "random:terrain":
        network, params = MINIATURE, random_params(parameter_shapes(MINIATURE), config.seed)
    else:
        network, params = CONFIG, load_terrain(flags.FLAGS.weights)
    claim_workdir(workdir, config, FREE_TO_CHANGE)
    began = time.process_time()
    run(config, network, params, workdir)
    logging.info("%.0f CPU seconds in all", time.process_time() - began)
    print((workdir / "sqnr.md").read_text("utf-8"))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file, path:arg.", lock_config=True)
    flags.DEFINE_string("weights", "", "The wheel, or the ONNX file in it.")
    flags.DEFINE_string("workdir", None, "Everything goes here; the same again resumes.")
    flags.DEFINE_string("compile_cache", None, "Folder for compiled programs.")
    flags.mark_flags_as_required(["config", "workdir"])
    command_line.run(main)
