"""The figures of SVDQuant and of what it is made of, on one made-up layer of a DiT with outlier channels.

A layer of 1152 inputs and outputs and 2048 tokens, 12 channels of the activation 40 times and 6 of the weight 8
times the others; errors relative to the full-precision output. The numbers beside the tests come from an
independent float64 program in NumPy; float32 and the randomised decomposition stay within 0.002 of them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.branch import LowRank, low_rank, smoothed
from qdiff_jax.operators import DENSE
from qdiff_jax.quant import quantizer
from qdiff_jax.quant.qparams import dynamic_qparams
from qdiff_jax.quant.smoothing import GELU_SHIFT
from qdiff_jax.sites import SiteQuant
from qdiff_jax.stages.group_grids import activation_spec, weight_spec
from qdiff_jax.stages.layer_branch import Codes, Grids, candidate_errors, solve

KEY = jax.random.key(0)
ROUND = jax.jit(quantizer.fake_quant)
SIZE, TOLERANCE = 1152, 0.002
# bits of weight and activation, group: the columns of the table.
COLUMNS = ((8, 8, 0), (4, 8, 0), (4, 4, 0), (4, 4, 64))
NONE, HALF, HOT, ALL = (0.0, 0.0), (0.5, 0.5), (0.8, 0.2), (1.0, 0.0)
# exponents: errors without a branch, with one decomposition of rank 32, and after alternating.
BRANCH = {
    NONE: (0.2913, None, 0.1644),
    HALF: (0.0844, 0.0565, 0.0531),
    HOT: (0.1200, None, 0.0372),
    ALL: (0.1732, None, 0.0393),
}


@functools.cache
def layer():
    r = np.random.default_rng(0)
    r.standard_normal((64, SIZE))
    r.random((1, 128))
    x = r.standard_normal((2048, SIZE)) * np.exp(0.4 * r.standard_normal(SIZE))
    x[:, r.choice(SIZE, 12, replace=False)] *= 40
    w = r.standard_normal((SIZE, SIZE)) * 0.02 * np.exp(0.2 * r.standard_normal(SIZE))
    w[:, r.choice(SIZE, 6, replace=False)] *= 8
    return x, w.T


def ends(bits):
    top = np.float32(2 ** (bits - 1) - 1)
    return -top, top


def data():
    x, w = (v.astype(np.float32) for v in layer())
    return x[:, None], w, np.abs(x).max(0)


def errors(pairs, w_bits=4, a_bits=4, group=64, rank=0):
    rows, kernel, magnitude = data()
    grids = Grids(weight_spec(group), activation_spec(group), rank)
    codes = Codes(ends(w_bits), ends(a_bits))
    pairs, shift = np.float32(pairs), jnp.float32(0)
    given = (rows, kernel[None], magnitude, shift, pairs)
    return np.asarray(candidate_errors(KEY, grids, codes, *given))


@functools.cache
def alternated(pair):
    rows, kernel, magnitude = data()
    grids = Grids(weight_spec(64), activation_spec(64), 32)
    codes = Codes(ends(4), ends(4))
    given = (rows, kernel, magnitude, jnp.float32(0), np.float32(pair))
    return solve(KEY, grids, codes, *given, most=10)


@pytest.mark.parametrize(
    "column", [pytest.param(i, marks=() if i > 1 else pytest.mark.slow) for i in range(4)]
)
def test_nearest_rounding_and_smoothquant(column):
    w_bits, a_bits, group = COLUMNS[column]
    found = errors([NONE, HALF], w_bits, a_bits, group)
    nearest = (0.0724, 0.5787, 0.6417, 0.2913)[column]
    smoothed = (0.0113, 0.1411, 0.2066, 0.0844)[column]
    np.testing.assert_allclose(found, [nearest, smoothed], atol=TOLERANCE)


@pytest.mark.slow
def test_without_a_branch_stronger_smoothing_costs_and_one_decomposition_turns_that_round():
    before, after = (errors(list(BRANCH), rank=rank) for rank in (0, 32))
    np.testing.assert_allclose(before, [v[0] for v in BRANCH.values()], atol=TOLERANCE)
    assert abs(after[1] - BRANCH[HALF][1]) < TOLERANCE
    assert before[1] < before[2] < before[3]
    assert after[2] < after[3] < after[1]
    # The branch gains the more, the more is smoothed away.
    gains = before[1:] / after[1:]
    assert gains[0] < gains[1] < gains[2]
    assert (after < before).all()


@pytest.mark.slow
@pytest.mark.parametrize("pair", BRANCH)
def test_alternating(pair):
    plain, one_shot, kept = alternated(pair).errors
    assert abs(plain - BRANCH[pair][0]) < TOLERANCE
    assert abs(kept - BRANCH[pair][2]) < TOLERANCE
    assert kept < one_shot < plain


@pytest.mark.slow
def test_alternating_gains_the_more_the_more_is_smoothed_away():
    found = [alternated(pair).errors for pair in (HALF, HOT, ALL)]
    gains = [plain / kept for plain, _, kept in found]
    assert gains == sorted(gains)


def test_shifting_by_a_number_is_exact():
    """x W + b = (x + delta) W + (b - delta sum W) to the last bits of float64, of the operator without
    quantizers: by itself, and with smoothing and a branch, which reads x as it is."""
    x, w = layer()
    r = np.random.default_rng(1)
    bias = r.standard_normal(SIZE)
    g = gelu(0.5 * x[:, :256] / 5)
    np.testing.assert_allclose(g.min(), -0.17004, atol=1e-5)
    down, up = (np.float16(0.01 * r.standard_normal(s)) for s in ((256, 8), (8, SIZE)))
    inverse = np.exp(r.standard_normal(256))
    wanted = g @ w[:256] + bias
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        for arrays in (
            LowRank(shift=jnp.float64(GELU_SHIFT)),
            LowRank(down, up, jnp.asarray(inverse), jnp.float64(GELU_SHIFT)),
        ):
            branched = arrays.down is not None
            assert np.asarray(smoothed(arrays, jnp.asarray(g))).min() >= 0
            rest = w[:256]
            if branched:  # what the branch leaves, for an input that is smoothed
                rest = rest - down.astype(np.float64) @ up.astype(np.float64)
            moved = jnp.asarray(bias - GELU_SHIFT * rest.sum(0))
            kernel = jnp.asarray(rest / inverse[:, None] if branched else rest)
            given = (jnp.asarray(g), lambda kernel=kernel: kernel, moved, SiteQuant())
            found = np.asarray(low_rank(arrays, DENSE, *given))
            assert found.dtype == np.float64
            assert np.linalg.norm(found - wanted) < 3e-15 * np.linalg.norm(wanted)


def gelu(z):
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def rounding_error(x, unsigned):
    """Of activations alone, 4 bits, groups of 64."""
    spec, shift = activation_spec(64, unsigned), GELU_SHIFT if unsigned else 0.0
    grid = dynamic_qparams(spec, *((0, 15) if unsigned else (-7, 7)))
    found = np.asarray(ROUND(grid, np.float32(x + shift)), np.float64) - shift
    return np.linalg.norm(found - x) / np.linalg.norm(x)


# sigma: the error of signed and of unsigned codes behind GELU(sigma z), z normal; from the same program.
BEHIND_GELU = {0.5: (0.147, 0.078), 1.0: (0.162, 0.069), 2.0: (0.111, 0.069), 4.0: (0.098, 0.059)}


@pytest.mark.parametrize("sigma", BEHIND_GELU)
def test_unsigned_codes_behind_gelu_are_better(sigma):
    x = gelu(sigma * np.random.default_rng(0).standard_normal((2048, 256)))
    found = [rounding_error(x, unsigned) for unsigned in (False, True)]
    np.testing.assert_allclose(found, BEHIND_GELU[sigma], rtol=0, atol=TOLERANCE)
    assert found[1] < 0.75 * found[0]


def test_unsigned_codes_may_lose_under_extreme_channels():
    """Small values beside a channel forty times as large: the shift takes up codes they needed."""
    extreme = gelu(0.1 * layer()[0][:, :256])
    assert abs(rounding_error(extreme, False) - 0.089) < 0.001
    assert abs(rounding_error(extreme, True) - 0.166) < 0.001
