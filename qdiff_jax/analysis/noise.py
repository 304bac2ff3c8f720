"""Quantization noise of the estimate: how much of it follows the estimate, and what is left.

PTQD (He et al. 2023, section 3): the error e = eps_q - eps splits into a part k eps + b, which can be divided
out, and a residual that is treated as Gaussian and absorbed into the sampler's own noise. Here is how far
both assumptions hold, step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from qdiff_jax.analysis.forced import forced_eps
from qdiff_jax.analysis.subject import Subject
from qdiff_jax.diffusion.hooks import IDENTITY, Hooks

_SHOWN = 4000  # points of the scatter


class NoiseCorrelation(NamedTuple):
    """S steps ascending.

    verdict: for each variant the means over steps "<name>/slope", "<name>/r2" (share of the variance of
    e that the regression explains), "<name>/skewness" and "<name>/kurtosis" (excess; both are 0 for a
    Gaussian), the last two of the residual and by the median, and "<name>/largest_r2".
    slope, bias, r2, residual_std, skewness, kurtosis: variant -> [S].
    shown: (variant, step) of the largest r2; points: [2, n], eps and e there.
    """

    verdict: dict
    timesteps: np.ndarray
    slope: dict[str, np.ndarray]
    bias: dict[str, np.ndarray]
    r2: dict[str, np.ndarray]
    residual_std: dict[str, np.ndarray]
    skewness: dict[str, np.ndarray]
    kurtosis: dict[str, np.ndarray]
    shown: tuple[str, int]
    points: np.ndarray


class Regression(NamedTuple):
    """e = slope eps + bias + residual by least squares, floats."""

    slope: float
    bias: float
    r2: float
    residual_std: float
    skewness: float
    kurtosis: float


def regress(eps: np.ndarray, error: np.ndarray) -> Regression:
    """Regression of the error on the estimate over all elements; arrays of one shape.

    Without any error everything is 0; of a residual that is 0 so are skewness and kurtosis.
    """
    x, e = (np.asarray(v, np.float64).ravel() for v in (eps, error))
    variance = x.var()
    slope = float(np.mean((x - x.mean()) * (e - e.mean())) / variance) if variance else 0.0
    bias = float(e.mean() - slope * x.mean())
    residual = e - slope * x - bias
    spread, total = float(residual.std()), float(e.std())
    unit = residual / spread if spread else residual
    return Regression(
        slope,
        bias,
        1.0 - (spread / total) ** 2 if total else 0.0,
        spread,
        float(np.mean(unit**3)),
        float(np.mean(unit**4)) - 3.0 if spread else 0.0,
    )


def noise_correlation(
    subject: Subject,
    variants: Mapping[str, dict],
    on_step: Callable | None = None,
    *,
    hooks: Mapping[str, Hooks] = MappingProxyType({}),
) -> NoiseCorrelation:
    """The regression at every step for every variant ({name: variables}), on full-precision states. hooks: of
    the variants that correct their estimates, of which what the correction leaves is measured."""
    eps = forced_eps(subject, subject.full)
    verdict: dict = {}
    columns: dict[str, dict[str, np.ndarray]] = {field: {} for field in Regression._fields}
    errors = {}
    for name, variables in variants.items():
        errors[name] = forced_eps(subject, variables, on_step, hooks.get(name, IDENTITY)) - eps
        rows = [regress(x, e) for x, e in zip(eps, errors[name])]
        for field, values in zip(Regression._fields, np.array(rows).T):
            columns[field][name] = values
        verdict[f"{name}/slope"] = float(columns["slope"][name].mean())
        verdict[f"{name}/r2"] = float(columns["r2"][name].mean())
        verdict[f"{name}/largest_r2"] = float(columns["r2"][name].max())
        verdict[f"{name}/skewness"] = float(np.median(columns["skewness"][name]))
        verdict[f"{name}/kurtosis"] = float(np.median(columns["kurtosis"][name]))
    name = max(columns["r2"], key=lambda v: columns["r2"][v].max())
    step = int(columns["r2"][name].argmax())
    pairs = np.stack([eps[step].ravel(), errors[name][step].ravel()])
    chosen = np.random.default_rng(subject.seed).permutation(pairs.shape[1])[:_SHOWN]
    return NoiseCorrelation(
        verdict,
        np.asarray(subject.trajectory.t),
        **columns,
        shown=(name, step),
        points=pairs[:, chosen],
    )
