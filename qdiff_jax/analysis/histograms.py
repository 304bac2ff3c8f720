"""Weights and activations against the grid that quantizes them.

How many codes are really used, what is clipped, and how large the error is beside the signal, for every
layer; the picture shows one of them with its grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from qdiff_jax.analysis.grids import rounded
from qdiff_jax.analysis.observed import step_reports
from qdiff_jax.analysis.subject import Subject, is_temporal, parse_bits
from qdiff_jax.eval.agreement import sqnr_db
from qdiff_jax.observe.taps import Tap
from qdiff_jax.policy import ACTIVATION, WEIGHT
from qdiff_jax.quant.qparams import QParams, from_range
from qdiff_jax.quant.quantizer import dequantize
from qdiff_jax.quant.ranges import weight_qparams
from qdiff_jax.quant.spec import code_range
from qdiff_jax.stages.stage import kernel_at

_SAMPLE = 256  # activations of each sample and step
_SHOWN = 5000  # values that are kept for a picture


class GridUse(NamedTuple):
    """One tensor on its grid.

    values: a sample of at most 5000, float32. levels: [2^b] the grid's values. sqnr_db: signal to
    quantization noise ratio. entropy: of the codes, in bits, at most b. clipped: share outside.
    """

    values: np.ndarray
    levels: np.ndarray
    sqnr_db: float
    entropy: float
    clipped: float


class Histograms(NamedTuple):
    """L layers in order of execution.

    verdict: w_bits, a_bits, medians over layers of weight and activation SQNR in dB, of the entropy of
    the codes in bits, the share of clipped activations, and the layer of the picture.
    weight_sqnr, weight_entropy, activation_sqnr, activation_entropy: [L]. site: where the weights' SQNR is
    lowest among layers that see the image; weights (its widest output channel), activations: on their grids.
    """

    verdict: dict
    names: tuple[str, ...]
    weight_sqnr: np.ndarray
    weight_entropy: np.ndarray
    activation_sqnr: np.ndarray
    activation_entropy: np.ndarray
    site: str
    channel: int
    weights: GridUse
    activations: GridUse


def grid_use(grid: QParams, values: np.ndarray) -> GridUse:
    """How a grid of one range (granularity "tensor") serves a sample of values [n]."""
    values = np.asarray(values, np.float32).ravel()
    nearest = np.asarray(rounded(grid, values), np.float64)
    levels = np.asarray(dequantize(grid, jnp.arange(int(grid.qmin), int(grid.qmax) + 1)))
    share = np.unique(nearest, return_counts=True)[1] / values.size
    half = 0.5 * float(levels[1] - levels[0])
    outside = (values < levels[0] - half) | (values > levels[-1] + half)
    signal = float(np.mean(values.astype(np.float64) ** 2))
    error = float(np.mean((nearest - values) ** 2))
    return GridUse(
        values[:: -(-values.size // _SHOWN)],
        levels,
        sqnr_db(error / signal) if signal else float("inf"),
        float(-(share * np.log2(share)).sum()),
        float(outside.mean()),
    )


def quantization_histograms(
    subject: Subject, *, bits: str = "w4a8", on_step: Callable | None = None
) -> Histograms:
    """Every layer with a weight on the grids of round-to-nearest at `bits` (per-channel weights by
    MSE search, activations min-max over all steps). Raises ValueError unless both are quantized."""
    w_bits, a_bits = parse_bits(bits)
    if w_bits is None or a_bits is None:
        raise ValueError(f"histograms need both widths, as in w4a8; got {bits!r}.")
    sites = [site for site in subject.sites if site.has_weight]
    drawn: dict[str, list] = {site.name: [] for site in sites}
    for reports in step_reports(subject, sites, Tap("sample", _SAMPLE), on_step):
        for name, report in reports.items():
            drawn[name.split(":")[0]].append(report["sample"].ravel())
    uses = {}
    for site in sites:
        kernel = np.asarray(kernel_at(subject.model.params, site.name), np.float32)
        ranges = weight_qparams(kernel, WEIGHT, w_bits, method="mse")
        channels = kernel.reshape(-1, kernel.shape[-1])
        nearest = np.asarray(rounded(ranges, kernel), np.float64)
        error, signal = np.mean((nearest - kernel) ** 2), np.mean(kernel.astype(np.float64) ** 2)
        widest = int(np.ptp(channels, axis=0).argmax())
        weight = grid_use(_channel(ranges, widest), channels[:, widest])
        values = np.concatenate(drawn[site.name])
        span = from_range(ACTIVATION, values.min(), values.max(), *code_range(ACTIVATION, a_bits))
        uses[site.name] = (sqnr_db(error / signal), widest, weight, grid_use(span, values))
    shown = min(
        (name for name in uses if not is_temporal(subject.model, name)), key=lambda n: uses[n][0]
    )
    columns = {
        "weight_sqnr": np.array([use[0] for use in uses.values()]),
        "weight_entropy": np.array([use[2].entropy for use in uses.values()]),
        "activation_sqnr": np.array([use[3].sqnr_db for use in uses.values()]),
        "activation_entropy": np.array([use[3].entropy for use in uses.values()]),
    }
    verdict = {
        "w_bits": w_bits,
        "a_bits": a_bits,
        **{f"median_{name}": float(np.median(column)) for name, column in columns.items()},
        "shown": shown,
    }
    _, channel, weights, activations = uses[shown]
    return Histograms(
        verdict,
        tuple(uses),
        **columns,
        site=shown,
        channel=channel,
        weights=weights,
        activations=activations,
    )


def _channel(ranges: QParams, channel: int) -> QParams:
    """The grid of one output channel, as a grid of one range."""

    def pick(leaf):
        return leaf[channel] if leaf.ndim else leaf

    return QParams(
        pick(ranges.scale),
        pick(ranges.zero_point),
        pick(ranges.qmin),
        pick(ranges.qmax),
        ACTIVATION,
    )
