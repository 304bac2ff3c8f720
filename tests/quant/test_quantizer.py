"""The suite that every grid and granularity passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_jax.quant import quantizer
from qdiff_jax.quant.affine import reciprocal
from qdiff_jax.quant.qparams import broadcast, dynamic_qparams, freeze, from_range, grouped
from qdiff_jax.quant.spec import FLOATS, QuantSpec, code_range

SHAPE = (2, 3, 8, 12)
SPECS = {
    "asymmetric": QuantSpec(),
    "asymmetric_signed": QuantSpec(signed=True),
    "symmetric": QuantSpec(symmetric=True, signed=True),
    "always_zero": QuantSpec(symmetric=True),
    "channel": QuantSpec(granularity="channel"),
    "channel_middle": QuantSpec(granularity="channel", axis=-3),
    "channel_symmetric": QuantSpec(granularity="channel", symmetric=True, signed=True),
    "group_last": QuantSpec(granularity="group", group=4),
    "group_contraction": QuantSpec(granularity="group", group=2, axis=-2),
    "dynamic_tensor": QuantSpec(dynamic=True),
    "dynamic_channel": QuantSpec(granularity="channel", dynamic=True),
    "token": QuantSpec(granularity="token", symmetric=True, signed=True),
    "dynamic_group": QuantSpec(granularity="group", group=3, dynamic=True),
    "log2": QuantSpec(grid="log2"),
    "log2_zero": QuantSpec(grid="log2", zero_code=True),
    "log_sqrt2": QuantSpec(grid="log_sqrt2"),
    "log_sqrt2_zero_channel": QuantSpec(grid="log_sqrt2", zero_code=True, granularity="channel"),
    "e1m2_group": QuantSpec(grid="e1m2", granularity="group", group=2, axis=-2),
    "nvfp4": QuantSpec(
        grid="e2m1", granularity="group", group=4, dynamic=True, scale_format="e4m3"
    ),
}
every_spec = pytest.mark.parametrize("name", SPECS)
BITS = (2, 3, 4, 8)


def is_float(spec) -> bool:
    return spec.grid in FLOATS


fake_quant = jax.jit(quantizer.fake_quant)


@jax.jit
def facts(params, x):
    """Everything the suite asks of one quantizer and one tensor, in one compile per spec."""
    frozen = freeze(params, x)
    x_hat, q = quantizer.fake_quant(params, x), quantizer.codes(params, x)
    scale, zero, qmin, qmax = broadcast(frozen, x)
    view = grouped(params.spec, x)
    u = jnp.round(view * reciprocal(scale)) + zero
    error = jnp.abs(grouped(params.spec, x_hat) - view)
    slack = 1e-6 * jnp.abs(view)
    return {
        "x_hat": x_hat,
        "codes": q,
        "decoded": quantizer.dequantize(frozen, q),
        "again": quantizer.fake_quant(frozen, x_hat),
        "codes_again": quantizer.codes(frozen, x_hat),
        "gradient": jax.grad(lambda x: quantizer.fake_quant(frozen, x).sum())(x),
        "unclipped": ((u >= qmin) & (u <= qmax)).reshape(x.shape),
        "in_range": (view >= (qmin - zero) * scale) & (view <= (qmax - zero) * scale),
        "half_step": error <= scale * 0.5 + slack,
        "one_step": error <= scale + slack,
    }


def data(spec, seed=0, shape=SHAPE):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    x *= np.exp(np.random.default_rng(seed + 1).standard_normal(shape[-1])).astype(np.float32)
    if not spec.signed and (spec.grid != "affine" or spec.symmetric):
        x = np.abs(x)
    x.flat[::7] = 0.0
    return jnp.asarray(x)


def make(spec, x, bits, clip=0.7):
    """Static ranges clip some values on purpose."""
    qmin, qmax = code_range(spec, bits)
    if spec.dynamic:
        # A scale of 8 bits takes no gain.
        return dynamic_qparams(spec, qmin, qmax, gain=1.0 if spec.scale_format else clip)
    x = np.asarray(x)
    view = grouped(spec, x)
    axis = x.ndim + spec.axis
    kept = {"tensor": (), "channel": (axis,), "group": (axis, view.ndim - 1)}[spec.granularity]
    if spec.granularity == "group" and spec.axis == -1:
        kept = (axis,)
    axes = tuple(a for a in range(view.ndim) if a not in kept)
    return from_range(spec, clip * view.min(axes), clip * view.max(axes), qmin, qmax)


@every_spec
def test_invariants_at_every_width(name):
    spec = SPECS[name]
    x = data(spec)
    for bits in (4,) if is_float(spec) else BITS:
        f = jax.device_get(facts(make(spec, x, bits), x))
        qmin, qmax = code_range(spec, bits)
        assert f["codes"].dtype == np.int32
        assert qmin <= f["codes"].min() <= f["codes"].max() <= qmax
        np.testing.assert_array_equal(f["decoded"], f["x_hat"])
        np.testing.assert_array_equal(f["again"], f["x_hat"])
        np.testing.assert_array_equal(f["codes_again"], f["codes"])
        if spec.grid == "affine":
            assert f["in_range"].any()
            assert (f["half_step"] | ~f["in_range"]).all()
            assert bits < 8 or not f["unclipped"].all()
            np.testing.assert_allclose(f["gradient"], f["unclipped"], rtol=1e-6)


@every_spec
def test_zero_is_exact_unless_a_log_grid_without_its_code(name):
    spec = SPECS[name]
    x = data(spec)
    x_hat = np.asarray(facts(make(spec, x, 4), x)["x_hat"])
    zeros = x_hat[np.asarray(x) == 0]
    if spec.grid == "affine" or spec.zero_code or is_float(spec):
        assert not zeros.any()
    else:
        assert (zeros > 0).all()


@every_spec
def test_monotone_in_x(name):
    spec = SPECS[name]
    low = 0.0 if not spec.signed and (spec.grid != "affine" or spec.symmetric) else -3.0
    # The last two axes hold one ascending ramp in every cell's scale.
    ramp = jnp.linspace(low, 3.0, 240)
    x = jnp.broadcast_to(ramp.reshape(240, 1, 1, 1), (240, 3, 8, 12))
    frozen = make(spec, data(spec), 4)
    if spec.dynamic:
        # A frozen range, as one tensor's range is one quantizer.
        frozen = freeze(frozen, data(spec)[:1, :1, :1, :])
    assert bool(jnp.all(jnp.diff(fake_quant(frozen, x), axis=0) >= 0))


@pytest.mark.parametrize("name", ["channel", "channel_symmetric", "channel_middle"])
def test_per_channel_is_per_tensor_on_each_slice(name):
    spec = SPECS[name]
    x = data(spec)
    params = make(spec, x, 4)
    x_hat = fake_quant(params, x)
    tensor = QuantSpec(symmetric=spec.symmetric, signed=spec.signed)
    for c in range(x.shape[spec.axis]):
        one = params.replace(scale=params.scale[c], zero_point=params.zero_point[c], spec=tensor)
        part = jnp.take(x, c, axis=spec.axis)
        np.testing.assert_array_equal(fake_quant(one, part), jnp.take(x_hat, c, axis=spec.axis))


def test_groups_are_per_tensor_on_each_block():
    spec = SPECS["group_contraction"]
    x = data(spec)
    params = make(spec, x, 4)
    x_hat = fake_quant(params, x)
    for k in range(4):
        for n in range(12):
            cut = (slice(None), slice(None), slice(2 * k, 2 * k + 2), n)
            one = params.replace(
                scale=params.scale[k, n], zero_point=params.zero_point[k, n], spec=QuantSpec()
            )
            np.testing.assert_array_equal(quantizer.fake_quant(one, x[cut]), x_hat[cut])


@pytest.mark.parametrize("name", ["asymmetric", "channel", "token", "log2"])
def test_jit_equals_eager_and_vmap_equals_loop(name):
    spec = SPECS[name]
    x = data(spec)
    params = make(spec, x, 4)
    np.testing.assert_array_equal(quantizer.fake_quant(params, x), fake_quant(params, x))
    looped = jnp.stack([fake_quant(params, part) for part in x])
    mapped = jax.jit(jax.vmap(functools.partial(quantizer.fake_quant, params)))(x)
    np.testing.assert_array_equal(mapped, looped)


def test_the_gain_of_a_dynamic_range_is_trainable_and_the_range_itself_is_not():
    spec = QuantSpec(dynamic=True, symmetric=True, signed=True)
    x = data(spec)
    params = make(spec, x, 4)

    def total(gain, x):
        return quantizer.fake_quant(params.replace(scale=gain), x).sum()

    gradient, to_x = jax.jit(jax.grad(total, argnums=(0, 1)))(params.scale, x)
    assert np.isfinite(gradient)
    assert gradient != 0
    np.testing.assert_allclose(np.where(to_x > 0.5, 1.0, 0.0), to_x, rtol=1e-6)
    assert len(np.unique(to_x > 0.5)) == 2


def test_rows_broadcast_over_the_batch_as_a_loop_over_samples():
    for name in ("asymmetric", "channel", "group_last", "dynamic_tensor", "token", "log2"):
        spec = SPECS[name]
        x = data(spec)
        one, two = make(spec, x, 3, 0.5), make(spec, x, 6, 0.9)
        rows = jax.tree.map(lambda *leaf: jnp.stack(leaf), one, two).replace(rows=True)
        got = fake_quant(rows, x)
        if name == "dynamic_tensor":  # its range is that of the whole batch, also for one row
            loop = [fake_quant(p, x)[i] for i, p in enumerate((one, two))]
        else:
            loop = [fake_quant(p, x[i]) for i, p in enumerate((one, two))]
        np.testing.assert_array_equal(got, jnp.stack(loop), err_msg=name)


def test_values_and_bits_reuse_a_compile_and_a_new_grid_adds_one():
    traces = []

    @jax.jit
    def run(params, x):
        traces.append(params.spec)
        return quantizer.fake_quant(params, x)

    x = jnp.abs(data(QuantSpec()))
    for bits in (2, 4, 8):
        for hi in (1.0, 3.0):
            run(from_range(QuantSpec(), 0.0, hi, *code_range(QuantSpec(), bits)), x)
    assert len(traces) == 1
    run(from_range(QuantSpec(grid="log2"), 0.0, 1.0, 0, 15), x)
    assert len(traces) == 2


def test_misfits_raise_and_say_what_to_do():
    x = data(QuantSpec())
    table = from_range(QuantSpec(), -jnp.ones(5), jnp.ones(5), 0, 15)
    with pytest.raises(ValueError, match="select"):
        quantizer.fake_quant(table, x)
    with pytest.raises(ValueError, match="does not fit"):
        quantizer.fake_quant(
            from_range(QuantSpec(granularity="channel"), -jnp.ones(5), jnp.ones(5), 0, 15), x
        )
    with pytest.raises(ValueError, match="do not divide"):
        quantizer.fake_quant(
            dynamic_qparams(QuantSpec(granularity="group", group=5, dynamic=True), 0, 15), x
        )
    dynamic = dynamic_qparams(QuantSpec(granularity="token"), 0, 15)
    with pytest.raises(ValueError, match="freeze"):
        quantizer.dequantize(dynamic, quantizer.codes(dynamic, x))
    with pytest.raises(ValueError, match="dynamic_qparams"):
        from_range(QuantSpec(granularity="token"), -1.0, 1.0, 0, 15)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_inputs_keep_their_dtype_and_are_quantized_in_float32(dtype):
    x = data(QuantSpec()).astype(dtype)
    params = make(QuantSpec(), x.astype(jnp.float32), 8)
    x_hat = fake_quant(params, x)
    assert x_hat.dtype == dtype
    np.testing.assert_array_equal(x_hat, fake_quant(params, x.astype(jnp.float32)).astype(dtype))


STATIC = [SPECS[n] for n in ("asymmetric", "symmetric", "channel", "group_last", "log2")]
SHAPES = [(1, 4), (3, 2, 8)]
special = st.sampled_from(["constant", "zero", "one_sided", "huge", "tiny", "normal"])


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    bits=st.integers(2, 8),
    spec=st.sampled_from(STATIC),
    shape=st.sampled_from(SHAPES),
    kind=special,
    seed=st.integers(0, 1000),
)
def test_degenerate_ranges(bits, spec, shape, kind, seed):
    """Constant, all-zero, one-sided, huge and denormal-range tensors keep every invariant."""
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    x = {
        "constant": np.full(shape, x.flat[0]),
        "zero": np.zeros(shape, np.float32),
        "one_sided": -np.abs(x) - 1,
        "huge": x * np.float32(1e30),
        "tiny": x * np.float32(1e-12),
        "normal": x,
    }[kind]
    x = jnp.asarray(np.abs(x) if spec.grid == "log2" else x)
    params = make(spec, x, bits, clip=1.0)
    f = jax.device_get(facts(params, x))
    assert np.isfinite(f["x_hat"]).all()
    qmin, qmax = code_range(spec, bits)
    assert qmin <= f["codes"].min() <= f["codes"].max() <= qmax
    np.testing.assert_array_equal(f["decoded"], f["x_hat"])
    if spec.grid == "affine":
        np.testing.assert_array_equal(f["again"], f["x_hat"])
        # One step where rounding the zero point pushed an end of the range out by half a step.
        assert f["half_step" if spec.symmetric else "one_step"].all()


@pytest.mark.parametrize(
    "params",
    [
        from_range(QuantSpec(), -1.0, 2.0, 0, 15),
        from_range(QuantSpec(grid="e2m1"), -6.0, 6.0, -7, 7),
        from_range(QuantSpec(grid="e2m1", granularity="channel"), -np.ones(2), np.ones(2), -7, 7),
        from_range(QuantSpec(grid="log2", zero_code=True), 0.0, 1.0, 0, 15),
    ],
    ids=["affine", "e2m1", "e2m1_channel", "log2"],
)
def test_the_code_of_nan_is_that_of_zero(params):
    x = jnp.array([[jnp.nan, 0.0], [0.0, jnp.nan]])
    found = quantizer.codes(params, x)
    np.testing.assert_array_equal(found, quantizer.codes(params, jnp.zeros_like(x)))
    np.testing.assert_array_equal(quantizer.dequantize(params, found), 0.0)


def test_infinite_inputs_clip_nan_stays_and_a_broken_range_is_loud():
    params = from_range(QuantSpec(), -1.0, 1.0, 0, 15)
    x = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 0.3])
    x_hat = np.asarray(fake_quant(params, x))
    ends = np.asarray(fake_quant(params, jnp.array([9.0, -9.0])))
    np.testing.assert_array_equal(x_hat[:2], ends)
    assert np.isnan(x_hat[2])
    assert float(quantizer.dequantize(params, quantizer.codes(params, x))[2]) == 0.0
    for lo, hi in ((jnp.nan, 1.0), (-jnp.inf, 1.0), (-1.0, jnp.nan)):
        broken = from_range(QuantSpec(), lo, hi, 0, 15)
        assert np.isnan(np.asarray(fake_quant(broken, jnp.array([0.3])))).all()
