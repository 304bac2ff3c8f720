"""How far a quantized model is from the full-precision one: metrics, pictures, report.

Metrics by their names in the field are here; functions that share a module's name are meant where both are
(`from qdiff_jax.eval import inception_score`).
"""

from qdiff_jax.eval.clip_score import clip_score, clip_score_interval
from qdiff_jax.eval.frechet import frechet_distance, frechet_infinity
from qdiff_jax.eval.inception_score import inception_score
from qdiff_jax.eval.intervals import bootstrap, jackknife
from qdiff_jax.eval.kid import kernel_inception_distance
from qdiff_jax.eval.lpips import load_lpips, lpips
from qdiff_jax.eval.moments import Moments, moments_of
from qdiff_jax.eval.paired import mse, paired_metrics, psnr, sqnr, ssim
from qdiff_jax.eval.precision_recall import precision_recall, precision_recall_intervals
from qdiff_jax.eval.reference import (
    check_comparable,
    distance,
    load_published,
    real_floor,
    reference_statistics,
)
from qdiff_jax.eval.tools import (
    TOOLS,
    distribution_intervals,
    distribution_metrics,
    preprocess,
)

__all__ = [
    "TOOLS",
    "Moments",
    "bootstrap",
    "check_comparable",
    "clip_score",
    "clip_score_interval",
    "distance",
    "distribution_intervals",
    "distribution_metrics",
    "frechet_distance",
    "frechet_infinity",
    "inception_score",
    "jackknife",
    "kernel_inception_distance",
    "load_lpips",
    "load_published",
    "lpips",
    "moments_of",
    "mse",
    "paired_metrics",
    "precision_recall",
    "precision_recall_intervals",
    "preprocess",
    "psnr",
    "real_floor",
    "reference_statistics",
    "sqnr",
    "ssim",
]
