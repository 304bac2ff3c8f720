"""The choice of a softmax grid by what attention makes of it, and tables without a choice."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from qdiff_jax.operators import PV
from qdiff_jax.policy import ALWAYS_ZERO, Entry, SitePlan
from qdiff_jax.quant.either import LOG2
from qdiff_jax.quant.quantizer import fake_quant
from qdiff_jax.quant.softmax_grid import kind_of
from qdiff_jax.quant.timed import select, step_context
from qdiff_jax.sites import flatten_sites, op
from qdiff_jax.stages.softmax_grids import SoftmaxGridConfig, choose_softmax_grids
from qdiff_jax.stages.stage import Model, initial_state, run_stage

TIMES = np.float32([100.0, 500.0, 900.0])
STDS = np.float32([0.2, 4.0, 8.0])  # of the logits, by step


class Attention(nn.Module):
    """x [B, n, m + c]: the logits of m keys, and values in the last c channels of the first m rows."""

    @nn.compact
    def __call__(self, x, t, y):
        del t, y
        m = x.shape[1]
        return op(self, "pv", PV, jax.nn.softmax(x[..., :m]), x[..., m:])


@functools.cache
def states():
    rng = np.random.default_rng(0)
    index = rng.permutation(np.repeat(np.arange(3, dtype=np.int32), 8))
    x = rng.standard_normal((24, 32, 40)).astype(np.float32)
    x[..., :32] *= STDS[index][:, None, None]
    return SimpleNamespace(x=x, t=TIMES[index], index=index, y=None)


@functools.cache
def chosen(criterion, bits):
    model = Model(Attention(), (), {})
    state = initial_state(
        SitePlan((Entry("pv", "softmax", bits, ALWAYS_ZERO, "rule"),)), jax.random.key(0)
    )
    stage = choose_softmax_grids(
        model, states(), TIMES, SoftmaxGridConfig(criterion), batch_size=12
    )
    state, report = run_stage(stage, state)
    return flatten_sites(state.quant)["pv"].lhs, report


def output_error(table, step):
    data = states()
    x = jnp.asarray(data.x[data.index == step])
    p, v = jax.nn.softmax(x[..., :32]), x[..., 32:]
    row = select(table, step_context(TIMES[step], step))
    return float(jnp.square(jnp.matmul(fake_quant(row, p) - p, v)).sum())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_output_decides_at_every_step(bits):
    taken, _ = chosen("attn_out_mse", bits)
    for other in ("mle", "mse", "uniform"):
        table, _ = chosen(other, bits)
        for step in range(3):
            assert output_error(taken, step) <= output_error(table, step) * (1 + 1e-5)


def test_at_eight_bits_likelihood_takes_the_worse_grid():
    """Peaked attention looks like a power law, and 255 codes resolve it better by even steps."""
    assert chosen("mle", 8)[1]["log2_rows"]["pv"] == [1, 2]
    assert chosen("attn_out_mse", 8)[1]["log2_rows"]["pv"] == []
    assert output_error(chosen("mle", 8)[0], 1) > 50 * output_error(chosen("uniform", 8)[0], 1)


def test_without_the_choice_the_tables_stay():
    """The ablation of the choice changes nothing but the type."""
    (uniform, report), (mle, _) = chosen("uniform", 8), chosen("mle", 8)
    assert report["log2_steps"] == {"pv": 0}
    assert uniform.table.scale.shape == (3,)
    is_log2 = np.asarray(mle.table.zero_point) == LOG2
    largest = np.where(is_log2, mle.table.scale, mle.table.scale * 255)
    np.testing.assert_allclose(uniform.table.scale * 255, largest, rtol=1e-6)


def test_what_the_second_pass_costs_is_said():
    assert chosen("attn_out_mse", 8)[1]["network_passes"] == 2.0
    assert chosen("mle", 8)[1]["network_passes"] == 1.0
    with pytest.raises(ValueError, match="'aic'; use one of"):
        SoftmaxGridConfig("aic")
    with pytest.raises(ValueError, match="values alone do not give"):
        kind_of(np.ones(3), 1.0, 15.0, "attn_out_mse")
