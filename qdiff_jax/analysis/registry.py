"""Analyses by name: what each runs on, and who draws it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from qdiff_jax.analysis import figures, figures_quantized
from qdiff_jax.analysis.beneficial import beneficial_noise
from qdiff_jax.analysis.deviation import trajectory_deviation
from qdiff_jax.analysis.histograms import quantization_histograms
from qdiff_jax.analysis.noise import noise_correlation
from qdiff_jax.analysis.outliers import channel_outliers
from qdiff_jax.analysis.ranges import activation_ranges
from qdiff_jax.analysis.sensitivity import layer_sensitivity
from qdiff_jax.analysis.skips import skip_concatenations
from qdiff_jax.analysis.softmax import softmax_power_law
from qdiff_jax.analysis.subject import Subject
from qdiff_jax.analysis.taylor import taylor_argument
from qdiff_jax.analysis.temporal import grid_for, temporal_information
from qdiff_jax.diffusion.hooks import Hooks
from qdiff_jax.diffusion.samplers import SamplerPlan
from qdiff_jax.eval.moments import Moments


class Given(NamedTuple):
    """What an analysis may ask for; the functions are called when they are needed, once.

    variants: () -> {name: variables}, in the order of `bits`. samplers: () -> {"ode": (subject, variants),
    "sde": ...}, the same on the deterministic and the ancestral sampler. bits: widths such as "w4a8".
    classify: images -> (logits, features), or None where there is no classifier for the images. real: moments
    of real images in its features, or None. pairs: global sample indices of the pairs of beneficial noise,
    or None for those of the trajectories. hooks, own_samplers: of the variants that correct their sampling or
    quantize the sampler too, by name. settings: what the numbers were made with, JSON for the record.
    """

    subject: Subject
    variants: Callable[[], Mapping[str, dict]]
    samplers: Callable[[], Mapping[str, tuple[Subject, Mapping[str, dict]]]]
    bits: tuple[str, ...]
    classify: Callable | None
    real: Moments | None = None
    pairs: Sequence[int] | None = None
    settings: Mapping[str, Any] = {}
    hooks: Mapping[str, Hooks] = {}
    own_samplers: Mapping[str, SamplerPlan] = {}


class Analysis(NamedTuple):
    """run(given, on_step) -> a NamedTuple with the dict `verdict`; on_step(done, total) is told how far
    it is. draw(result) -> its picture, one column wide."""

    run: Callable[[Given, Callable], Any]
    draw: Callable[[Any], Figure]


def _ranges(given, on_step):
    return activation_ranges(given.subject, on_step)


def _skips(given, on_step):
    return skip_concatenations(given.subject, on_step=on_step)


def _temporal(given, on_step):
    variants = given.variants()
    return temporal_information(given.subject, variants, grid_for(given.subject, variants))


def _outliers(given, on_step):
    return channel_outliers(given.subject, on_step)


def _deviation(given, on_step):
    return trajectory_deviation(
        given.subject, given.variants(), on_step, hooks=given.hooks, samplers=given.own_samplers
    )


def _noise(given, on_step):
    return noise_correlation(given.subject, given.variants(), on_step, hooks=given.hooks)


def _sensitivity(given, on_step):
    return layer_sensitivity(given.subject, on_step=on_step)


def _histograms(given, on_step):
    # The coarsest variant has the grid that one can see.
    return quantization_histograms(given.subject, bits=given.bits[-1], on_step=on_step)


def _softmax(given, on_step):
    return softmax_power_law(given.subject, on_step=on_step)


def _taylor(given, on_step):
    return taylor_argument(given.subject, on_step=on_step)


def _beneficial(given, on_step):
    samplers = given.samplers()
    return beneficial_noise(
        {name: subject for name, (subject, _) in samplers.items()},
        {name: variants for name, (_, variants) in samplers.items()},
        given.classify,
        on_step,
        real=given.real,
        seeds=given.pairs,
    )


ANALYSES: dict[str, Analysis] = {
    "ranges": Analysis(_ranges, figures.ranges_figure),
    "skips": Analysis(_skips, figures.skips_figure),
    "temporal": Analysis(_temporal, figures.temporal_figure),
    "outliers": Analysis(_outliers, figures.outliers_figure),
    "deviation": Analysis(_deviation, figures_quantized.deviation_figure),
    "noise": Analysis(_noise, figures_quantized.noise_figure),
    "sensitivity": Analysis(_sensitivity, figures_quantized.sensitivity_figure),
    "histograms": Analysis(_histograms, figures_quantized.histograms_figure),
    "softmax": Analysis(_softmax, figures.softmax_figure),
    "taylor": Analysis(_taylor, figures_quantized.taylor_figure),
    "beneficial": Analysis(_beneficial, figures_quantized.beneficial_figure),
}


def names_of(what: str) -> list[str]:
    """The analyses of a name, of several with commas between, or of "all".

    Raises ValueError for an unknown one, with those there are.
    """
    if what == "all":
        return list(ANALYSES)
    names = what.split(",")
    for name in names:
        if name not in ANALYSES:
            near = difflib.get_close_matches(name, ANALYSES, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"Analysis {name!r} is unknown; there are {[*ANALYSES, 'all']}.{hint}")
    return names
