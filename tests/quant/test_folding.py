"""Divisions folded into a transformer block, in float64: the block's output, low-rank branches, codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.quant.folding import divide_chunk, fold_modulation
from qdiff_jax.quant.quantizer import codes
from qdiff_jax.quant.ranges import weight_qparams
from qdiff_jax.quant.reparameterise import scale_rows
from qdiff_jax.quant.spec import QuantSpec

D, HEADS, TOKENS, CONDITION, HIDDEN, RANK = 144, 2, 16, 32, 288, 8


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "mod": (CONDITION, 6 * D),
        "qkv": (D, 3 * D),
        "proj": (D, D),
        "fc1": (D, HIDDEN),
        "fc2": (HIDDEN, D),
    }
    made = {name: 0.1 * rng.standard_normal(shape) for name, shape in shapes.items()}
    made |= {f"{name}_bias": 0.1 * rng.standard_normal(s[-1]) for name, s in shapes.items()}
    return made


def inputs(seed=1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((TOKENS, D)), rng.standard_normal(CONDITION)


def factors(width, seed=2):
    return np.exp(np.random.default_rng(seed).standard_normal(width))


def norm(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def modulated(p, c, x, shift, scale):
    chunks = np.split(c @ p["mod"] + p["mod_bias"], 6)
    return norm(x) * (1 + chunks[scale]) + chunks[shift]


def block(p, x, c, fc2_divisor=1.0, branch=None):
    """The block of DiT in NumPy; branch: (L_1, L_2) beside qkv."""
    gates = np.split(c @ p["mod"] + p["mod_bias"], 6)
    u = modulated(p, c, x, 0, 1)
    qkv = u @ p["qkv"] + p["qkv_bias"]
    if branch is not None:
        qkv = qkv + (u @ branch[0]) @ branch[1]
    q, k, v = (
        part.reshape(TOKENS, HEADS, -1).transpose(1, 0, 2) for part in np.split(qkv, 3, axis=-1)
    )
    logits = q @ k.transpose(0, 2, 1) / np.sqrt(D // HEADS)
    softmax = np.exp(logits - logits.max(-1, keepdims=True))
    softmax /= softmax.sum(-1, keepdims=True)
    h = (softmax @ v).transpose(1, 0, 2).reshape(TOKENS, D)
    x = x + gates[2] * (h @ p["proj"] + p["proj_bias"])
    h = modulated(p, c, x, 3, 4) @ p["fc1"] + p["fc1_bias"]
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return x + gates[5] * ((h / fc2_divisor) @ p["fc2"] + p["fc2_bias"])


def fold_adaln(p, name, s, shift, scale):
    kernel, bias = fold_modulation(
        jnp.asarray(p["mod"]), jnp.asarray(p["mod_bias"]), s, shift, scale
    )
    rows = scale_rows(jnp.asarray(p[name]), s)
    return {**p, "mod": np.asarray(kernel), "mod_bias": np.asarray(bias), name: np.asarray(rows)}


def fold_values(p, s):
    divided = {n: np.asarray(divide_chunk(jnp.asarray(p[n]), s, 2)) for n in ("qkv", "qkv_bias")}
    return {**p, **divided, "proj": np.asarray(scale_rows(jnp.asarray(p["proj"]), s))}


def relative(made, wanted):
    return np.abs(made - wanted).max() / np.abs(wanted).max()


def test_a_modulated_input_is_divided():
    p, (x, c), s = weights(), inputs(), factors(D)
    folded = fold_adaln(p, "qkv", jnp.asarray(s), 0, 1)
    wanted = modulated(p, c, x, 0, 1) / s
    assert relative(modulated(folded, c, x, 0, 1), wanted) < 2e-15
    # The classic mistake, dividing gamma's bias without its 1, is seen by this test.
    folded["mod_bias"] = p["mod_bias"] / np.concatenate([s, s, np.ones(4 * D)])
    assert relative(modulated(folded, c, x, 0, 1), wanted) > 0.1


def test_a_block_with_every_fold_is_the_block():
    p, (x, c) = weights(), inputs()
    folded = fold_values(p, jnp.asarray(factors(D, 3)))
    folded = fold_adaln(folded, "qkv", jnp.asarray(factors(D, 4)), 0, 1)
    folded = fold_adaln(folded, "fc1", jnp.asarray(factors(D, 5)), 3, 4)
    divisor = factors(HIDDEN, 6)
    folded["fc2"] = np.asarray(scale_rows(jnp.asarray(p["fc2"]), jnp.asarray(divisor)))
    assert relative(block(folded, x, c, divisor), block(p, x, c)) < 2e-15


def test_a_low_rank_branch_is_divided_with_the_values_and_scaled_with_its_input():
    p, (x, c) = weights(), inputs()
    left, values, right = np.linalg.svd(p["qkv"], full_matrices=False)
    l1, l2 = left[:, :RANK] * values[:RANK], right[:RANK]
    split = {**p, "qkv": p["qkv"] - l1 @ l2}
    s = jnp.asarray(factors(D))
    divided = (l1, np.asarray(divide_chunk(jnp.asarray(l2), s, 2)))
    assert relative(block(fold_values(split, s), x, c, branch=divided), block(p, x, c)) < 2e-15
    assert relative(block(fold_values(split, s), x, c, branch=(l1, l2)), block(p, x, c)) > 1e-3
    rows = (np.asarray(scale_rows(jnp.asarray(l1), s)), l2)
    made = block(fold_adaln(split, "qkv", s, 0, 1), x, c, branch=rows)
    assert relative(made, block(p, x, c)) < 2e-15


def test_other_columns_stay_bit_for_bit():
    p, s = weights(), jnp.asarray(factors(D))
    kernel, bias = fold_modulation(jnp.asarray(p["mod"]), jnp.asarray(p["mod_bias"]), s, 3, 4)
    for made, old in ((kernel, p["mod"]), (bias, p["mod_bias"])):
        changed = (np.asarray(made) != old).reshape(-1, 6, D).all(axis=(0, 2))
        np.testing.assert_array_equal(changed, [False, False, False, True, True, False])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", ["minmax", "mse", "percentile_search"])
def test_codes_of_a_modulation_stay(bits, symmetric, method):
    """A scale for every output column takes the division: 100 % of the codes, for the package's own ranges."""
    spec = QuantSpec(granularity="channel", symmetric=symmetric, signed=symmetric)
    p = {name: np.float32(value) for name, value in weights().items()}
    with jax.enable_x64(False):
        s = jnp.exp2(jnp.round(jnp.log2(jnp.asarray(factors(D), jnp.float32)) * 2) / 2)
        kernel, _ = fold_modulation(jnp.asarray(p["mod"]), jnp.asarray(p["mod_bias"]), s, 0, 1)
        made, old = (
            codes(weight_qparams(k, spec, bits, method=method), k) for k in (kernel, p["mod"])
        )
    assert not np.array_equal(kernel, p["mod"])
    np.testing.assert_array_equal(made, old)


def test_chunks_must_lie_in_the_columns():
    with pytest.raises(ValueError, match="chunk 3 of width 2 does not lie"):
        divide_chunk(jnp.ones((4, 6)), jnp.ones(2), 3)
    with pytest.raises(ValueError, match=r"array \(4, 5\)"):
        divide_chunk(jnp.ones((4, 5)), jnp.ones(2), 0)
