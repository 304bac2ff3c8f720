"""Which layers of a network can be smoothed, and that the DiT is the same function afterwards."""

import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.models.folds import Fold, fold_leaves, folds_of
from qdiff_jax.stages.stage import replace_leaves

from .. import tiny_dit, tiny_unet

NET = tiny_dit.network(tiny_dit.CONFIG)


def output(params):
    x, t = tiny_dit.inputs(tiny_dit.CONFIG, 3)
    y = np.arange(3, dtype=np.int32)
    return np.asarray(tiny_dit.forward(tiny_dit.CONFIG)({"params": params, "quant": {}}, x, t, y))


def factors(fold, seed):
    node = NET.params
    for part in fold.site.split("/"):
        node = node[part]
    drawn = np.random.default_rng(seed).standard_normal(node["kernel"].shape[0])
    return jnp.asarray(np.exp(drawn), jnp.float32)


def test_a_transformer_has_four_folds_a_block_and_one_at_the_end():
    folds = folds_of(NET.program)
    assert folds[:4] == (
        Fold("blocks_0/attn_qkv", "blocks_0_adaLN/dense", 0, 1),
        Fold("blocks_0/attn_proj", "blocks_0/attn_qkv", 2),
        Fold("blocks_0/mlp_fc1", "blocks_0_adaLN/dense", 3, 4),
        Fold("blocks_0/mlp_fc2", None),
    )
    assert folds[-1] == Fold("final_layer/linear", "final_layer_adaLN/dense", 0, 1)
    assert len(folds) == 4 * tiny_dit.CONFIG.depth + 1
    assert folds_of(tiny_unet.network(tiny_unet.SMALL).program) == ()


@pytest.mark.parametrize("chosen", [("attn_qkv",), ("attn_proj",), ("mlp_fc1",), ("linear",), ()])
def test_full_precision_is_unchanged(chosen):
    """One kind of layer at a time, and all of them, fc2 too, whose division stays in the network."""
    params, changed = NET.params, {}
    for i, fold in enumerate(folds_of(NET.program)):
        if not chosen or fold.site.rsplit("/", 1)[-1] in chosen:
            leaves = fold_leaves(params, fold, factors(fold, i))
            params, changed = replace_leaves(params, leaves), changed | leaves
    assert changed
    before = output(NET.params)
    np.testing.assert_allclose(output(params), before, rtol=0, atol=1e-5 * np.abs(before).max())
    assert any(path.endswith("/divisor") for path in changed) == (not chosen)


def test_folded_and_divided_at_run_time_are_the_same():
    fold = folds_of(NET.program)[0]
    s = factors(fold, 0)
    folded = replace_leaves(NET.params, fold_leaves(NET.params, fold, s))
    online = replace_leaves(NET.params, fold_leaves(NET.params, fold._replace(into=None), s))
    twice = fold_leaves(online, fold._replace(into=None), s)
    np.testing.assert_array_equal(twice[f"{fold.site}/divisor"], s * s)
    wanted = output(online)
    np.testing.assert_allclose(output(folded), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
