"""`op`: one function, and what the `quant` collection makes of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from qdiff_jax.export.qtensor import QTensor, dequantize
from qdiff_jax.models.unet_ddpm import AttnBlock, Downsample
from qdiff_jax.observe.taps import Tap
from qdiff_jax.operators import DENSE, PV, QK, Operator
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.quant.quantizer import fake_quant
from qdiff_jax.quant.rounding import soft_rounding
from qdiff_jax.quant.spec import QuantSpec, code_range
from qdiff_jax.quant.timed import TimeIndexed, select, step_context
from qdiff_jax.sites import (
    Replacement,
    SiteQuant,
    flatten_sites,
    kernel_of,
    list_sites,
    nest_sites,
    op,
)

from .tiny_unet import (
    QUICK,
    SMALL,
    STEPS,
    TINY,
    forward,
    inputs,
    nearest,
    network,
    qparams,
    quantized,
    random_params,
)

TENSOR, CHANNEL = QuantSpec(), QuantSpec(granularity="channel")
DOWN = Operator("conv", (2, 2), ((0, 1), (0, 1)))
SHAPES = {  # kind: (operator, lhs, rhs)
    "conv": (DOWN, (2, 6, 6, 3), (3, 3, 3, 4)),
    "dense": (DENSE, (2, 5, 3), (3, 4)),
    "qk": (QK, (2, 5, 3), (2, 4, 3)),
    "pv": (PV, (2, 5, 4), (2, 4, 3)),
}


class Layer(nn.Module):
    """One site, "site", whose kernel is asked for only when it is needed."""

    operator: Operator
    shape: tuple[int, ...] | None = None

    @nn.compact
    def __call__(self, lhs, rhs=None):
        if rhs is not None:
            return op(self, "site", self.operator, lhs, rhs)
        bias = self.param("bias", nn.initializers.zeros, self.shape[-1:])
        return op(self, "site", self.operator, lhs, self.kernel, bias)

    def kernel(self):
        return self.param("kernel", nn.initializers.ones, self.shape)


def draw(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def case(kind):
    """(module, params, activations, lhs, rhs as arrays)."""
    operator, lhs_shape, rhs_shape = SHAPES[kind]
    lhs, rhs = draw(lhs_shape, 1), draw(rhs_shape, 2)
    if kind in ("qk", "pv"):
        return Layer(operator), {}, (lhs, rhs), lhs, rhs
    params = {"kernel": rhs, "bias": draw(rhs_shape[-1:], 3)}
    return Layer(operator, rhs_shape), params, (lhs,), lhs, rhs


def by_hand(kind, lhs, rhs, bias=0.0):
    """The operators in NumPy float64, the convolution as a sum over its nine taps."""
    lhs, rhs = np.float64(lhs), np.float64(rhs)
    if kind == "dense":
        return lhs @ rhs + bias
    if kind == "qk":
        return lhs @ rhs.swapaxes(1, 2)
    if kind == "pv":
        return lhs @ rhs
    padded = np.pad(lhs, ((0, 0), (0, 1), (0, 1), (0, 0)))
    taps = [padded[:, i : i + 5 : 2, j : j + 5 : 2] @ rhs[i, j] for i in range(3) for j in range(3)]
    return sum(taps) + bias


def rounded_by_hand(x, lo, hi, bits):
    """Asymmetric uniform quantization as the papers write it; lo and hi broadcast against x."""
    lo, hi = np.minimum(np.float64(lo), 0), np.maximum(np.float64(hi), 0)
    scale = (hi - lo) / (2**bits - 1)
    zero = -np.round(lo / scale)
    return (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


def run(module, params, quant, *args, mutable=False):
    return module.apply({"params": params, "quant": quant}, *args, mutable=mutable)


quick = functools.partial(jax.jit, compiler_options=QUICK)
apply = quick(run, static_argnums=0, static_argnames="mutable")


@pytest.mark.parametrize("kind", SHAPES)
def test_operands_are_rounded_and_then_multiplied(kind):
    module, params, args, lhs, rhs = case(kind)
    bias = params.get("bias", 0.0)
    plain = apply(module, params, {}, *args)
    np.testing.assert_allclose(plain, by_hand(kind, lhs, rhs, bias), atol=1e-5)
    for quant in (
        {},
        {"site": SiteQuant()},
        {"elsewhere": SiteQuant(qparams(TENSOR, (0, 1), 0, 1))},
    ):
        np.testing.assert_array_equal(apply(module, params, quant, *args), plain)

    left = qparams(TENSOR, (0, 15), -1.5, 2.0)
    left_by_hand = rounded_by_hand(lhs, -1.5, 2.0, 4)
    out = apply(module, params, {"site": SiteQuant(lhs=left)}, *args)
    np.testing.assert_allclose(out, by_hand(kind, left_by_hand, rhs, bias), atol=1e-5)

    lo, hi = (-1.0, 1.5) if not params else (rhs.min((*range(rhs.ndim - 1),)), 1.0)
    right = qparams(TENSOR if not params else CHANNEL, (0, 7), lo, hi)
    right_by_hand = rounded_by_hand(rhs, lo, hi, 3)
    out = apply(module, params, {"site": SiteQuant(lhs=left, rhs=right)}, *args)
    np.testing.assert_allclose(out, by_hand(kind, left_by_hand, right_by_hand, bias), atol=1e-5)


@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_a_weight_may_be_ranges_codes_soft_or_folded(kind):
    module, params, args, _, kernel = case(kind)
    grid = qparams(CHANNEL, (0, 15), kernel.min((*range(kernel.ndim - 1),)), 1.5)
    packed = nearest(kernel, grid, 4)
    nearest_rounding = apply(module, params, {"site": SiteQuant(rhs=grid)}, *args)
    decided = apply(module, {"bias": params["bias"]}, {"site": SiteQuant(rhs=packed)}, *args)
    np.testing.assert_array_equal(decided, nearest_rounding)
    folded = {**params, "kernel": dequantize(packed)}
    np.testing.assert_array_equal(apply(module, folded, {}, *args), decided)
    # The relaxation starts at the weight itself, clipped to the grid.
    soft = {"site": SiteQuant(rhs=soft_rounding(jnp.asarray(kernel), grid))}
    scale, zero = np.asarray(grid.scale), np.asarray(grid.zero_point)
    start = {**params, "kernel": (np.clip(kernel / scale + zero, 0, 15) - zero) * scale}
    out = apply(module, {"bias": params["bias"]}, soft, *args)
    np.testing.assert_allclose(out, apply(module, start, {}, *args), atol=2e-5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["conv", "dense", "qk", "pv"])
def test_executing_integers_equals_simulating_them(kind, bits):
    module, params, args, _, right = case(kind)
    codes = code_range(TENSOR, bits)
    general = qparams(TENSOR, codes, -1.7, 2.1)
    # Powers of two: the floating-point simulation is exact, so the integers must agree to the bit.
    exact = QParams(*(jnp.float32(v) for v in (2.0**-5, codes[1] // 2, *codes)), TENSOR)
    for left in (general, exact):
        if params:
            scale = np.full(right.shape[-1], 2.0**-4, np.float32)
            grid = qparams(CHANNEL, codes, right.min((*range(right.ndim - 1),)), 1.9)
            if left is exact:
                grid = grid.replace(scale=jnp.asarray(scale))
            rhs = nearest(right, grid, bits)
        else:
            rhs = left
        params_now = {"bias": np.zeros(4, np.float32)} if params else {}
        simulated, executed = (
            apply(module, params_now, {"site": SiteQuant(left, rhs, execute=run)}, *args)
            for run in (False, True)
        )
        if left is exact:
            np.testing.assert_array_equal(executed, simulated)
        else:
            np.testing.assert_allclose(executed, simulated, rtol=1e-5, atol=1e-5)


def test_a_network_of_packed_codes_needs_no_kernels_and_executes_as_simulated():
    net = network(SMALL)
    x, t = inputs(SMALL, 2)
    quant = quantized(SMALL, w_bits=4)
    bare = jax.tree_util.tree_map_with_path(
        lambda path, leaf: None if path[-1].key == "kernel" else leaf, net.params
    )
    simulated = forward(SMALL)({"params": bare, "quant": quant}, x, t)
    executed = forward(SMALL)({"params": bare, "quant": quantized(SMALL, 4, execute=True)}, x, t)
    np.testing.assert_allclose(executed, simulated, atol=1e-5)
    assert {type(site.rhs) for site in flatten_sites(quant).values()} == {QTensor, QParams}


def test_taps_report_operands_under_jit_and_remat():
    module, rematerialised = AttnBlock(4), nn.remat(AttnBlock)(4)
    x = draw((2, 2, 2, 8), 0)
    params = random_params(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    taps = {
        "qk": SiteQuant(lhs=qparams(TENSOR, (0, 3), -1, 1), tap=Tap()),
        "pv": SiteQuant(tap=Tap("value")),
        "proj_out": SiteQuant(tap=Tap("channel_range")),
    }

    def loss(params, x):
        out, state = run(rematerialised, params, taps, x, mutable=["observed"])
        return jnp.sum(out**2), state["observed"]

    seen = apply(module, params, taps, x, mutable=("observed",))[1]["observed"]
    assert jax.tree.map(jnp.shape, seen) == {
        "qk": {"q": {"lo": (2,), "hi": (2,)}, "k": {"lo": (2,), "hi": (2,)}},
        "pv": {"softmax": {"value": (2, 4, 4)}, "v": {"value": (2, 4, 8)}},
        "proj_out": {"input": {"lo": (2, 8), "hi": (2, 8)}},
    }
    # What is reported is the operand as it comes, before its own quantizer.
    assert np.abs(np.asarray(seen["qk"]["q"]["hi"])).max() > 1.0
    np.testing.assert_allclose(np.sum(seen["pv"]["softmax"]["value"], -1), 1.0, rtol=1e-5)
    # The same from a block whose forward pass runs again in the backward pass.
    _, again = quick(jax.grad(loss, has_aux=True))(params, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), again, seen)


def test_a_step_table_that_nobody_selected_is_an_error():
    table = TimeIndexed(qparams(TENSOR, (0, 15), -1, 1), jnp.zeros(1), "exact")
    for kind, site in (
        ("conv", SiteQuant(lhs=table)),
        ("dense", SiteQuant(rhs=table)),
        ("pv", SiteQuant(rhs=table)),
        ("qk", SiteQuant(table, table, execute=True)),
    ):
        module, params, args, *_ = case(kind)
        with pytest.raises(ValueError, match="site is a step table: select its row"):
            apply(module, params, {"site": site}, *args)


def test_weights_by_step_are_refused_for_a_batch_of_mixed_steps():
    module, params, args, *_ = case("conv")
    rows = [qparams(TENSOR, (0, 15), -hi, hi) for hi in (1.0, 2.0, 3.0)]
    table = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    quant = {"site": SiteQuant(rhs=TimeIndexed(table, np.arange(3.0, dtype=np.float32), "exact"))}

    @quick
    def predict(quant, t):
        return run(module, params, select(quant, step_context(t)), *args)

    one = apply(module, params, {"site": SiteQuant(rhs=rows[1])}, *args)
    np.testing.assert_array_equal(predict(quant, 1.0), one)
    # Three samples and three kernel rows: without the check the shapes would fit.
    with pytest.raises(ValueError, match="weight of site varies with the step and the batch mixes"):
        predict(quant, np.arange(3.0, dtype=np.float32))


def low_rank(arrays, operator, lhs, kernel, bias, site):
    """A quantized operator beside a full-precision low-rank one."""
    down, up = arrays
    weight = fake_quant(site.rhs, kernel())
    return fake_quant(site.lhs, lhs) @ weight + (lhs @ down) @ up + bias[None, None]


def test_a_replacement_stands_in_for_the_operator():
    module, params, args, lhs, kernel = case("dense")
    left, right = qparams(TENSOR, (0, 15), -2, 2.3), qparams(CHANNEL, (0, 3), kernel.min(0), 1.0)
    # The branch carries what rounding the weight loses, in full rank here: only lhs is then rounded.
    lost = kernel - np.asarray(fake_quant(right, kernel))
    branch = Replacement((jnp.asarray(lost), jnp.eye(4)), low_rank)
    out = apply(module, params, {"site": SiteQuant(left, right, substitute=branch)}, *args)
    rounded = rounded_by_hand(lhs, -2, 2.3, 4)
    expected = rounded @ (kernel - lost) + lhs @ lost + params["bias"]
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert kernel_of(None, lambda: kernel) is kernel


def test_sites_are_listed_in_order_of_execution_without_computing():
    sites = network(TINY).sites
    names = [site.name for site in sites]
    assert len(names) == len(set(names)) == 41
    assert names[:3] == ["temb/dense_0", "temb/dense_1", "down_0_block_0_temb_proj/dense"]
    assert names[-4:] == [
        "up_0_block_1/conv1",
        "up_0_block_1/conv2",
        "up_0_block_1/nin_shortcut",
        "out/conv_out",
    ]
    at = names.index("mid_attn_1/q")
    assert [name.split("/")[1] for name in names[at : at + 6]] == "q k v qk pv proj_out".split()
    site = sites[names.index("down_0_downsample/conv")]
    assert (site.operator, site.operands, site.has_weight) == (DOWN, ("input", "weight"), True)
    assert (site.lhs_shape, site.rhs_shape) == ((1, 8, 8, 8), (3, 3, 8, 8))
    site = sites[names.index("mid_attn_1/pv")]
    assert (site.operands, site.has_weight) == (("softmax", "v"), False)
    assert (site.lhs_shape, site.rhs_shape) == ((1, 16, 16), (1, 16, 16))
    # A batch that no machine could hold.
    x, t = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((10**9, 4, 4, 3), (10**9,)))
    assert list_sites(network(SMALL).module, x, t)[-1].lhs_shape == (10**9, 4, 4, 8)


class Mixed(nn.Module):
    """A convolution and the two products of attention behind one another."""

    @nn.compact
    def __call__(self, x):
        h = Downsample(name="down")(x).reshape(x.shape[0], -1, x.shape[-1])
        weights = nn.softmax(op(self, "qk", QK, h, h))
        return op(self, "pv", PV, weights, h)


@functools.cache
def mixed():
    x = draw((3, 4, 4, 8), 5)
    module = Mixed()
    params = random_params(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    quant = {}
    for i, site in enumerate(list_sites(module, x)):
        rows = [qparams(TENSOR, (0, 15), -f, 1.3 * f) for f in (0.5 + 0.1 * i, 1.0, 2.0)]
        table = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *rows)
        table = TimeIndexed(table, jnp.float32(STEPS), "step")
        weight = qparams(TENSOR, (0, 15), -1.0, 1.0)
        quant[site.name] = SiteQuant(table, weight if site.has_weight else table)
    return module, params, nest_sites(quant), jnp.asarray(x)


def test_a_batch_of_mixed_steps_equals_its_samples_one_by_one():
    module, params, quant, x = mixed()

    @quick
    def predict(params, quant, x, ctx):
        return run(module, params, select(quant, ctx), x)

    order = np.array([2, 0, 1])
    together = step_context(np.float32(STEPS)[order], order)
    out = predict(params, quant, x, together)
    for i, step in enumerate(order):
        alone = predict(params, quant, x[i : i + 1], step_context(STEPS[step], step))
        np.testing.assert_allclose(out[i : i + 1], alone, atol=2e-6)
    wrong = predict(params, quant, x, step_context(np.float32(STEPS), order))
    assert np.isnan(wrong).any(axis=(1, 2)).tolist() == [True, True, True]


@pytest.mark.parametrize("execute", [False, True])
def test_a_batch_of_mixed_steps_lowers_to_no_grouped_convolution(execute):
    net = network(SMALL)
    quant = quantized(SMALL, tables=True, execute=execute)

    def predict(params, quant, x, t, ctx):
        return run(net.module, params, select(quant, ctx), x, t)

    x, t = inputs(SMALL, 3)
    ctx = step_context(t, np.arange(3))
    text = jax.jit(predict).lower(net.params, quant, x, t, ctx).as_text()
    convolutions = text.count("stablehlo.convolution")
    assert convolutions == (0 if execute else sum(s.operator.kind == "conv" for s in net.sites))
    assert text.count("batch_group_count = 1 ") == convolutions
    assert text.count("feature_group_count = 1 ") == convolutions


def test_values_and_bits_are_data_and_a_grid_is_not():
    module, params, quant, x = mixed()
    quant = select(quant, step_context(STEPS[0], 0))
    traces = []

    @quick
    def predict(params, quant, x):
        traces.append(None)
        return run(module, params, quant, x)

    def change(function):
        return jax.tree.map(function, quant, is_leaf=lambda node: isinstance(node, QParams))

    first = predict(params, quant, x)
    for new in (
        change(lambda q: q.replace(scale=q.scale * 1.7, zero_point=q.zero_point + 1)),
        change(lambda q: q.replace(qmax=jnp.float32(255.0), scale=q.scale / 17)),
    ):
        assert np.abs(predict(params, new, x) - first).max() > 0
    assert len(traces) == 1
    flat = flatten_sites(quant)
    log = QuantSpec(grid="log2")
    flat["pv"] = flat["pv"].replace(lhs=flat["pv"].lhs.replace(spec=log))
    predict(params, nest_sites(flat), x)
    predict(params, nest_sites(flat), x)
    assert len(traces) == 2


def test_site_trees_flatten_and_nest():
    tree = {"a": {"conv": 1, "inner": {"deep": 2}}, "b": SiteQuant(), "c": {"conv": None}}
    flat = flatten_sites(tree)
    assert flat == {"a/conv": 1, "a/inner/deep": 2, "b": SiteQuant(), "c/conv": None}
    assert nest_sites(flat) == tree


def test_unknown_operators_are_refused():
    with pytest.raises(ValueError, match="'matmul' is unknown; use one of"):
        Operator("matmul")
