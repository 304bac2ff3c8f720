"""The error that each block of a quantized network has collected, on whatever samples it is run on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from qdiff_jax.models.program import units_with_projections
from qdiff_jax.observe.capture import Pool, advance, needed_after, start_stream
from qdiff_jax.observe.selectors import CalibrationSet
from qdiff_jax.stages.stage import Model

_IN_MEMORY = Pool(limit_bytes=0, spill=None)


class UnitError(NamedTuple):
    """unit: BRECQ's, a block with the temporal projections that it alone reads. shape: of its last output for
    one sample. error: squared error of all of its outputs over their squares."""

    unit: str
    shape: tuple[int, ...]
    error: float


def unit_errors(
    model: Model, variables: Mapping, samples: CalibrationSet, *, batch_size: int
) -> list[UnitError]:
    """Of every unit, the relative squared error of its output behind a prefix that is quantized as well.

    That is what reconstruction minimises (BRECQ, Li et al. 2021, eq. 10; without its Fisher weights), over the
    samples given: on the calibration set it says how far that came, on others what it is worth. model: in full
    precision. variables: {"params", "quant"} of the quantized network, of the same blocks. batch_size divides
    the number of samples. Both streams are held in memory.
    """
    units = units_with_projections(model.program)
    exact = start_stream(samples.x, samples.t, samples.index, samples.branch, samples.y)
    quantized = exact
    found = []
    for i, unit in enumerate(units):
        keep = needed_after(units, i) | set(unit.outputs)
        walk = {"batch_size": batch_size, "pool": _IN_MEMORY, "keep": keep}
        exact = advance(exact, unit, model.params, {}, **walk)
        quantized = advance(quantized, unit, variables["params"], variables["quant"], **walk)
        pairs = [(exact.values[name], quantized.values[name]) for name in unit.outputs]
        lost = sum(float(np.sum(np.square(q - w, dtype=np.float64))) for w, q in pairs)
        whole = sum(float(np.sum(np.square(w, dtype=np.float64))) for w, _ in pairs)
        shape = tuple(exact.values[unit.outputs[-1]].shape[1:])
        found.append(UnitError(unit.name, shape, lost / whole))
    return found
