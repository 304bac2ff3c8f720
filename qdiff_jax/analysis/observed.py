"""What the full-precision network computes inside, along its own trajectories.

Two views: the operands of sites, through taps, and the values that blocks hand on, through the
block program. Both run step by step with one compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from qdiff_jax.analysis.subject import Subject
from qdiff_jax.models.program import make_unit, subtrees
from qdiff_jax.observe.capture import run_unit
from qdiff_jax.observe.taps import Tap
from qdiff_jax.quant.timed import step_context
from qdiff_jax.sites import Site, SiteQuant, nest_sites
from qdiff_jax.stages.calibrate import flatten_reports


@functools.partial(jax.jit, static_argnames="module")
def _reports(module, variables, x, t, y):
    return module.apply(variables, x, t, y, mutable=["observed"])[1]["observed"]


def step_reports(
    subject: Subject, sites: Sequence[Site], tap: Tap, on_step: Callable | None = None
) -> Iterator[dict[str, dict[str, np.ndarray]]]:
    """For every step in ascending order {"site:operand": {statistic: [N, ...]}}, on the host.

    Operands come in order of execution. tap: any statistic that has a range ("range",
    "channel_range", "sample"); see `observe.taps`.
    """
    trajectory = subject.trajectory
    quant = nest_sites({site.name: SiteQuant(tap=tap) for site in sites})
    variables = {"params": subject.model.params, "quant": quant}
    names = [f"{s.name}:{o}" for s in sites for o in s.operands if o != "weight"]
    for i, t in enumerate(trajectory.t):
        rows = np.full(trajectory.x.shape[1], t, np.float32)
        written = _reports(subject.model.module, variables, trajectory.x[i], rows, trajectory.y)
        found = flatten_reports(jax.device_get(written))
        yield {name: found[name] for name in names}
        if on_step is not None:
            on_step(i + 1, len(trajectory.t))


def channel_ranges(
    subject: Subject, on_step: Callable | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"site:operand": (lo [S, C], hi [S, C])} of every activation, over samples and positions.

    The last axis of an operand counts as its channels (for a softmax output: the keys).
    """
    lo: dict[str, list] = {}
    hi: dict[str, list] = {}
    for reports in step_reports(subject, subject.sites, Tap("channel_range"), on_step):
        for name, report in reports.items():
            lo.setdefault(name, []).append(report["lo"].min(axis=0))
            hi.setdefault(name, []).append(report["hi"].max(axis=0))
    return {name: (np.stack(lo[name]), np.stack(hi[name])) for name in lo}


def step_values(
    subject: Subject, names: Sequence[str], on_step: Callable | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """For every step in ascending order {block: what it wrote [N, ...]}, for the blocks named."""
    program, params = subject.model.program, subject.model.params
    unit = make_unit("all", program, [node.name for node in program], keep=names)
    trajectory = subject.trajectory
    count = trajectory.x.shape[1]
    for i, t in enumerate(trajectory.t):
        given = {"x": trajectory.x[i], "t": np.full(count, t, np.float32), "y": trajectory.y}
        outputs = run_unit(
            unit.signature,
            subtrees(params, unit),
            subtrees({}, unit),
            tuple(given[name] for name in unit.inputs),
            step_context(given["t"], np.full(count, i), np.zeros(count)),
        )
        written = dict(zip(unit.outputs, outputs, strict=True))
        yield {name: np.asarray(written[name]) for name in names}
        if on_step is not None:
            on_step(i + 1, len(trajectory.t))
