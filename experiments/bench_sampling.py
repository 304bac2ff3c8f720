"""What is measured of sampling: full precision, simulated quantization, integer execution."""

from __future__ import annotations

import jax
import numpy as np

from experiments.bench_timing import interleave, ratio
from qdiff_jax.diffusion.sample import sample
from qdiff_jax.diffusion.samplers import ddim
from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.methods.rtn import rtn
from qdiff_jax.models.registry import predictor
from qdiff_jax.policy import SitePlan
from qdiff_jax.sites import flatten_sites, nest_sites
from qdiff_jax.stages.calibrate import ActivationConfig
from qdiff_jax.stages.stage import Model, fold_weights, initial_state, run_stage

BATCH = 32


def quantized(model: Model, plan: SitePlan, calibration, steps: np.ndarray) -> dict:
    """A quant tree by nearest rounding and min-max ranges: speed does not depend on the method."""
    config = ActivationConfig(observer="minmax", batch_size=len(calibration))
    state = initial_state(plan, jax.random.key(0))
    for stage in rtn(model, calibration, steps, weight_method="minmax", activations=config).stages:
        state, _ = run_stage(stage, state)
    return state.quant


def executed(quant: dict) -> dict:
    """The same tree with integer products wherever both operands are quantized."""
    return nest_sites(
        {
            name: site.replace(execute=site.lhs is not None and site.rhs is not None)
            for name, site in flatten_sites(quant).items()
        }
    )


def sampling(model: Model, shape, plans: dict[str, SitePlan], calibration, steps, rounds) -> dict:
    """Row (b): DDIM from the same noise in batches of 32, milliseconds an evaluation of the network.

    plans: {"w8a8": ..., "w4a8": ...}. Simulated weights are folded once; packed ones are unpacked and
    multiplied as integers in every evaluation.
    """
    schedule = make_schedule("linear", 1000)
    plan = ddim(schedule, np.asarray(steps))
    labels = np.arange(BATCH, dtype=np.int32) % 10
    predict = predictor(model.module)

    def sampler(variables):
        def run():
            return sample(
                predict,
                variables,
                plan,
                jax.random.key(0),
                range(BATCH),
                shape=shape,
                y=labels,
            ).x

        return run

    rivals = {"full precision": sampler({"params": model.params, "quant": {}})}
    for name, site_plan in plans.items():
        quant = quantized(model, site_plan, calibration, np.asarray(steps, np.float32))
        if name == "w4a8":
            params, left = fold_weights(model.params, quant)
            rivals["simulated w4a8"] = sampler({"params": params, "quant": left})
        rivals[f"packed {name}"] = sampler({"params": model.params, "quant": executed(quant)})
    times = interleave(rivals, rounds)
    rows = {}
    for name, timing in times.items():
        measured = timing.summary(len(steps))
        rows[name] = {
            **measured,
            **ratio(timing, times["full precision"]),
            "samples_per_s": BATCH / (measured["wall_ms"] / 1e3),
        }
    return rows
