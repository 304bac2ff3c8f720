"""Step-aware mixed precision: how many bits the activations need at each step of the sampler.

At large t the state is mostly noise and the estimate may be coarse; near the image it may not. The bits of a
step are the fewest whose signal-to-quantization-noise ratio exceeds the signal-to-noise ratio of the
forward process there. Weights keep their width. Bits are data (code ranges in step tables), so measuring all
widths, and sampling with the widths chosen, is one compiled program. Source: He et al. 2023 (PTQD),
section 3.4.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qdiff_jax.models.registry import predictor
from qdiff_jax.observe.quantization_noise import Paired, quantized_at, reference_at
from qdiff_jax.policy import Entry, SitePlan
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.quant.spec import code_range
from qdiff_jax.quant.timed import TimeIndexed, from_ranges
from qdiff_jax.sites import flatten_sites, nest_sites, side_of
from qdiff_jax.stages.stage import Model, QuantState, Stage, fold_weights, tuned_params

# Of the policies, whatever a stage added behind it; ends and softmax keep their own width.
TARGET_RULE = "activations at target bits"


class Carry(NamedTuple):
    """errors: (bits, position) -> |eps_q - eps|^2, for the pairs measured so far."""

    state: QuantState
    params: dict
    quant: dict
    errors: dict[tuple[int, int], float]


def forward_snr(alpha_bar: Any) -> np.ndarray:
    """alpha_bar / (1 - alpha_bar), [S] float64: signal over noise in the state itself."""
    alpha_bar = np.asarray(alpha_bar, np.float64)
    return alpha_bar / (1.0 - alpha_bar)


def allocate_bits(snr: Mapping[int, Any], forward: Any) -> np.ndarray:
    """[S] int32: at each step the fewest bits whose SNR exceeds the forward process's.

    snr: {bits: [S]}, of the quantized estimate. forward: [S]. Where no width is enough, the largest.
    Raises ValueError without widths.
    """
    if not snr:
        raise ValueError("allocating bits needs at least one width to choose from.")
    widths, forward = sorted(snr), np.asarray(forward, np.float64)
    bits = np.full(forward.shape, widths[-1], np.int32)
    for width in reversed(widths):
        bits = np.where(np.asarray(snr[width], np.float64) > forward, np.int32(width), bits)
    return bits


def with_step_bits(
    quantizer: QParams | TimeIndexed,
    bits: Sequence[int],
    timesteps: Any,
    where: str = "a quantizer",
) -> TimeIndexed:
    """The same range on another number of codes at every step: a table with rule "step".

    quantizer: an affine activation quantizer with one range or one for each part of a split tensor, or a table
    of such over these timesteps. bits: [S].
    Raises ValueError for ranges measured at run time, other grids, or another table.
    """
    timed = isinstance(quantizer, TimeIndexed)
    held = quantizer.table if timed else quantizer
    whole = held.spec.granularity in ("tensor", "split")
    if held.spec.dynamic or held.spec.grid != "affine" or not whole:
        raise ValueError(
            f"{where} has the spec {held.spec}; bits by step need an affine quantizer with one "
            "calibrated range per tensor, or one for each part of a split one."
        )
    steps = np.asarray(timesteps, np.float32)
    if timed and (quantizer.branched or not np.array_equal(quantizer.timesteps, steps)):
        raise ValueError(
            f"{where} has a table over other steps than the sampler's; calibrate again."
        )
    scale, zero = (np.asarray(leaf, np.float32) for leaf in (held.scale, held.zero_point))
    if not timed:
        scale, zero = (np.broadcast_to(leaf, steps.shape + leaf.shape) for leaf in (scale, zero))
    column = steps.shape + (1,) * (scale.ndim - 1)
    qmin, qmax = (
        np.broadcast_to(np.asarray(leaf, np.float32), steps.shape).reshape(column)
        for leaf in (held.qmin, held.qmax)
    )
    codes = np.array([code_range(held.spec, int(b)) for b in bits], np.float32)
    lo, hi = (qmin - zero) * scale, (qmax - zero) * scale
    return from_ranges(held.spec, lo, hi, codes[:, 0], codes[:, 1], steps, rule="step")


def target_entries(plan: SitePlan) -> tuple[Entry, ...]:
    """The activations whose width is the target's. Raises ValueError if there are none."""
    roles = ("input", "q", "k", "softmax", "v")
    entries = tuple(e for e in plan.quantized(*roles) if e.rule.startswith(TARGET_RULE))
    if not entries:
        raise ValueError(
            f"bits by step need activations that are quantized by the rule {TARGET_RULE!r}, and this "
            "plan has none: choose a_bits below 32, or no step bits."
        )
    return entries


