"""Rotations of a network's layers: changes of parameters that leave its output as it is.

X W = (X R)(R'W). Between the residual stream of a diffusion transformer and each of its layers stands a
diagonal that depends on the input (the modulation), with which no rotation commutes. Hence:

  - `rotate_inputs`: R'W in the kernel, and R as the layer's `rotation`, one small product per forward
    pass (qkv, fc1, fc2; any convolution over its channels, zero padding included);
  - `rotate_values`: R_d per head in the columns of V and in the rows of the projection that reads the
    attention, sum_m p_nm (v_m R_d) R_d' = sum_m p_nm v_m: no cost at run time;
  - `rotate_queries`: R_d per head in the columns of Q and K, (q R_d)(k R_d)' = q k': no cost either. Only
    where nothing (norm, rotary embedding) stands between.

Each returns the leaves that change, as `stage.replace_leaves` takes them and `aux["params"]` holds them;
whatever follows (observing, rounding, integers) then sees the rotated layer and nothing else. Source: QuaRot
(Ashkboos et al. 2024), sections 4.1-4.2, for language models, whose residual stream is rotated too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from qdiff_jax.models.program import node_at
from qdiff_jax.quant.hadamard import random_rotation, rotate, rotate_rows
from qdiff_jax.stages.stage import kernel_at


def rotate_inputs(
    params: Mapping, names: Sequence[str], key: jax.Array, block: int | None = None
) -> dict[str, jax.Array]:
    """{path: leaf} after which each layer of `names` ("block/op") rotates its input.

    A layer's channel factor (`divisor`), if it has one, stays in front of the rotation. block: channels mixed
    with each other; None mixes all. Every layer draws signs of its own. Raises ValueError for a layer that is
    rotated already, or whose channels have no Hadamard matrix.
    """
    leaves = {}
    for i, name in enumerate(names):
        kernel = kernel_at(params, name)
        if "rotation" in node_at(params, name):
            raise ValueError(
                f"{name} is rotated already; a second rotation would replace the first."
            )
        signs = random_rotation(jax.random.fold_in(key, i), kernel.shape[-2], block)
        leaves[f"{name}/rotation"] = signs
        leaves[f"{name}/kernel"] = rotate_rows(kernel, signs)
    return leaves


def rotate_values(
    params: Mapping, qkv: str, proj: str, heads: int, key: jax.Array
) -> dict[str, jax.Array]:
    """{path: leaf} after which V of every head, and the rows of `proj` that read it, are rotated.

    qkv: layer [D, 3 D] of the columns (q, k, v), each by head; proj: [D, D]. Raises ValueError if the heads
    do not divide D or have a width without a Hadamard matrix, or if `proj` transforms its input itself.
    """
    own = sorted({"divisor", "rotation"} & set(node_at(params, proj)))
    if own:
        raise ValueError(
            f"{proj} has a {own[0]} of its own, behind which the rows of a head are no longer apart; "
            "rotate the values first."
        )
    kernel, bias = _columns(params, qkv, heads)
    signs = random_rotation(key, kernel.shape[-1])
    rows = kernel_at(params, proj)
    by_head = rows.reshape(heads, -1, rows.shape[-1])
    return {
        **_with_columns(qkv, kernel, bias, (2,), signs),
        f"{proj}/kernel": rotate_rows(by_head, signs).reshape(rows.shape),
    }


def rotate_queries(params: Mapping, qkv: str, heads: int, key: jax.Array) -> dict[str, jax.Array]:
    """{path: leaf} after which Q and K of every head are rotated by one rotation; as `rotate_values`."""
    kernel, bias = _columns(params, qkv, heads)
    return _with_columns(qkv, kernel, bias, (0, 1), random_rotation(key, kernel.shape[-1]))


def _columns(params, qkv, heads):
    """The kernel [D, 3, heads, d] and the bias [3, heads, d] of a fused layer."""
    layer = node_at(params, qkv)
    kernel, bias = layer["kernel"], layer["bias"]
    inputs, outputs = kernel.shape
    if outputs % 3 or (outputs // 3) % heads:
        raise ValueError(
            f"{qkv} writes {outputs} channels, which are not queries, keys and values of {heads} heads."
        )
    return kernel.reshape(inputs, 3, heads, -1), bias.reshape(3, heads, -1)


def _with_columns(qkv, kernel, bias, which, signs):
    for i in which:
        kernel = kernel.at[:, i].set(rotate(kernel[:, i], signs))
        bias = bias.at[i].set(rotate(bias[i], signs))
    return {f"{qkv}/kernel": kernel.reshape(len(kernel), -1), f"{qkv}/bias": jnp.ravel(bias)}
