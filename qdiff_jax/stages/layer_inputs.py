"""What single layers read, in full precision: one walk of a few samples through the blocks."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qdiff_jax.models.program import Unit, apply_unit, node_at, subtrees, units_with_projections
from qdiff_jax.observe.capture import needed_after
from qdiff_jax.observe.taps import Tap
from qdiff_jax.operators import Operator
from qdiff_jax.sites import OPERANDS, SiteQuant, nest_sites
from qdiff_jax.stages.stage import Model


def spread_rows(size: int, samples: int) -> np.ndarray:
    """Indices of at most `samples` rows spread over a set of `size`."""
    return np.unique(np.linspace(0, size - 1, min(samples, size)).astype(int))


def first_values(calibration: Any, rows: np.ndarray) -> dict[str, Any]:
    """The network's inputs on these rows of a calibration set: values before the first unit."""
    y = jax.tree.map(lambda v: v[rows], calibration.y)
    return {"x": calibration.x[rows], "t": calibration.t[rows], "y": y}


def check_finite(name: str, values: np.ndarray) -> None:
    """Raise ValueError for what the layer `name` reads, or a statistic of it, with NaN or infinity."""
    if not np.isfinite(values).all():
        raise ValueError(
            f"{name}: its input holds NaN or infinity on the calibration set; look for the layer before it "
            "that makes them, or for calibration states that are no images."
        )


def after_unit(
    units: Sequence[Unit],
    position: int,
    params: Mapping,
    values: Mapping[str, Any],
    names: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """The values once the unit at `position` has run in full precision, without those nobody reads again.

    Beside them {site: input} of the layers `names` of the unit.
    """
    unit = units[position]
    inputs = tuple(values[name] for name in unit.inputs)
    outputs, read = run_tapped(unit, params, inputs, names)
    alive = needed_after(units, position)
    joined = {**values, **dict(zip(unit.outputs, outputs, strict=True))}
    return {name: value for name, value in joined.items() if name in alive}, read


def walk_units(
    model: Model, params: Mapping, calibration: Any, rows: np.ndarray
) -> Iterator[tuple[Unit, tuple]]:
    """(unit, its inputs) in order of execution, on these rows of a calibration set; full precision."""
    units = units_with_projections(model.program)
    values = first_values(calibration, rows)
    for i, unit in enumerate(units):
        yield unit, tuple(values[name] for name in unit.inputs)
        values, _ = after_unit(units, i, params, values)


@functools.partial(jax.jit, static_argnums=0)
def _run_tapped(signature, params, quant, inputs):
    return apply_unit(signature, params, quant, inputs, mutable=["observed"])


def run_tapped(
    unit: Unit, params: Mapping, inputs: tuple, names: Sequence[str]
) -> tuple[tuple, dict[str, jax.Array]]:
    """(outputs of a unit in full precision, {site: input} of its layers `names`)."""
    taps = nest_sites({name: SiteQuant(tap=Tap("value")) for name in names})
    outputs, written = _run_tapped(
        unit.signature, subtrees(params, unit), subtrees(taps, unit), inputs
    )
    found = {}
    for name in names:
        block, _, op = name.partition("/")
        node = node_at(written[unit.nodes.index(block)]["observed"], op)
        found[name] = node[OPERANDS["conv"][0]]["value"]
    return outputs, found


def layer_rows(
    operator: Operator, x: np.ndarray, kernel_shape: tuple[int, ...], most: int, seed: int = 0
) -> np.ndarray:
    """[n, T, C]: at most `most` rows of a layer's input matrix, drawn without replacement.

    x: [B, H, W, C] of a convolution, whose rows are what the T taps of its kernel [kh, kw, C, N] read for one
    output pixel (zeros beyond the border); [..., C] of a dense layer, where T is 1.
    """
    rng = np.random.default_rng(seed)
    x = np.asarray(x, np.float32)
    if operator.kind == "dense":
        flat = x.reshape(-1, 1, x.shape[-1])
        return flat[_drawn(rng, len(flat), most)]
    height, width = kernel_shape[:2]
    down, across = operator.strides
    padded = np.pad(x, ((0, 0), *operator.padding, (0, 0)))
    rows = (padded.shape[1] - height) // down + 1
    columns = (padded.shape[2] - width) // across + 1
    batch, i, j = np.unravel_index(
        _drawn(rng, len(x) * rows * columns, most), (len(x), rows, columns)
    )
    taps = [
        padded[batch, i * down + di, j * across + dj] for di in range(height) for dj in range(width)
    ]
    return np.stack(taps, axis=1)


def _drawn(rng, count: int, most: int) -> np.ndarray:
    if count <= most:
        return np.arange(count)
    return np.sort(rng.choice(count, most, replace=False))
