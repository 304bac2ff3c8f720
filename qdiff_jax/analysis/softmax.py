"""Attention probabilities: do they follow a power law, and does a logarithmic grid serve them?

TCAQ-DM (2024) chooses between a uniform and a log2 grid by a likelihood ratio of a power law against an
exponential (dynamically adaptive quantizer). Here are the fits behind the choice and the errors of both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from qdiff_jax.analysis.grids import rounded
from qdiff_jax.analysis.observed import step_reports
from qdiff_jax.analysis.subject import NotApplicable, Subject
from qdiff_jax.observe.taps import Tap
from qdiff_jax.policy import ALWAYS_ZERO
from qdiff_jax.quant.qparams import from_range
from qdiff_jax.quant.spec import QuantSpec, code_range

_SAMPLE = 2048  # probabilities of each sample
_TAIL = 0.5  # the tail: values above this quantile
_CURVE = 60  # points of a survival curve that are kept
_LOG2 = QuantSpec(grid="log2")


class PowerLaw(NamedTuple):
    """exponent: alpha of p(x) ~ x^-alpha above the smallest value, by maximum likelihood; likelihood: mean
    log-likelihood ratio against an exponential shifted to the same start (above 0: the power law wins);
    tail_exponent and tail_r2: of the straight line through the tail of the survival function in log-log."""

    exponent: float
    likelihood: float
    tail_exponent: float
    tail_r2: float


class Softmax(NamedTuple):
    """S steps ascending, A attention layers in order of execution.

    verdict: medians over layers and steps of exponent (by the tail) and tail_r2, share_power_law (where the
    likelihood prefers it), and log2_over_uniform (median ratio of squared errors at `bits`).
    fits [S, A, 4] in the order of `PowerLaw`. error_ratio: [S, A], log2 / uniform.
    site: of the picture, the layer with the largest probability; curves: {t: [2, n]} its values and the
    share of values at least as large, at the first, middle and last step.
    """

    verdict: dict
    timesteps: np.ndarray
    names: tuple[str, ...]
    fits: np.ndarray
    error_ratio: np.ndarray
    site: str
    curves: dict[str, np.ndarray]


def fit_power_law(values: np.ndarray) -> PowerLaw:
    """Fits of positive values [n]; zeros are dropped.

    exponent = 1 + n / sum ln(x / x_min); the rate of the exponential is 1 / (mean - x_min). The survival
    function of a power law falls with slope 1 - alpha in log-log. Values that are all equal give nan.
    """
    x = np.sort(np.asarray(values, np.float64).ravel())
    x = x[x > 0]
    if x.size < 8 or x[0] == x[-1]:
        return PowerLaw(*[float("nan")] * 4)
    logs = np.log(x / x[0])
    alpha = 1.0 + x.size / logs.sum()
    power = np.log(alpha - 1.0) - np.log(x[0]) - alpha * logs.mean()
    rate = 1.0 / (x.mean() - x[0])
    exponential = np.log(rate) - 1.0
    log_x, log_share = np.log(x), np.log(1.0 - np.arange(x.size) / x.size)
    tail = slice(int(_TAIL * x.size), None)
    slope, offset = np.polyfit(log_x[tail], log_share[tail], 1) if np.ptp(log_x[tail]) else (0, 0)
    left = log_share[tail] - slope * log_x[tail] - offset
    r2 = 1.0 - left.var() / log_share[tail].var()
    return PowerLaw(float(alpha), float(power - exponential), float(1.0 - slope), float(r2))


def _squared_error(values: np.ndarray, spec: QuantSpec, bits: int) -> float:
    grid = from_range(spec, 0.0, float(values.max()), *code_range(spec, bits))
    return float(np.mean(np.square(np.asarray(rounded(grid, values)) - values)))


def softmax_power_law(
    subject: Subject, *, bits: int = 4, on_step: Callable | None = None
) -> Softmax:
    """Fits at every attention layer and step of the full-precision trajectories.

    Raises NotApplicable for a model without attention.
    """
    sites = [site for site in subject.sites if "softmax" in site.operands]
    if not sites:
        raise NotApplicable("this model has no attention, hence no softmax to fit.")
    fits, ratios, kept = [], [], []
    for reports in step_reports(subject, sites, Tap("sample", _SAMPLE), on_step):
        values = {s.name: reports[f"{s.name}:softmax"]["sample"].ravel() for s in sites}
        kept.append(values)
        fits.append([fit_power_law(v) for v in values.values()])
        ratios.append(
            [
                _squared_error(v, _LOG2, bits) / max(_squared_error(v, ALWAYS_ZERO, bits), 1e-30)
                for v in values.values()
            ]
        )
    fits, ratios = np.array(fits), np.array(ratios)
    timesteps = np.asarray(subject.trajectory.t)
    site = max(values, key=lambda name: max(step[name].max() for step in kept))
    shown = sorted({0, len(timesteps) // 2, len(timesteps) - 1})
    exponent, r2 = np.nanmedian(fits[..., 2]), np.nanmedian(fits[..., 3])
    return Softmax(
        {
            "exponent": float(exponent),
            "tail_r2": float(r2),
            "share_power_law": float(np.mean(fits[..., 1] > 0)),
            "log2_over_uniform": float(np.median(ratios)),
            "bits": bits,
        },
        timesteps,
        tuple(values),
        fits,
        ratios,
        site,
        {f"{timesteps[i]:g}": _survival(kept[i][site]) for i in shown},
    )


def _survival(values: np.ndarray) -> np.ndarray:
    x = np.sort(values[values > 0])
    share = 1.0 - np.arange(x.size) / x.size
    # Evenly in the logarithm of the share, so that the tail is not lost.
    places = np.unique(np.searchsorted(-share, -np.geomspace(1.0, share[-1], _CURVE)))
    places = places[places < x.size]
    return np.stack([x[places], share[places]])
