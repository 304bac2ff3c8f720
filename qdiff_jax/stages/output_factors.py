"""How much the network's prediction feels each output of each layer: one backward pass for all layers.

G = mean of g g' over samples and positions, g = d(v . eps) / d(layer output), v Rademacher: an estimate
of the Gauss-Newton metric of the prediction in a layer's output space, the output half of K-FAC's
Kronecker product (Martens and Grosse 2015). Taken in full precision, with respect to offsets added to the
layers' outputs, so that any model serves whose operators go through `sites.op`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.observe.capture import batch_bounds, slice_rows
from qdiff_jax.operators import plain
from qdiff_jax.sites import Replacement, SiteQuant, list_sites, nest_sites
from qdiff_jax.stages.stage import Model
from qdiff_jax.stages.unit_structure import with_offset

_EXACT = jax.lax.Precision.HIGHEST


def output_factors(
    model: Model,
    calibration: Any,
    key: jax.Array,
    *,
    batch_size: int = 32,
    row_weights: np.ndarray | None = None,
) -> dict[str, jax.Array]:
    """{site: G [N, N] float32} of every layer with a weight.

    calibration: x, t [N], y or None. row_weights: [N], how much each sample's gradients count.
    The draw of v depends on the key and the sample's number alone. Raises ValueError unless batch_size
    divides the set.
    """
    size = int(np.shape(calibration.t)[0])
    weights = np.ones(size, np.float32) if row_weights is None else np.float32(row_weights)
    total: dict[str, jax.Array] = {}
    for start, stop in batch_bounds(size, min(batch_size, size)):
        batch = _batch(calibration, weights, start, stop)
        part = _squares(model.module, _shapes(model, batch), model.params, batch, key)
        total = part if not total else jax.tree.map(jnp.add, total, part)
    norm = float(weights.sum())
    return {site: g / norm for site, g in total.items()}


def factor_bytes(model: Model, calibration: Any, batch_size: int) -> int:
    """Bytes that `output_factors` holds for one batch, from shapes alone: what the forward pass keeps for
    the backward one, an offset and a gradient for each output of a layer, and every G twice."""
    batch = _batch(calibration, np.ones(len(calibration.t), np.float32), 0, batch_size)
    shapes = _shapes(model, batch)
    offsets = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes}
    kept = jax.eval_shape(
        lambda params, given, offsets: jax.vjp(_prediction(model.module, params, given), offsets),
        model.params,
        batch,
        offsets,
    )
    moved = jax.tree.leaves((kept, offsets, offsets))
    squares = sum(2 * shape[-1] ** 2 for _, shape in shapes)
    return 4 * squares + sum(int(np.prod(v.shape)) * v.dtype.itemsize for v in moved)


def fitting_batch(model: Model, calibration: Any, batch_size: int, mib: int, where: str) -> int:
    """batch_size, or the first of its halves, quarters, ... whose `factor_bytes` are at most mib MiB.

    Raises ValueError if none is.
    """
    while (need := factor_bytes(model, calibration, batch_size)) > mib << 20:
        if batch_size % 2:
            samples = "1 sample" if batch_size == 1 else f"{batch_size} samples at once"
            raise ValueError(
                f"{where}: the backward pass for kronecker_sweeps needs {need / 2**20:.0f} MiB for {samples}, "
                f"more than memory_mib={mib}; raise memory_mib, or set kronecker_sweeps to 0."
            )
        batch_size //= 2
    return batch_size


def _shapes(model: Model, batch: Mapping) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(site, shape of its output) of every layer with a weight, as a static argument."""
    sites = list_sites(model.module, batch["x"], batch["t"], batch["y"])
    made = []
    for site in sites:
        if site.has_weight:
            lhs, rhs = (
                jax.ShapeDtypeStruct(s, jnp.float32) for s in (site.lhs_shape, site.rhs_shape)
            )
            out = jax.eval_shape(functools.partial(plain, site.operator, bias=None), lhs, rhs)
            made.append((site.name, tuple(out.shape)))
    return tuple(made)


def _batch(calibration, weights, start: int, stop: int) -> dict:
    batch = {k: getattr(calibration, k) for k in ("x", "t", "y")}
    numbers = np.arange(len(weights))
    return slice_rows({**batch, "weight": weights, "number": numbers}, start, stop)


def _prediction(module, params, batch):
    """The network's prediction as a function of {site: offset of its output}."""

    def prediction(offsets):
        flat = {
            n: SiteQuant(substitute=Replacement((True, o), with_offset)) for n, o in offsets.items()
        }
        variables = {"params": params, "quant": nest_sites(flat)}
        return module.apply(variables, batch["x"], batch["t"], batch["y"])

    return prediction


@functools.partial(jax.jit, static_argnames=("module", "shapes"))
def _squares(module, shapes, params, batch, key) -> dict[str, jax.Array]:
    """Sums over the batch of weight * mean over positions of g g'."""

    def draw(number):
        sample_key = jax.random.fold_in(key, number)
        return jax.random.rademacher(sample_key, output.shape[1:], jnp.float32)

    offsets = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes}
    output, backward = jax.vjp(_prediction(module, params, batch), offsets)
    gradients = backward(jax.vmap(draw)(batch["number"]))[0]

    def square(g):
        g = g.reshape(g.shape[0], -1, g.shape[-1])
        rows = g * (batch["weight"] / g.shape[1])[:, None, None]
        g, rows = (v.reshape(-1, v.shape[-1]) for v in (g, rows))
        return jnp.matmul(rows.T, g, precision=_EXACT)

    return {name: square(g) for name, g in gradients.items()}
