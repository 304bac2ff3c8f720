"""Four troubles of quantized diffusion, before a method and after it, on one model and one sampler.

Ranges of activations that move along the trajectory (TDQ, So et al. 2023; TFMQ-DM, Huang et al. 2024), errors
that accumulate over the steps (PTQD, He et al. 2023), temporal features mistaken for those of another step
(TFMQ-DM), and skip concatenations of two spreads (Q-Diffusion, Li et al. 2023): each measured on the bundles
that methods leave, on full-precision trajectories that none was calibrated on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from qdiff_jax.analysis.deviation import trajectory_deviation
from qdiff_jax.analysis.observed import step_reports, step_values
from qdiff_jax.analysis.remedy_pairs import ANSWERS
from qdiff_jax.analysis.skips import concatenating
from qdiff_jax.analysis.subject import NotApplicable, Subject, is_temporal
from qdiff_jax.analysis.temporal import temporal_information
from qdiff_jax.diffusion.hooks import Hooks
from qdiff_jax.diffusion.samplers import SamplerPlan
from qdiff_jax.observe.taps import Tap, sample_positions
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.quant.quantizer import fake_quant
from qdiff_jax.quant.timed import select, step_context
from qdiff_jax.sites import flatten_sites, side_of
from qdiff_jax.stages.stage import leaves_by_path

_fake_quant = jax.jit(fake_quant)


class Remedies(NamedTuple):
    """S timesteps ascending, K layers that read a skip concatenation as it is.

    verdict: "<variant>/<measure>" for each of the four. activations: variant -> [S], the median over
    image-dependent activations of the relative squared error of their quantizer. accumulated: variant ->
    [S], relative MSE of the state after each step of its own sampling. temporal: variant -> [S], 1 - cos of
    temporal features. layers: [K] names; skips: variant -> [K], relative squared error of the map with the
    smaller spread. A measure that was not asked for is empty, and the last two for a model without skips.
    """

    verdict: dict
    timesteps: np.ndarray
    activations: dict[str, np.ndarray]
    accumulated: dict[str, np.ndarray]
    temporal: dict[str, np.ndarray]
    layers: tuple[str, ...]
    skips: dict[str, np.ndarray]


def remedies(
    subject: Subject,
    variants: Mapping[str, dict],
    on_step: Callable | None = None,
    *,
    measures: Mapping[str, Sequence[str]] | None = None,
    hooks: Mapping[str, Hooks] = MappingProxyType({}),
    samplers: Mapping[str, SamplerPlan] = MappingProxyType({}),
) -> Remedies:
    """The four measures of variants ({name: variables}), all calibrated for the subject's sampler.

    measures: {a key of ANSWERS: names of the variants to measure by it}, those of `remedy_pairs.choose_pairs`
    for instance; None for every variant by each. hooks, samplers: of the variants that correct their sampling
    or quantize the sampler too, by name. Raises ValueError as `activation_error` does, and NotApplicable if
    skips alone are asked for of a model without any.
    """
    if measures is None:
        measures = dict.fromkeys(ANSWERS, tuple(variants))
    of = {m: {name: variants[name] for name in measures.get(m, ())} for m in ANSWERS}
    times = np.asarray(subject.trajectory.t)
    activations: dict[str, np.ndarray] = {}
    accumulated: dict[str, np.ndarray] = {}
    temporal: dict[str, np.ndarray] = {}
    layers: tuple[str, ...] = ()
    skips: dict[str, np.ndarray] = {}
    verdict = {}
    if of["activations"]:
        activations = activation_error(subject, of["activations"], on_step)
        verdict |= {f"{n}/activations": float(np.median(v)) for n, v in activations.items()}
    if of["rollout"]:
        strayed = trajectory_deviation(subject, of["rollout"], hooks=hooks, samplers=samplers)
        accumulated = strayed.accumulated
        verdict |= {f"{name}/rollout": float(v[0]) for name, v in accumulated.items()}
    if of["temporal"]:
        features = temporal_information(subject, of["temporal"], times)
        temporal = features.error
        for name, values in temporal.items():
            verdict[f"{name}/temporal"] = float(values.mean())
            verdict[f"{name}/mismatch"] = features.verdict[f"{name}/mismatch"]
    if of["skips"]:
        try:
            layers, skips = skip_error(subject, of["skips"], on_step)
        except NotApplicable:
            if not verdict:  # nothing else was asked for
                raise
        verdict |= {f"{name}/skips": float(np.median(v)) for name, v in skips.items() if layers}
    return Remedies(verdict, times, activations, accumulated, temporal, layers, skips)


def _quantizers(variants: Mapping[str, dict], ctx: Any) -> dict[str, dict[str, Any]]:
    """{variant: {site: SiteQuant}} as they are at a step."""
    return {name: flatten_sites(select(v["quant"], ctx)) for name, v in variants.items()}


def _quantizer(sites: Mapping[str, Any], name: str) -> QParams | None:
    """The static quantizer of "site:operand"; None where there is none, or another kind."""
    site, _, operand = name.rpartition(":")
    held = sites.get(site)
    found = None if held is None else getattr(held, side_of(operand))
    return found if isinstance(found, QParams) and not found.spec.dynamic else None


def _divisors(params: Mapping) -> dict[str, np.ndarray]:
    """{"site:input": [C]}: by what a method has the inputs of a layer divided before they are quantized."""
    return {
        f"{path.removesuffix('/divisor')}:input": np.asarray(leaf)
        for path, leaf in leaves_by_path(params).items()
        if path.endswith("/divisor")
    }


def _renormed(params: Mapping, full: Mapping) -> set[str]:
    """Blocks of which a method changed a normalization: their activations are not those of full precision."""
    theirs = leaves_by_path(params)
    return {
        path.split("/")[0]
        for path, leaf in leaves_by_path(full).items()
        if path.endswith("/scale") and path in theirs and not np.array_equal(leaf, theirs[path])
    }


def _rotated(params: Mapping) -> set[str]:
    """ "site:input" of layers that rotate their input before it is quantized: its channels are other values."""
    paths = leaves_by_path(params)
    return {f"{p.removesuffix('/rotation')}:input" for p in paths if p.endswith("/rotation")}


def _error(values: np.ndarray, quantizer: QParams, divisor: np.ndarray | None) -> np.ndarray:
    """What quantizing does to values [..., N], float64; divisor: [N] around the quantizer, or None."""
    inner = values if divisor is None else values / divisor
    outer = np.asarray(_fake_quant(quantizer, inner), np.float64)
    return (outer if divisor is None else outer * divisor) - values


def _relative(values: np.ndarray, quantizer: QParams, divisor: np.ndarray | None) -> float:
    error = np.square(_error(values, quantizer, divisor)).sum()
    return float(error / max(np.square(values, dtype=np.float64).sum(), 1e-30))


def activation_error(
    subject: Subject, variants: Mapping[str, dict], on_step: Callable | None = None
) -> dict[str, np.ndarray]:
    """{variant: [S]}: at each step the median over activations that depend on the image of |x_q - x|^2 / |x|^2
    on full-precision values. Of activations with one range per tensor in every variant, outside blocks of which
    one changed a normalization, and without layers whose input one rotates.

    Raises ValueError where there is none such."""
    times = subject.trajectory.t
    full = subject.model.params
    counts = {f"{site.name}:input": math.prod(site.lhs_shape[1:]) for site in subject.sites}
    divisors = {
        name: {
            key: divisor[np.asarray(sample_positions(counts[key])) % len(divisor)]
            for key, divisor in _divisors(v["params"]).items()
        }
        for name, v in variants.items()
    }
    moved = set().union(*(_renormed(v["params"], full) for v in variants.values()))
    turned = set().union(*(_rotated(v["params"]) for v in variants.values()))
    rows: dict[str, list] = {name: [] for name in variants}
    reports = step_reports(subject, subject.sites, Tap("sample"), on_step)
    for position, (t, report) in enumerate(zip(times, reports, strict=True)):
        ctx = step_context(np.float32(t), np.int32(position))
        held = {
            name: {key: _quantizer(sites, key) for key in report}
            for name, sites in _quantizers(variants, ctx).items()
        }
        shared = [
            key
            for key in report
            if not is_temporal(subject.model, key)
            and key.split("/")[0] not in moved
            and key not in turned
            and all(
                q[key] is not None and q[key].spec.granularity == "tensor" for q in held.values()
            )
        ]
        if not shared:
            raise ValueError(
                f"{', '.join(variants)}: no activation has one static range in each of them, so that their "
                "errors do not compare; leave out the one that has groups or ranges per token."
            )
        for name, quantizers in held.items():
            found = [
                _relative(report[key]["sample"], quantizers[key], divisors[name].get(key))
                for key in shared
            ]
            rows[name].append(np.median(found))
    return {name: np.array(values) for name, values in rows.items()}


def skip_error(
    subject: Subject, variants: Mapping[str, dict], on_step: Callable | None = None
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """(layers [K], {variant: [K]}): relative squared error of the map with the smaller spread, under the input
    quantizer of the shortcut that reads both, over all steps. Shortcuts whose input a variant rotates are left
    out.

    Raises NotApplicable for a model without skips.
    """
    turned = set().union(*(_rotated(v["params"]) for v in variants.values()))
    pairs = {
        block: pair
        for block, pair in concatenating(subject.model.program).items()
        if f"{block}/nin_shortcut:input" not in turned
    }
    names = list(dict.fromkeys(name for pair in pairs.values() for name in pair))
    layers = tuple(f"{block}/nin_shortcut" for block in pairs)
    divisors = {name: _divisors(v["params"]) for name, v in variants.items()}
    wrong = {name: np.zeros((len(layers), 2)) for name in variants}
    whole = np.zeros((len(layers), 2))
    for position, values in enumerate(step_values(subject, names, on_step)):
        ctx = step_context(np.float32(subject.trajectory.t[position]), np.int32(position))
        held = _quantizers(variants, ctx)
        for k, (layer, pair) in enumerate(zip(layers, pairs.values(), strict=True)):
            maps = [values[part] for part in pair]
            both, boundary = np.concatenate(maps, axis=-1), maps[0].shape[-1]
            whole[k] += [np.square(part, dtype=np.float64).sum() for part in maps]
            for name, sites in held.items():
                quantizer = _quantizer(sites, f"{layer}:input")
                if quantizer is None:
                    continue
                error = _error(both, quantizer, divisors[name].get(f"{layer}:input"))
                parts = np.split(np.square(error), [boundary], axis=-1)
                wrong[name][k] += [part.sum() for part in parts]
    smaller = whole.argmin(axis=1)[:, None]
    base = np.take_along_axis(whole, smaller, axis=1)[:, 0]
    found = {
        name: np.take_along_axis(sums, smaller, axis=1)[:, 0] / np.maximum(base, 1e-30)
        for name, sums in wrong.items()
    }
    return layers, found
