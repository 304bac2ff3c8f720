"""Results of every analysis made by hand: a picture needs their shapes, and no network."""

import numpy as np

from qdiff_jax.analysis.beneficial import Beneficial, compare_frechet, compare_pairs
from qdiff_jax.analysis.deviation import Deviation
from qdiff_jax.analysis.histograms import Histograms, grid_use
from qdiff_jax.analysis.noise import NoiseCorrelation, Regression
from qdiff_jax.analysis.outliers import Outliers
from qdiff_jax.analysis.ranges import Ranges, widest_over_narrowest
from qdiff_jax.analysis.sensitivity import Sensitivity
from qdiff_jax.analysis.skips import Skips
from qdiff_jax.analysis.softmax import Softmax
from qdiff_jax.analysis.taylor import Taylor
from qdiff_jax.analysis.temporal import TemporalInformation
from qdiff_jax.eval.moments import moments_of
from qdiff_jax.quant.qparams import from_range
from qdiff_jax.quant.spec import QuantSpec

STEPS = np.array([0.0, 2.0, 9.0, 40.0, 250.0, 999.0])
VARIANTS = ("w8a8", "w4a8")
BLOCKS = tuple(f"up_{i}_block_{j}" for i in range(3) for j in range(3))
LAYERS = tuple(f"{block}/conv{k}" for block in BLOCKS for k in (1, 2))


def _rng():
    return np.random.default_rng(0)


def _curves(scale=1.0):
    decay = scale * np.exp(-STEPS / 300)
    return {name: decay * 10.0**k for k, name in enumerate(VARIANTS)}


def ranges():
    lo = -_rng().uniform(1, 20, (len(STEPS), len(LAYERS)))
    ratio = widest_over_narrowest(-2 * lo)
    names = tuple(f"{layer}:input" for layer in LAYERS)
    temporal = np.arange(len(names)) < 2
    channels = _rng().uniform(0, 5, (len(STEPS), 16))
    return Ranges({}, STEPS, names, lo, -lo, -2 * lo, ratio, temporal, names[4], channels)


def skips():
    rng, blocks = _rng(), len(BLOCKS)
    parts = [rng.normal(0, 4, 3000), rng.normal(0, 0.5, 3000)]
    edges = np.linspace(-12, 12, 61)
    densities = np.stack([np.histogram(p, edges, density=True)[0] for p in parts])
    std = rng.uniform(0.2, 5, (len(STEPS), blocks, 2))
    rows = rng.uniform(1, 9, (4, blocks))
    return Skips({}, STEPS, BLOCKS, std, *rows, BLOCKS[3], edges, densities)


def temporal():
    shift = {name: np.outer(np.ones(4), np.round(STEPS / 50)) for name in VARIANTS}
    verdict = {f"{name}/mismatch": 0.25 for name in VARIANTS}
    near = np.exp(-np.abs(STEPS[:, None] - STEPS[None]) / 300)
    return TemporalInformation(verdict, STEPS, BLOCKS[:4], 1, near, _curves(1e-3), shift)


def outliers():
    sizes = np.concatenate([_rng().uniform(0.5, 2, 62), [30.0, 12.0]])
    kinds = ("dense", "conv", "temporal") * 6
    ratio = _rng().uniform(1, 25, len(LAYERS))
    return Outliers(
        {"largest_ratio": 25.0}, LAYERS, kinds, ratio, BLOCKS, ratio[: len(BLOCKS)], LAYERS[0],
        sizes, STEPS, np.outer(np.ones(len(STEPS)), sizes),
    )  # fmt: skip


def deviation():
    return Deviation({}, STEPS, _curves(), _curves(0.01))


def noise():
    columns = {field: _curves(0.05) for field in Regression._fields}
    columns["kurtosis"] = {name: np.linspace(-2, 9, len(STEPS)) for name in VARIANTS}
    eps = _rng().normal(size=1000)
    points = np.stack([eps, 0.05 * eps + 0.02 * _rng().normal(size=1000)])
    return NoiseCorrelation({}, STEPS, **columns, shown=("w4a8", 0), points=points)


def sensitivity():
    bits = (2, 4, 8)
    errors = np.stack([_rng().lognormal(-b, 1.0, len(LAYERS)) for b in bits])
    weights, inputs = (tuple(f"{n}:{w}" for n in LAYERS) for w in ("weight", "input"))
    return Sensitivity({}, bits, weights, inputs, errors, errors / 3)


def histograms():
    values = _rng().normal(size=4000)
    uses = [grid_use(from_range(QuantSpec(), -3.0, 3.0, 0, 2**b - 1), values) for b in (4, 8)]
    column = np.full(len(LAYERS), 20.0)
    verdict = {"w_bits": 4, "a_bits": 8}
    return Histograms(verdict, LAYERS, column, column, column, column, LAYERS[7], 3, *uses)


def softmax(layers=3):
    names = tuple(f"blocks_{i}/attn_pv" for i in range(layers))
    fits = _rng().uniform(1, 4, (len(STEPS), layers, 4))
    share = np.geomspace(1.0, 1e-4, 50)
    curves = {f"{t:g}": np.stack([share ** (-1 / (1 + k)) * 1e-4, share]) for k, t in
              enumerate(STEPS[[0, 3, 5]])}  # fmt: skip
    return Softmax({"bits": 4}, STEPS, names, fits, fits[..., 0] / 3, names[0], curves)


def taylor():
    settings = ("w8a32", "w4a32", "w2a32", "w8a8", "w4a8", "w4a4")
    predicted = np.geomspace(1e-5, 10, len(settings))
    fractions = np.linspace(0.1, 1.0, 10)
    along = predicted[:, None] * fractions**2 / (1 + predicted[:, None] * fractions)
    return Taylor({}, settings, along[:, -1], predicted, np.ones(6), fractions, along)


def beneficial(real=True):
    rng, samplers, metrics = _rng(), ("ode", "sde"), ("distance", "confidence", "feature_distance")
    fine = rng.uniform(0, 1, 40)
    values, paired, frechet = {}, {}, {}
    for sampler in samplers:
        for metric in metrics:
            coarse = fine + rng.normal(0.1, 0.2, 40)
            values |= {f"{sampler}/w8a8/{metric}": fine, f"{sampler}/w4a8/{metric}": coarse}
            paired[f"{sampler}/{metric}"] = compare_pairs(fine, coarse, metric == "confidence")
        if real:
            features = {name: rng.normal(0.3 * k, 1, (40, 3))
                        for k, name in enumerate(("full", *VARIANTS))}  # fmt: skip
            found = compare_frechet(features, *VARIANTS, moments_of(rng.normal(size=(400, 3))))
            frechet |= {f"{sampler}/{name}": interval for name, interval in found.items()}
    return Beneficial({"pairs": 40}, *VARIANTS, samplers, metrics, paired, values, frechet)
