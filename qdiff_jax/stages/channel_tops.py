"""The largest |x| of each input channel of some layers, sample by sample: what factors are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qdiff_jax.observe.capture import slice_rows
from qdiff_jax.observe.taps import Tap
from qdiff_jax.sites import SiteQuant, nest_sites
from qdiff_jax.stages.calibrate import flatten_reports
from qdiff_jax.stages.stage import Model
from qdiff_jax.stages.time_scales import tapped


def channel_tops(
    model: Model, params: Mapping, names: Sequence[str], calibration: Any, start: int, stop: int
) -> dict[str, np.ndarray]:
    """{site: [stop - start, C] float32} over samples start..stop-1 of a set with x, t and y or None.

    The network runs in full precision with `params`.
    """
    quant = nest_sites({name: SiteQuant(tap=Tap("channel_range")) for name in names})
    batch = {k: getattr(calibration, k) for k in ("x", "t", "y")}
    variables = {"params": params, "quant": quant}
    reports = tapped(model.module, variables, slice_rows(batch, start, stop))
    return {
        name.removesuffix(":input"): np.maximum(np.abs(report["lo"]), np.abs(report["hi"]))
        for name, report in flatten_reports(jax.device_get(reports)).items()
    }
