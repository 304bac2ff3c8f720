"""The step size of an activation as a learned function of the timestep, folded to a table at the end.

Temporal dynamic quantization (TDQ), So et al. 2023: the timestep is frequency
encoded and a small MLP with a softplus answers with the step size; nothing of the input is read, so that
for a known schedule the function is a table and inference pays nothing for it. Where the paper's code
shifts SiLU outputs by exactly 0.2785, the default here takes the nearest integer zero point, which an
ordinary affine table holds and an integer product can multiply; `exact` keeps the real shift.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from qdiff_jax.quant.qparams import SCALE_FLOOR, QParams
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.quant.timed import TimeIndexed

HIDDEN = 64
DROPOUT = 0.2
SILU_FLOOR = 0.2785  # silu(x) >= -0.27846...
# The answer starts within a few per cent of its bias for every t.
_LAST_LAYER = 0.1

Layers = tuple[tuple[jax.Array, jax.Array], ...]


@struct.dataclass
class TimeScale:
    """One activation's step size s(t), and the codes it values.

    layers: (kernel [in, out], bias [out]) of the MLP, the last with one output. offset: (), how far
    below zero the lowest code reaches (0.2785 for SiLU outputs, 0 for what is never negative); not read
    when `centred`. qmin, qmax: (), the codes. spec: static; of the rows it folds to. centred: static;
    the codes lie symmetrically about zero. shared: static; the network is asked for t = 0 whatever t is, so
    that one step size is learned for all of them (the ablation).
    """

    layers: Layers
    offset: jax.Array
    qmin: jax.Array
    qmax: jax.Array
    spec: QuantSpec = struct.field(pytree_node=False)
    centred: bool = struct.field(pytree_node=False)
    shared: bool = struct.field(pytree_node=False, default=False)


def frequency_encoding(t: jax.Array, dim: int) -> jax.Array:
    """[cos, sin] of t times the frequencies 10000^(-i / (dim/2)); t any shape -> [..., dim] float32."""
    half = dim // 2
    frequencies = jnp.exp(jnp.arange(half, dtype=jnp.float32) * (-math.log(10000.0) / half))
    angles = jnp.asarray(t, jnp.float32)[..., None] * frequencies.reshape(
        (1,) * jnp.ndim(t) + (half,)
    )
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def initial_layers(
    key: jax.Array, start: float | jax.Array, dim: int = 128, hidden: int = HIDDEN
) -> Layers:
    """An MLP dim -> hidden -> hidden -> hidden -> 1 whose answer is close to `start` > 0 for every t."""
    widths = (dim, hidden, hidden, hidden, 1)
    layers = []
    for i, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:])):
        kernel_key, bias_key = jax.random.split(jax.random.fold_in(key, i))
        bound = fan_in**-0.5
        kernel = jax.random.uniform(kernel_key, (fan_in, fan_out), minval=-bound, maxval=bound)
        bias = jax.random.uniform(bias_key, (fan_out,), minval=-bound, maxval=bound)
        layers.append((kernel, bias))
    start = jnp.maximum(jnp.asarray(start, jnp.float32), SCALE_FLOOR)
    # The inverse of softplus, in the form that neither overflows nor cancels.
    bias = (start + jnp.log(-jnp.expm1(-start))).reshape(1)
    layers[-1] = (layers[-1][0] * _LAST_LAYER, bias)
    return tuple(layers)


def predict_step(
    layers: Layers, t: jax.Array, dropout_key: jax.Array | None = None, dropout: float = DROPOUT
) -> jax.Array:
    """s(t) > 0, shaped like t. With a key, units before the last layer are dropped (training)."""
    shape = jnp.shape(t)
    h = frequency_encoding(jnp.reshape(t, (-1,)), layers[0][0].shape[0])
    for kernel, bias in layers[:-1]:
        h = jax.nn.relu(h @ kernel + bias.reshape(1, -1))
    if dropout_key is not None and dropout > 0.0:
        kept = jax.random.bernoulli(dropout_key, 1.0 - dropout, h.shape)
        h = jnp.where(kept, h * (1.0 / (1.0 - dropout)), 0.0)
    kernel, bias = layers[-1]
    return jax.nn.softplus(h @ kernel + bias.reshape(1, 1)).reshape(shape)


def qparams_at(
    scale: TimeScale,
    t: jax.Array,
    *,
    layers: Layers | None = None,
    dropout_key: jax.Array | None = None,
    dropout: float = DROPOUT,
) -> QParams:
    """The quantizer at t (), or one per sample for t [B] (`rows=True`); differentiable in the layers.

    layers: in place of the scale's own (what is being trained). The zero point takes no gradient, except
    on the grid "shifted", where it is the real number offset / s.
    """
    t = jnp.asarray(t, jnp.float32)
    asked = jnp.zeros_like(t) if scale.shared else t
    step = predict_step(layers or scale.layers, asked, dropout_key, dropout)
    step = jnp.maximum(step, SCALE_FLOOR)
    qmin, qmax = (jnp.broadcast_to(v, t.shape) for v in (scale.qmin, scale.qmax))
    if scale.centred:
        zero = (qmin + qmax) * 0.5
    elif scale.spec.grid == "shifted":
        zero = qmin + scale.offset / step
    else:
        shift = jax.lax.stop_gradient(jnp.round(scale.offset / step))
        zero = jnp.clip(qmin + shift, qmin, qmax)
    return QParams(step, zero, qmin, qmax, scale.spec, rows=t.ndim == 1)


def bake(scale: TimeScale, timesteps: Sequence[float] | jax.Array) -> TimeIndexed:
    """The table of a schedule by step index; timesteps [S]. What inference, bundles and integers see."""
    timesteps = jnp.asarray(timesteps, jnp.float32)
    table = _baked(scale, timesteps)
    return TimeIndexed(table.replace(rows=False), timesteps, "step")


_baked = jax.jit(qparams_at)


def start_step(
    mean_magnitude: float, deviation: float, qmax: float, *, centred: bool, top: float | None = None
) -> float:
    """The step that training starts from.

    centred: (mean|x| + 3 std) over the largest positive code; otherwise the SiLU rule,
    (mean|x| + 16 std) over all codes. qmax: largest code, counted from the zero point if centred and
    from the lowest code if not. top: upper limit of the covered range (what is never above 1, say).
    """
    reach = mean_magnitude + (3.0 if centred else 16.0) * deviation
    return max((reach if top is None else min(reach, top)) / qmax, SCALE_FLOOR)


def time_scale(
    key: jax.Array,
    spec: QuantSpec,
    bits: int,
    *,
    lo: float,
    hi: float,
    mean_magnitude: float,
    deviation: float,
    dim: int = 128,
    hidden: int = HIDDEN,
    exact: bool = False,
    shared: bool = False,
) -> TimeScale:
    """The start of one activation's s(t), from what was seen of it.

    An activation that never falls below SiLU's floor is taken for a SiLU (or GELU) output if it is ever
    negative, and for one without negative values otherwise; every other gets codes symmetric about
    zero, one fewer than there are (+-(2^(bits-1) - 1)). exact: the paper's real shift of SiLU outputs,
    on the grid "shifted", which has no code for zero and no integer execution. shared: see `TimeScale`.

    Raises ValueError for a spec that is not affine, per tensor and static.
    """
    if spec.grid != "affine" or spec.granularity != "tensor" or spec.dynamic or spec.signed:
        raise ValueError(
            f"a step size predicted from the timestep needs an affine, unsigned, static quantizer per "
            f"tensor, not {spec}."
        )
    levels = 2.0**bits
    centred = lo < -SILU_FLOOR - 1e-4 and not spec.symmetric
    if centred:
        offset, qmax = 0.0, levels - 2.0
        start = start_step(mean_magnitude, deviation, levels / 2 - 1.0, centred=True)
    else:
        offset, qmax = (SILU_FLOOR if lo < 0 and not spec.symmetric else 0.0), levels - 1.0
        top = None if offset else hi
        start = start_step(mean_magnitude, deviation, qmax, centred=False, top=top)
    if exact and offset:
        spec = QuantSpec(grid="shifted")
    values = (jnp.asarray(v, jnp.float32) for v in (offset, 0.0, qmax))
    return TimeScale(initial_layers(key, start, dim, hidden), *values, spec, centred, shared)
