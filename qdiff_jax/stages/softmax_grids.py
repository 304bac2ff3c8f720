"""Which grid each softmax output takes at each step, from one pass over the calibration set.

Distribution-aware quantization of TCAQ-DM (Huang et al. 2024): the choice is made offline and kept as a
step table; at run time nothing is decided.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.observe.capture import batch_bounds, slice_rows
from qdiff_jax.observe.taps import Tap
from qdiff_jax.quant.either import LOG2
from qdiff_jax.quant.softmax_grid import CRITERIA, grid_rows, kind_of
from qdiff_jax.quant.timed import TimeIndexed
from qdiff_jax.sites import SiteQuant, flatten_sites, nest_sites
from qdiff_jax.stages.calibrate import flatten_reports
from qdiff_jax.stages.stage import Model, QuantState, Stage, fold_weights
from qdiff_jax.stages.time_scales import tapped


@dataclasses.dataclass(frozen=True)
class SoftmaxGridConfig:
    """criterion: "mle" (the paper) or "mse". samples: values read of each sample's softmax output.
    margin: widening of each step's largest value, never beyond 1."""

    criterion: str = "mle"
    samples: int = 1024
    margin: float = 1.1

    def __post_init__(self):
        if self.criterion not in CRITERIA:
            raise ValueError(
                f"SoftmaxGridConfig.criterion is {self.criterion!r}; use one of {CRITERIA}."
            )


class Carry(NamedTuple):
    """values: {"site:softmax": [(step indices [B], sample [B, K], largest [B]), ...]}."""

    state: QuantState
    values: dict[str, list]
    position: int


def choose_softmax_grids(
    model: Model,
    calibration: Any,
    timesteps: np.ndarray,
    config: SoftmaxGridConfig = SoftmaxGridConfig(),
    *,
    batch_size: int = 64,
    on_progress=None,
) -> Stage:
    """The stage that replaces the quantizer of every planned softmax output by a table over steps.

    calibration visits every step of `timesteps` [S]. `finish` reports how many rows are log2, by site.
    Raises ValueError for a step that was never seen.
    """
    size = int(np.shape(calibration.t)[0])
    bounds = batch_bounds(size, min(batch_size, size))
    steps = np.asarray(timesteps, np.float32)

    def planned(state: QuantState):
        return [e for e in state.plan.quantized("softmax") if not e.spec.dynamic]

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        del store  # One pass of the network: cheaper made again than read back.
        return Carry(state, {}, 0 if planned(state) else len(bounds))

    def run(carry: Carry, n: int) -> Carry:
        params, _ = fold_weights(model.params, carry.state.quant)
        tap = SiteQuant(tap=Tap("sample", config.samples))
        taps = nest_sites({entry.site: tap for entry in planned(carry.state)})
        values = {name: list(parts) for name, parts in carry.values.items()}
        for start, stop in bounds[carry.position : carry.position + n]:
            batch = {k: getattr(calibration, k) for k in ("x", "t", "y")}
            variables = {"params": params, "quant": taps}
            reports = tapped(model.module, variables, slice_rows(batch, start, stop))
            for name, report in flatten_reports(jax.device_get(reports)).items():
                if name.endswith(":softmax"):
                    part = (calibration.index[start:stop], report["sample"], report["hi"])
                    values.setdefault(name, []).append(part)
            if on_progress is not None:
                on_progress(stop, size)
        return Carry(carry.state, values, min(carry.position + n, len(bounds)))

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        flat = flatten_sites(carry.state.quant)
        chosen = {}
        for entry in planned(carry.state):
            index, values, top = (
                np.concatenate(part) for part in zip(*carry.values[f"{entry.site}:softmax"])
            )
            hi = np.empty(len(steps), np.float32)
            kinds = np.empty(len(steps), np.float32)
            for i in range(len(steps)):
                if not (index == i).any():
                    raise ValueError(
                        f"choose_softmax_grids: step {i} (t = {steps[i]:g}) was never seen at "
                        f"{entry.site}; select a calibration set that visits every step."
                    )
                hi[i] = min(config.margin * float(top[index == i].max()), 1.0)
                kinds[i] = kind_of(values[index == i], hi[i], entry.codes[1], config.criterion)
            rows = grid_rows(kinds, hi, float(entry.codes[1]))
            table = TimeIndexed(rows, jnp.asarray(steps), "step")
            flat[entry.site] = flat.get(entry.site, SiteQuant()).replace(lhs=table, product=True)
            chosen[entry.site] = int((kinds == LOG2).sum())
        passes = 1.0 if chosen else 0.0
        state = carry.state.replace(quant=nest_sites(flat))
        return state, {"log2_steps": chosen, "steps": len(steps), "network_passes": passes}

    def done(carry: Carry) -> bool:
        return carry.position >= len(bounds)

    return Stage("calibrate_softmax_grids", init, run, finish, done, "ranges")
