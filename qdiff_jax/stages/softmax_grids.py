"""Which grid each softmax output takes at each step, from one or two passes over the calibration set.

Distribution-aware quantization of TCAQ-DM (Huang et al. 2024): the choice is made offline and kept as a
step table; at run time nothing is decided.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.observe.capture import batch_bounds, slice_rows
from qdiff_jax.observe.taps import Tap
from qdiff_jax.quant.either import LOG2, UNIFORM
from qdiff_jax.quant.quantizer import fake_quant
from qdiff_jax.quant.softmax_grid import CRITERIA, grid_rows, kind_of
from qdiff_jax.quant.timed import TimeIndexed
from qdiff_jax.sites import SiteQuant, flatten_sites, nest_sites
from qdiff_jax.stages.calibrate import flatten_reports
from qdiff_jax.stages.stage import Model, QuantState, Stage, fold_weights
from qdiff_jax.stages.time_scales import tapped


@dataclasses.dataclass(frozen=True)
class SoftmaxGridConfig:
    """criterion: "mle" (the paper), "mse", "attn_out_mse" or "uniform" (tables by step without a choice:
    what the choice is compared with), see `quant.softmax_grid`. "attn_out_mse" runs the network a second
    time and holds whole attention maps of a batch. samples: values read of each sample's softmax output.
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
    """values: {"site:softmax": [(step indices [B], sample [B, K], largest [B]), ...]}. errors, of the second
    pass: {"site:softmax": [(step indices [B], squared errors [2, B]), ...]}."""

    state: QuantState
    values: dict[str, list]
    errors: dict[str, list]
    position: int


@functools.partial(jax.jit, static_argnames="module")
def _output_errors(module, variables, batch, tables):
    """{"site:softmax": [2, B]}: |(p_hat - p) v|^2 of every sample on each of the site's two grids."""
    arguments = (variables, batch["x"], batch["t"], batch["y"])
    _, written = module.apply(*arguments, mutable=["observed"])
    observed = flatten_reports(written["observed"], leaf="value")

    def errors(name, pair):
        p, v = observed[name]["value"], observed[name.replace(":softmax", ":v")]["value"]
        gaps = [jnp.matmul(fake_quant(table, p) - p, v) for table in pair]
        return jnp.stack([jnp.square(gap).sum(tuple(range(1, gap.ndim))) for gap in gaps])

    return {name: errors(name, pair) for name, pair in tables.items()}


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

    calibration visits every step of `timesteps` [S]. `finish` reports by site how many rows are log2
    (`log2_steps`) and which (`log2_rows`, step indices). Raises ValueError for a step that was never seen.
    """
    size = int(np.shape(calibration.t)[0])
    once = batch_bounds(size, min(batch_size, size))
    by_output = config.criterion == "attn_out_mse"
    bounds = [*once, *once] if by_output else once
    steps = np.asarray(timesteps, np.float32)

    def planned(state: QuantState):
        return [e for e in state.plan.quantized("softmax") if not e.spec.dynamic]

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        del store  # One pass of the network: cheaper made again than read back.
        return Carry(state, {}, {}, 0 if planned(state) else len(bounds))

    def run(carry: Carry, n: int) -> Carry:
        params, _ = fold_weights(model.params, carry.state.quant)
        entries = planned(carry.state)
        values = {name: list(parts) for name, parts in carry.values.items()}
        errors = {name: list(parts) for name, parts in carry.errors.items()}
        for number in range(carry.position, min(carry.position + n, len(bounds))):
            start, stop = bounds[number]
            second = number >= len(once)
            tap = SiteQuant(tap=Tap("value") if second else Tap("sample", config.samples))
            variables = {"params": params, "quant": nest_sites({e.site: tap for e in entries})}
            batch = {k: getattr(calibration, k) for k in ("x", "t", "y")}
            batch, index = slice_rows(batch, start, stop), calibration.index[start:stop]
            if second:
                tables = {
                    f"{e.site}:softmax": tuple(
                        grid_rows(
                            np.full(len(index), kind), largest(values, e)[index], e.codes[1]
                        ).replace(rows=True)
                        for kind in (UNIFORM, LOG2)
                    )
                    for e in entries
                }
                found = jax.device_get(_output_errors(model.module, variables, batch, tables))
                for name, pair in found.items():
                    errors.setdefault(name, []).append((index, pair))
            else:
                reports = tapped(model.module, variables, batch)
                for name, report in flatten_reports(jax.device_get(reports)).items():
                    if name.endswith(":softmax"):
                        part = (index, report["sample"], report["hi"])
                        values.setdefault(name, []).append(part)
            if on_progress is not None:
                on_progress((number + 1) * size // len(bounds), size)
        return Carry(carry.state, values, errors, min(carry.position + n, len(bounds)))

    def largest(values: dict, entry) -> np.ndarray:
        """[S]: the largest value of a site at each step, with the margin."""
        parts = values[f"{entry.site}:softmax"]
        index, top = (np.concatenate([part[i] for part in parts]) for i in (0, 2))
        unseen = np.setdiff1d(np.arange(len(steps)), index)
        if unseen.size:
            raise ValueError(
                f"choose_softmax_grids: step {unseen[0]} (t = {steps[unseen[0]]:g}) was never seen at "
                f"{entry.site}; select a calibration set that visits every step."
            )
        tops = np.array([top[index == i].max() for i in range(len(steps))], np.float32)
        return np.minimum(np.float32(config.margin) * tops, np.float32(1.0))

    def kinds_of(carry: Carry, entry, hi: np.ndarray) -> np.ndarray:
        name = f"{entry.site}:softmax"
        if by_output:
            index = np.concatenate([part[0] for part in carry.errors[name]])
            pair = np.concatenate([part[1] for part in carry.errors[name]], axis=1)
            uniform, log2 = (np.bincount(index, one, len(steps)) for one in np.float64(pair))
            return np.where(log2 < uniform, LOG2, UNIFORM).astype(np.float32)
        index, values, _ = (np.concatenate(part) for part in zip(*carry.values[name]))
        rows = (values[index == i] for i in range(len(steps)))
        of_row = [kind_of(v, h, entry.codes[1], config.criterion) for v, h in zip(rows, hi)]
        return np.float32(of_row)

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        flat = flatten_sites(carry.state.quant)
        chosen = {}
        for entry in planned(carry.state):
            hi = largest(carry.values, entry)
            kinds = kinds_of(carry, entry, hi)
            rows = grid_rows(kinds, hi, float(entry.codes[1]))
            table = TimeIndexed(rows, jnp.asarray(steps), "step")
            flat[entry.site] = flat.get(entry.site, SiteQuant()).replace(lhs=table, product=True)
            chosen[entry.site] = np.flatnonzero(kinds == LOG2).tolist()
        state = carry.state.replace(quant=nest_sites(flat))
        return state, {
            "criterion": config.criterion,
            "log2_steps": {site: len(rows) for site, rows in chosen.items()},
            "log2_rows": chosen,
            "steps": len(steps),
            "network_passes": float(bool(chosen)) * (1 + by_output),
        }

    def done(carry: Carry) -> bool:
        return carry.position >= len(bounds)

    return Stage("calibrate_softmax_grids", init, run, finish, done, "ranges")
