"""Single operations of the latent-diffusion family against torch, on inputs that show small mistakes."""

from collections.abc import Callable

import jax
import numpy as np
import pytest
from flax import linen as nn

from qdiff_jax.models.attention import attend, geglu, layer_norm, split_qkv
from qdiff_jax.models.dit import timestep_embedding
from qdiff_jax.models.layers import dense
from qdiff_jax.models.unet_ddpm import Upsample, group_norm
from qdiff_jax.models.unet_ldm_blocks import Downsample, _resampled
from qdiff_jax.policy import WEIGHT
from qdiff_jax.sites import SiteQuant

from ..tiny_unet import nearest, qparams
from .ldm_cases import nhwc, stored


class Call(nn.Module):
    """A function that takes the module whose parameters it uses."""

    run: Callable

    @nn.compact
    def __call__(self):
        return self.run(self)


def given(name):
    return stored()[f"ops/in/{name}"]


def expected(name):
    return stored()[f"ops/out/{name}"]


@pytest.mark.parametrize("kind", ["small", "offset"])
def test_norms(kind):
    weights = {"params": {"norm": {"scale": given("norm_w"), "bias": given("norm_b")}}}
    for eps in (1e-5, 1e-6):
        x = nhwc(given(f"maps_{kind}"))
        y = Call(lambda _, x=x, eps=eps: group_norm("norm", 32, x, eps)).apply(weights)
        np.testing.assert_allclose(y, nhwc(expected(f"group_norm_{eps:g}_{kind}")), atol=6e-5)
    y = Call(lambda _: layer_norm("norm", given(f"tokens_{kind}"))).apply(weights)
    np.testing.assert_allclose(y, expected(f"layer_norm_{kind}"), atol=6e-5)
    # What the tolerance must tell apart: another eps, where it shows.
    gap = np.abs(expected("group_norm_1e-05_small") - expected("group_norm_1e-06_small")).max()
    assert gap > 0.1


def test_resampling():
    kernel = np.transpose(given("conv_w"), (2, 3, 1, 0))
    x = nhwc(given("conv_x"))
    for module, layer, name in (
        (Downsample(), "op", "conv_s2_p1"),
        (Upsample(), "conv", "upsampled"),
    ):
        params = {layer: {"kernel": kernel, "bias": given("conv_b")}}
        with jax.default_matmul_precision("highest"):
            y = module.apply({"params": params}, x)
        np.testing.assert_allclose(y, nhwc(expected(name)), atol=1e-5)
    np.testing.assert_allclose(_resampled(x, "down"), nhwc(expected("averaged")), atol=1e-6)


@pytest.mark.parametrize("order", ["legacy", "new"])
@pytest.mark.parametrize("heads", [1, 4])
def test_order_of_q_k_and_v_in_one_layer(order, heads):
    qkv = given("qkv").transpose(0, 2, 1)  # torch has channels first
    parts = split_qkv(qkv, heads, order == "new")
    out = Call(lambda module: attend(module, "", *parts)).apply({})
    target = expected(f"attention_{order}_{heads}").transpose(0, 2, 1)
    np.testing.assert_allclose(out, target, atol=1e-5)
    # With one head the two orders are one.
    other = expected(f"attention_{'new' if order == 'legacy' else 'legacy'}_{heads}")
    assert (np.abs(other.transpose(0, 2, 1) - target).max() > 0.1) == (heads > 1)


def test_gated_mlp():
    """The transformer block's inner layer: value first, gate second, the exact GELU."""

    def run(module):
        return geglu(dense(module, "proj", given("geglu_x"), 64))

    params = {"proj": {"kernel": given("geglu_w").T, "bias": given("geglu_b")}}
    with jax.default_matmul_precision("highest"):
        y = Call(run).apply({"params": params})
    np.testing.assert_allclose(y, expected("geglu"), atol=1e-5)


@pytest.mark.parametrize("dim", [128, 320])
def test_times(dim):
    table = timestep_embedding(given("t"), dim)
    np.testing.assert_allclose(table, expected(f"times_{dim}"), atol=2e-6)


def test_a_layer_without_a_bias_uses_one_that_a_stage_put_there():
    x = np.float32([[1, 2]])
    layer = Call(lambda module: dense(module, "to_q", x, 3, use_bias=False))
    params = jax.eval_shape(layer.init, jax.random.key(0))["params"]
    assert set(params["to_q"]) == {"kernel"}
    kernel, bias = np.ones((2, 3), np.float32), np.float32([0, 1, 2])
    plain = layer.apply({"params": {"to_q": {"kernel": kernel}}})
    np.testing.assert_array_equal(plain, [[3, 3, 3]])
    fitted = layer.apply({"params": {"to_q": {"kernel": kernel, "bias": bias}}})
    np.testing.assert_array_equal(fitted, [[3, 4, 5]])
    # What it was fitted to is held as codes: nothing but the bias is left, or not even that.
    grid = qparams(WEIGHT, (0, 15), np.zeros(3), np.full(3, 15.0))
    codes = nearest(kernel, grid, 4)
    for site, wanted in ((SiteQuant(rhs=codes), plain), (SiteQuant(rhs=codes, bias=bias), fitted)):
        y = layer.apply({"params": {}, "quant": {"to_q": site}})
        np.testing.assert_allclose(y, wanted, atol=1e-6)
