"""Rotations of layers change their parameters and what is rounded, and not what the network computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from qdiff_jax.export.qtensor import from_codes
from qdiff_jax.models.dit import DiTBlock
from qdiff_jax.models.layers import conv
from qdiff_jax.quant.qparams import dynamic_qparams, from_range
from qdiff_jax.quant.quantizer import codes
from qdiff_jax.quant.ranges import min_max
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.sites import SiteQuant
from qdiff_jax.stages.rotations import rotate_inputs, rotate_queries, rotate_values
from qdiff_jax.stages.stage import kernel_at, replace_leaves

from ..tiny_unet import QUICK, random_params

WIDTH, HEADS = 24, 2  # heads of 12
BLOCK = DiTBlock(heads=HEADS, hidden=2 * WIDTH)
QKV, PROJ = "attn_qkv", "attn_proj"
KEY = jax.random.key(5)


@functools.cache
def block():
    """(params, tokens, modulation) of one transformer block."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 9, WIDTH)), jnp.float32)
    modulation = jnp.asarray(0.3 * rng.standard_normal((2, 6 * WIDTH)), jnp.float32)
    shapes = jax.eval_shape(BLOCK.init, jax.random.key(0), x, modulation)["params"]
    return random_params(shapes), x, modulation


@functools.cache
def forward():
    return jax.jit(BLOCK.apply, compiler_options=QUICK)


def apply(params, quant=None):
    _, x, modulation = block()
    variables = {"params": params} | ({} if quant is None else {"quant": quant})
    return np.asarray(forward()(variables, x, modulation))


def far(a, b) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@functools.cache
def rotated():
    """Everything that can be rotated: heads first, then the inputs of all four layers."""
    params = block()[0]
    params = replace_leaves(params, rotate_values(params, QKV, PROJ, HEADS, KEY))
    params = replace_leaves(params, rotate_queries(params, QKV, HEADS, KEY))
    names = (QKV, PROJ, "mlp_fc1", "mlp_fc2")
    return replace_leaves(params, rotate_inputs(params, names, KEY))


def test_the_block_computes_the_same():
    params = block()[0]
    plain, whole = apply(params), rotated()
    for name in (QKV, PROJ, "mlp_fc1", "mlp_fc2"):
        assert far(np.asarray(kernel_at(whole, name)), np.asarray(kernel_at(params, name))) > 0.5
    assert far(apply(whole), plain) < 1e-5
    blocks = rotate_inputs(params, ("mlp_fc1",), KEY, block=4)
    assert blocks["mlp_fc1/rotation"].shape == (6, 4)
    # One half of a rotation alone is another network.
    half = rotate_inputs(params, ("mlp_fc1",), KEY)
    half.pop("mlp_fc1/rotation")
    assert far(apply(replace_leaves(params, half)), plain) > 0.1


def attention(params, u):
    """Of one sample, by head, in NumPy."""
    y = u @ np.asarray(params[QKV]["kernel"]) + np.asarray(params[QKV]["bias"])
    q, k, v = (part.reshape(len(u), HEADS, -1) for part in np.split(y, 3, -1))
    logits = np.einsum("nhd,mhd->hnm", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    h = np.einsum("hnm,mhd->nhd", weights, v).reshape(len(u), -1)
    return logits, h, h @ np.asarray(params[PROJ]["kernel"]) + np.asarray(params[PROJ]["bias"])


def test_heads_turn_without_a_trace_in_double_precision():
    """At the width of DiT-XL's heads, 72."""
    rng, width = np.random.default_rng(1), 72 * HEADS
    u = rng.standard_normal((9, width))
    layers = {
        name: {
            "kernel": rng.standard_normal((width, columns)) / np.sqrt(width),
            "bias": rng.standard_normal(columns),
        }
        for name, columns in ((QKV, 3 * width), (PROJ, width))
    }
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, layers)
        logits, h, out = attention(params, u)
        turned = replace_leaves(params, rotate_values(params, QKV, PROJ, HEADS, KEY))
        found = attention(turned, u)
        assert far(found[2], out) < 2e-15
        assert far(found[1], h) > 0.5
        turned = replace_leaves(params, rotate_queries(params, QKV, HEADS, KEY))
        found = attention(turned, u)
        assert far(found[0], logits) < 2e-15
        assert far(found[2], out) < 2e-15
        assert far(np.asarray(turned[QKV]["kernel"]), np.asarray(params[QKV]["kernel"])) > 0.5


class _Convolution(nn.Module):
    @nn.compact
    def __call__(self, x):
        return conv(self, "conv", x, 5)


def test_a_convolution_turns_its_channels_padding_included():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 4, 4, 12)), jnp.float32)
    module = _Convolution()
    params = random_params(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    turned = replace_leaves(params, rotate_inputs(params, ("conv",), KEY))
    out, plain = (np.asarray(module.apply({"params": p}, x)) for p in (turned, params))
    assert far(out, plain) < 1e-5


def site(kernel, **fields):
    """Weights in 8 bits per output channel, activations in 4 bits per token."""
    spec = QuantSpec(granularity="channel", symmetric=True, signed=True)
    grid = from_range(spec, *min_max(kernel, spec), -127, 127)
    held = from_codes(codes(grid, kernel), grid, 8)
    token = QuantSpec(granularity="token", symmetric=True, signed=True)
    return SiteQuant(lhs=dynamic_qparams(token, -7, 7), rhs=held, **fields)


def test_what_is_rounded_is_the_rotated_layer_in_simulation_and_in_integers():
    """A channel 30 times the others: rotated, the input of fc2 loses 0.62 of what it lost."""
    params = block()[0]
    kernel, bias = params["mlp_fc1"]["kernel"], params["mlp_fc1"]["bias"]
    loud = replace_leaves(
        params,
        {"mlp_fc1/kernel": kernel.at[:, 3].multiply(30.0), "mlp_fc1/bias": bias.at[3].add(20.0)},
    )
    turned = replace_leaves(loud, rotate_inputs(loud, ("mlp_fc2",), KEY))
    wanted, errors = apply(loud), {}
    for name, tree in (("plain", loud), ("rotated", turned)):
        simulated, executed = (
            apply(tree, {"mlp_fc2": site(kernel_at(tree, "mlp_fc2"), execute=e)})
            for e in (False, True)
        )
        assert far(executed, simulated) < 1e-5
        errors[name] = far(simulated, wanted)
    assert errors["rotated"] < 0.75 * errors["plain"]


def test_training_cannot_move_a_rotation():
    x = jnp.ones((1, 2, 2, 12), jnp.float32)
    module = _Convolution()
    params = random_params(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    params = replace_leaves(params, rotate_inputs(params, ("conv",), KEY))

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: jnp.sum(jnp.square(module.apply({"params": p}, x))))(params)

    found = gradient(params)["conv"]
    assert not np.any(found["rotation"])
    assert np.any(found["kernel"])


def test_what_cannot_be_rotated_is_refused():
    params = block()[0]
    whole = rotated()
    with pytest.raises(ValueError, match="mlp_fc1 is rotated already"):
        rotate_inputs(whole, ("mlp_fc1",), KEY)
    with pytest.raises(ValueError, match="attn_proj has a rotation of its own"):
        rotate_values(whole, QKV, PROJ, HEADS, KEY)
    with pytest.raises(ValueError, match="5 heads"):
        rotate_queries(params, QKV, 5, KEY)
    with pytest.raises(ValueError, match="queries, keys and values"):
        rotate_queries(params, PROJ, 5, KEY)
    with pytest.raises(ValueError, match="Hadamard matrix"):
        rotate_queries(params, QKV, 8, KEY)  # heads of 3