def quant_at_bits(quant: Mapping, entries: Sequence[Entry], bits: Any, timesteps: Any) -> dict:
    """A quant tree whose target activations have bits [S] by step."""
    flat = flatten_sites(dict(quant))
    for entry in entries:
        field = side_of(entry.operand)
        where = f"{entry.site}:{entry.operand}"
        table = with_step_bits(getattr(flat[entry.site], field), bits, timesteps, where)
        flat[entry.site] = flat[entry.site].replace(**{field: table})
    return nest_sites(flat)


def step_bits(
    model: Model,
    source: Paired,
    widths: Sequence[int],
    *,
    batch_size: int = 64,
    on_progress: Callable | None = None,
) -> Stage:
    """The stage that gives every target activation its bits by step, after ranges were calibrated.

    widths: candidates, ascending. It costs len(widths) evaluations of every pair; one step of the stage is
    one width at one step of the sampler. The report holds the table: "bits" [S], "timesteps", "snr".
    """
    widths = tuple(sorted(set(widths)))
    timesteps, steps = source.plan.timesteps, source.plan.steps
    todo = [(width, position) for width in widths for position in range(steps)]

    def init(state: QuantState, store: pathlib.Path | None) -> Carry:
        del store  # Some dozens of evaluations: made again after a kill.
        target_entries(state.plan)
        params, quant = fold_weights(tuned_params(model.params, state.aux), state.quant)
        return Carry(state, params, quant, {})

    def run(carry: Carry, n: int) -> Carry:
        predict, entries = predictor(model.module), target_entries(carry.state.plan)
        errors, quant, at = dict(carry.errors), None, None
        for width, position in todo[len(errors) : len(errors) + n]:
            if width != at:
                quant = quant_at_bits(carry.quant, entries, [width] * steps, timesteps)
                at = width
            variables = {"params": carry.params, "quant": quant}
            found = quantized_at(predict, variables, source, position, batch_size)
            gap = found.astype(np.float64) - reference_at(source, position)
            errors[width, position] = float(np.square(gap).sum())
            if on_progress is not None:
                on_progress(len(errors), len(todo), bits=width)
        return carry._replace(errors=errors)

    def done(carry: Carry) -> bool:
        return len(carry.errors) >= len(todo)

    def finish(carry: Carry) -> tuple[QuantState, dict]:
        power = np.array(
            [np.square(reference_at(source, i).astype(np.float64)).sum() for i in range(steps)]
        )
        snr = {}
        for width in widths:
            error = np.array([carry.errors[width, i] for i in range(steps)])
            with np.errstate(divide="ignore"):
                # An estimate that is not finite is never good enough.
                snr[width] = np.where(np.isfinite(error), power / error, 0.0)
        if source.alpha_bar is None:  # a flow
            forward = np.square(np.float64(source.plan.rows["signal"]) / source.plan.rows["noise"])
        else:
            forward = forward_snr(source.alpha_bar)
        bits = allocate_bits(snr, forward)
        entries = target_entries(carry.state.plan)
        quant = quant_at_bits(carry.state.quant, entries, bits, timesteps)
        return carry.state.replace(quant=quant), {
            "timesteps": np.asarray(timesteps, np.float64).tolist(),
            "bits": bits.tolist(),
            "mean_bits": float(bits.mean()),
            "forward_snr": forward.tolist(),
            # Without any error the ratio is infinite, which JSON cannot hold: null.
            "snr": {
                str(width): [float(v) if np.isfinite(v) else None for v in rows]
                for width, rows in snr.items()
            },
        }

    return Stage("calibrate_step_bits", init, run, finish, done, "correction")
