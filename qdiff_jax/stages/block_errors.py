"""What the smoothing of one layer does to the output of the block around it.

SVDQuant (Li et al. 2024, arXiv:2411.05007) judges the smoothing of the layers that make queries, keys and
values by the output of the whole attention; here by that of its block, which holds all that follows of it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from qdiff_jax.branch import LowRank, low_rank
from qdiff_jax.models.program import Signature, apply_unit
from qdiff_jax.quant.qparams import dynamic_qparams
from qdiff_jax.quant.smoothing import smoothing_factors, weight_magnitude
from qdiff_jax.sites import Replacement, SiteQuant, flatten_sites, nest_sites
from qdiff_jax.stages.layer_branch import Codes, Grids, one_shot, unsmoothed


@functools.partial(jax.jit, static_argnames=("signature", "grids", "node", "op"))
def block_errors(
    key,
    signature: Signature,
    grids: Grids,
    codes: Codes,
    node,
    op,
    params,
    inputs,
    magnitude,
    pairs,
):
    """[J]: as `layer_branch.candidate_errors`, of the outputs of the block, all else in full precision.

    node, op: where the layer is in the unit. params, inputs: of the unit. Not for shifted inputs.
    """
    empty = tuple({} for _ in signature.modules)
    wanted = apply_unit(signature, params, empty, inputs)
    kernel = flatten_sites(params[node])[f"{op}/kernel"]
    folded = kernel.reshape(-1, *kernel.shape[-2:])
    w = weight_magnitude(kernel)

    def one(pair):
        s = smoothing_factors(magnitude, w, pair[0], pair[1])
        factors, rounded = one_shot(key, grids, codes, folded * s[None, :, None])
        quant = list(empty)
        arrays = LowRank(smoothing=1.0 / s)
        if factors is not None:
            down, up = unsmoothed(factors, s, kernel.shape)
            arrays = arrays.replace(down=down, up=up)
        lhs = None
        if grids.activation is not None:
            lhs = dynamic_qparams(grids.activation, *codes.activation)
        quant[node] = nest_sites({op: SiteQuant(lhs=lhs, substitute=Replacement(arrays, low_rank))})
        flat = {**flatten_sites(params[node]), f"{op}/kernel": rounded.reshape(kernel.shape)}
        weights = (*params[:node], nest_sites(flat), *params[node + 1 :])
        found = apply_unit(signature, weights, tuple(quant), inputs)
        gaps = [jnp.sum(jnp.square(f - v)) for f, v in zip(found, wanted, strict=True)]
        return jnp.sqrt(sum(gaps) / sum(jnp.sum(jnp.square(v)) for v in wanted))

    return lax.map(one, pairs)
