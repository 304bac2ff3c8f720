"""From what was found for a layer to what its site holds, and what the report says of it."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.branch import LowRank, low_rank
from qdiff_jax.export.qtensor import QTensor, from_codes
from qdiff_jax.models.program import node_at
from qdiff_jax.policy import Entry
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.sites import Replacement, SiteQuant
from qdiff_jax.stages.layer_branch import Solved


def with_branch(
    held: SiteQuant, made: Solved, entry: Entry, bias: np.ndarray | None, shift: float
) -> SiteQuant:
    """The site with its codes, its operator, and the bias [N] that makes up for the shift.

    entry: of the weight. bias: the layer's own, and shift: of its inputs; both are read where those are shifted
    (`Solved.sums`). Where neither branch nor smoothing nor shift is left, the site has no operator of its own.
    """
    shifted = made.sums is not None
    factors = (None if v is None else jnp.asarray(v) for v in (made.down, made.up, made.smoothing))
    arrays = LowRank(*factors, shift=jnp.float32(shift) if shifted else None)
    return held.replace(
        rhs=_packed(made, entry),
        substitute=Replacement(arrays, low_rank) if jax.tree.leaves(arrays) else None,
        bias=jnp.asarray(bias - np.float32(shift) * made.sums) if shifted else held.bias,
    )


def _packed(made: Solved, entry: Entry) -> QTensor:
    ends = (jnp.float32(code) for code in entry.codes)
    zero = jnp.asarray(np.zeros_like(made.scale))
    grid = QParams(jnp.asarray(made.scale), zero, *ends, entry.spec)
    return from_codes(made.codes.astype(np.int32), grid, entry.bits)


def figures(made: Solved) -> dict:
    """Exponents, rank, errors (`Solved.errors`), iterations, and the bits that a branch in float16 adds to each
    weight."""
    added = 0 if made.down is None else 16 * (made.down.size + made.up.size) / made.codes.size
    plain, one_shot, kept = (None if np.isnan(e) else float(e) for e in made.errors)
    return {
        "exponents": made.exponents.tolist(),
        "rank": 0 if made.down is None else int(made.down.shape[-1]),
        "plain": plain,
        "one_shot": one_shot,
        "error": kept,
        "iterations": int(made.iterations),
        "branch_bits": float(added),
    }


def bias_at(params: Mapping, name: str) -> np.ndarray:
    """The bias [N] of the layer at a site, zeros for a layer without one."""
    node = node_at(params, name)
    if "bias" not in node:  # as of q, k and v in latent diffusion
        return np.zeros(node["kernel"].shape[-1], np.float32)
    return np.asarray(node["bias"], np.float32)
