"""Integer execution against the same sums in unbounded integers, and against the simulation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.export import qtensor
from qdiff_jax.export.integer import (
    check_executable,
    integer_accumulators,
    integer_op,
    lowered_has_int_dot,
    lowered_int_dots,
    simulated_op,
)
from qdiff_jax.operators import DENSE, PV, QK, Operator, same_conv
from qdiff_jax.quant import quantizer
from qdiff_jax.quant.qparams import (
    QParams,
    broadcast,
    dynamic_qparams,
    freeze,
    from_range,
    grouped,
)
from qdiff_jax.quant.spec import QuantSpec, code_range
from qdiff_jax.quant.timed import TimeIndexed, select, step_context

DOWNSAMPLE = Operator("conv", (2, 2), ((0, 1), (0, 1)))
STRIPES = Operator("conv", (1, 2), ((2, 0), (1, 3)))

TENSOR, CHANNEL = QuantSpec(), QuantSpec(granularity="channel")
SIGNED = QuantSpec(symmetric=True, signed=True)
CHANNEL_SYM = QuantSpec(symmetric=True, signed=True, granularity="channel")
ALWAYS_ZERO = QuantSpec(symmetric=True)
W_GROUP = QuantSpec(granularity="group", axis=-2, group=3)
X_GROUP = QuantSpec(granularity="group", axis=-1, group=3)
X_GROUP_DYNAMIC = QuantSpec(granularity="group", axis=-1, group=3, dynamic=True)
X_GROUP_SIGNED = QuantSpec(
    symmetric=True, signed=True, granularity="group", group=3, dynamic=True, narrow=True
)
W_GROUP_SIGNED = QuantSpec(
    symmetric=True, signed=True, granularity="group", axis=-2, group=3, narrow=True
)
X_GROUP_SHIFTED = QuantSpec(symmetric=True, granularity="group", group=3, dynamic=True)
TOKEN = QuantSpec(granularity="token")
DYNAMIC = QuantSpec(dynamic=True)


def draw(shape, seed, offset=0.3):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return x + np.float32(offset)


def qparams_of(spec, bits, x):
    """Min-max QParams of x; traceable, like everything that a case is built from."""
    if spec.dynamic:
        return dynamic_qparams(spec, *code_range(spec, bits))
    if spec.granularity == "tensor":
        view, axes = x, None
    elif spec.granularity == "channel":
        view, axes = x.reshape(-1, x.shape[-1]), 0
    elif spec.axis == -1:
        view, axes = x.reshape(-1, x.shape[-1] // spec.group, spec.group), (0, 2)
    else:
        shape = (-1, x.shape[-2] // spec.group, spec.group, x.shape[-1])
        view, axes = x.reshape(shape), (0, 2)
    return from_range(spec, view.min(axes), view.max(axes), *code_range(spec, bits))


def packed(spec, bits, w):
    qparams = qparams_of(spec, bits, w)
    return qtensor.from_codes(quantizer.codes(qparams, w), qparams, bits)


def static(lo=-1.0, hi=2.0, qmax=255):
    """Per-tensor QParams without a single compiled operation."""
    scale = np.float32((hi - lo) / qmax)
    zero = np.round(-np.float32(lo) / scale)
    return QParams(*(jnp.float32(v) for v in (scale, zero, 0, qmax)), TENSOR)


def unpacked(qparams, x, codes):
    """codes, zero points and scales, each of the shape of x: nothing shifted, nothing centred."""
    view = grouped(qparams.spec, x).shape
    scale, zero, *_ = (jnp.broadcast_to(v, view).reshape(x.shape) for v in broadcast(qparams, x))
    return codes, zero, scale


def centred(codes, zero, scale):
    """(q - z as int64, scale as float64) in NumPy."""
    return np.asarray(codes, np.int64) - np.asarray(zero, np.int64), np.asarray(scale, np.float64)


def contract(operator, x, w):
    """The operator in NumPy, in the dtype of its operands; padding is literal zeros."""
    if operator.kind == "dense":
        return x @ w
    if operator.kind == "qk":
        return np.einsum("bnc,bmc->bnm", x, w)
    if operator.kind == "pv":
        return np.einsum("bnm,bmc->bnc", x, w)
    x = np.pad(x, ((0, 0), *operator.padding, (0, 0)))
    (kh, kw), (sh, sw) = w.shape[:2], operator.strides
    windows = np.lib.stride_tricks.sliding_window_view(x, (kh, kw), axis=(1, 2))[:, ::sh, ::sw]
    return np.einsum("bhwcij,ijco->bhwo", windows, w)


def assert_exact(operator, build, lhs, other):
    """Accumulators against int64, scaled sums against float64, the output against the simulation.

    build(lhs, other) gives the QParams of lhs and the quantizer of the other operand.
    """

    @jax.jit
    def everything(lhs, other):
        xq, wq = build(lhs, other)
        rhs = None if isinstance(wq, qtensor.QTensor) else other
        frozen = freeze(xq, lhs)
        left = unpacked(frozen, lhs, quantizer.codes(frozen, lhs))
        if rhs is None:
            right = unpacked(wq.qparams, other, qtensor.codes(wq))
        else:
            right = unpacked(freeze(wq, other), other, quantizer.codes(wq, other))
        return (
            (left, right),
            integer_accumulators(operator, lhs, xq, wq, rhs=rhs),
            integer_op(operator, lhs, xq, wq, rhs=rhs),
            simulated_op(operator, lhs, xq, wq, rhs=rhs),
        )

    (left, right), (acc, *scales), y, simulated = jax.device_get(everything(lhs, other))
    (xi, xs), (wi, ws) = centred(*left), centred(*right)
    assert acc.dtype == np.int32
    assert np.abs(acc).max() > 0
    groups, channels = acc.shape[0], lhs.shape[-1]
    for g in range(groups):
        part = slice(g * channels // groups, (g + 1) * channels // groups)
        taken = wi if groups == 1 else wi[..., part, :]
        assert np.array_equal(acc[g], contract(operator, xi[..., part], taken))
    reference = contract(operator, xi * xs, wi * ws)
    s_x, s_w = (scale.astype(np.float64) for scale in scales)
    total = (acc * s_x * s_w).sum(0)
    assert np.abs(total - reference).max() <= 1e-12 * np.abs(reference).max()
    assert y.dtype == np.float32
    assert np.abs(y - simulated).max() <= 1e-5 * np.abs(simulated).max()
    assert np.abs(simulated - reference).max() <= 1e-5 * np.abs(reference).max()


CASES = {
    "conv-w8a8": (same_conv(3), (2, 5, 5, 6), (3, 3, 6, 4), TENSOR, 8, CHANNEL, 8),
    "conv-w4a8-asymmetric-padding": (DOWNSAMPLE, (2, 6, 6, 3), (3, 3, 3, 5), TENSOR, 8, CHANNEL, 4),
    "conv-odd-k-uneven-strides": (STRIPES, (1, 5, 6, 3), (2, 3, 3, 2), SIGNED, 8, CHANNEL_SYM, 4),
    "conv-1x1": (Operator("conv"), (2, 3, 3, 6), (1, 1, 6, 4), TENSOR, 4, TENSOR, 2),
    "conv-1x1-strided": (
        Operator("conv", (2, 2)),
        (1, 5, 5, 6),
        (1, 1, 6, 4),
        TENSOR,
        8,
        SIGNED,
        8,
    ),
    "conv-dynamic": (same_conv(3), (2, 4, 4, 3), (3, 3, 3, 2), DYNAMIC, 8, CHANNEL_SYM, 8),
    "conv-weight-groups": (same_conv(3), (1, 4, 4, 6), (3, 3, 6, 4), TENSOR, 8, W_GROUP, 4),
    "conv-input-groups": (same_conv(3), (1, 4, 4, 6), (3, 3, 6, 4), X_GROUP, 8, CHANNEL, 4),
    "conv-1x1-token": (Operator("conv"), (1, 3, 3, 6), (1, 1, 6, 4), TOKEN, 8, CHANNEL, 8),
    "conv-1x1-groups": (
        Operator("conv", (2, 2)),
        (1, 5, 3, 6),
        (1, 1, 6, 4),
        X_GROUP_SIGNED,
        4,
        W_GROUP_SIGNED,
        4,
    ),
    "dense-w8a8": (DENSE, (5, 6), (6, 4), TENSOR, 8, CHANNEL, 8),
    "dense-softmax-like": (DENSE, (2, 5, 6), (6, 4), ALWAYS_ZERO, 8, CHANNEL, 3),
    "dense-token": (DENSE, (2, 5, 6), (6, 4), TOKEN, 4, CHANNEL, 4),
    "dense-weight-groups": (DENSE, (2, 5, 6), (6, 4), TOKEN, 8, W_GROUP, 4),
    "dense-both-groups": (DENSE, (2, 5, 6), (6, 4), X_GROUP_DYNAMIC, 8, W_GROUP, 4),
    "dense-unsigned-groups": (DENSE, (2, 5, 6), (6, 4), X_GROUP_SHIFTED, 4, W_GROUP_SIGNED, 4),
    "dense-1-bit-weight": (DENSE, (5, 7), (7, 4), TENSOR, 8, CHANNEL, 1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_accumulators_are_exact_and_output_is_the_simulation(case):
    operator, x_shape, w_shape, x_spec, x_bits, w_spec, w_bits = case

    def build(x, w):
        return qparams_of(x_spec, x_bits, x), packed(w_spec, w_bits, w)

    assert_exact(operator, build, draw(x_shape, 3), draw(w_shape, 7, offset=0.1))


PIXELS = {"asymmetric-groups": (STRIPES, X_GROUP_DYNAMIC, W_GROUP)}
MORE_PIXELS = {
    "groups": (same_conv(3), X_GROUP_SIGNED, W_GROUP_SIGNED),
    "token": (DOWNSAMPLE, TOKEN, CHANNEL),
    "token-weight-groups": (STRIPES, TOKEN, W_GROUP_SIGNED),
    "groups-of-the-input-alone": (same_conv(3), X_GROUP_SHIFTED, CHANNEL_SYM),
}


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=name) for name, case in PIXELS.items()),
        *(
            pytest.param(case, id=name, marks=pytest.mark.slow)
            for name, case in MORE_PIXELS.items()
        ),
    ],
)
def test_a_scale_for_each_pixel_is_accumulated_tap_by_tap(case):
    """The input's codes of each tap and group against int64, which the border pads with zeros."""
    operator, x_spec, w_spec = case
    x, w = draw((2, 5, 6, 6), 3), draw((3, 3, 6, 4), 7, offset=0.1)

    @jax.jit
    def everything(x, w):
        xq, weight = qparams_of(x_spec, 4, x), packed(w_spec, 4, w)
        frozen = freeze(xq, x)
        left = unpacked(frozen, x, quantizer.codes(frozen, x))
        right = unpacked(weight.qparams, w, qtensor.codes(weight))
        args = (operator, x, xq, weight)
        return (left, right), integer_accumulators(*args), integer_op(*args), simulated_op(*args)

    (left, right), (acc, s_x, s_w), y, simulated = jax.device_get(everything(x, w))
    (xi, xs), (wi, ws) = centred(*left), centred(*right)
    groups = 2 if "group" in (x_spec.granularity, w_spec.granularity) else 1
    assert (acc.dtype, len(acc)) == (np.int32, 9 * groups)
    for tap in range(9):
        only = np.zeros_like(wi)
        only[tap // 3, tap % 3] = wi[tap // 3, tap % 3]
        for g in range(groups):
            part = slice(g * 6 // groups, (g + 1) * 6 // groups)
            wanted = contract(operator, xi[..., part], only[..., part, :])
            assert np.array_equal(acc[tap * groups + g], wanted)
    reference = contract(operator, xi * xs, wi * ws)
    total = (acc * s_x.astype(np.float64) * s_w.astype(np.float64)).sum(0)
    assert np.abs(total - reference).max() <= 1e-12 * np.abs(reference).max()
    assert np.abs(y - simulated).max() <= 1e-5 * np.abs(simulated).max()


PAIRS = {
    "qk-static": (QK, TENSOR, TENSOR),
    "qk-tokens-of-q-and-k": (QK, TOKEN, TOKEN),
    "pv-always-zero": (PV, ALWAYS_ZERO, TENSOR),
    "pv-channels-of-v": (PV, ALWAYS_ZERO, CHANNEL),
    "pv-symmetric-v": (PV, TOKEN, CHANNEL_SYM),
}


@pytest.mark.parametrize("case", PAIRS.values(), ids=PAIRS.keys())
def test_products_of_two_activations(case):
    operator, lhs_spec, rhs_spec = case
    lhs = draw((2, 4, 5), 1)
    rhs = draw((2, 3, 5) if operator is QK else (2, 5, 3), 2)
    if operator is PV:
        lhs = np.exp(lhs) / np.exp(lhs).sum(-1, keepdims=True)

    def build(lhs, rhs):
        return qparams_of(lhs_spec, 8, lhs), qparams_of(rhs_spec, 8, rhs)

    assert_exact(operator, build, lhs, rhs)


def step_table():
    rows = [static(-1.0 - t, 2.0 + 0.5 * t) for t in range(3)]
    table = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *rows)
    return TimeIndexed(table, jnp.asarray([10.0, 5.0, 0.0]), "exact")


def test_rows_of_a_step_table_pad_each_sample_with_its_own_zero_point():
    table = step_table()
    assert len(np.unique(table.table.zero_point)) == 3

    def build(x, w):
        rows = select(table, step_context(jnp.asarray([0.0, 10.0, 5.0])))
        assert rows.rows
        return rows, packed(CHANNEL, 4, w)

    assert_exact(same_conv(3), build, draw((3, 4, 4, 2), 5), draw((3, 3, 2, 3), 7))


def test_int32_holds_the_longest_admitted_contraction_and_longer_ones_are_refused():
    limit = (2**31 - 1) // 255**2

    def dot(x, codes):
        lowest = static().replace(scale=jnp.float32(1), zero_point=jnp.float32(0))
        highest = lowest.replace(zero_point=jnp.float32(255))
        weight = qtensor.from_codes(codes, highest, 8)
        return integer_accumulators(DENSE, x, lowest, weight)[0]

    acc = jax.jit(dot)(np.full((1, limit), 255.0), np.zeros((limit, 1), np.int32))
    assert int(acc[0, 0, 0]) == -limit * 255**2
    with pytest.raises(ValueError, match="could overflow int32"):
        jax.eval_shape(dot, np.zeros((1, limit + 1)), np.zeros((limit + 1, 1), np.int32))


@pytest.mark.parametrize("w_spec", [CHANNEL, W_GROUP])
def test_bias_is_added_once_in_every_channel(w_spec):
    @jax.jit
    def added(x, w, bias):
        args = (DENSE, x, static(), packed(w_spec, 4, w))
        return integer_op(*args, bias) - integer_op(*args)

    bias = np.arange(4, dtype=np.float32)
    assert np.allclose(added(draw((5, 6), 3), draw((6, 4), 7), bias), bias[None], atol=1e-5)


LOWERED = {
    "conv": (same_conv(3), (1, 4, 4, 6), (3, 3, 6, 4), CHANNEL),
    "dense-groups": (DENSE, (1, 4, 6), (6, 4), W_GROUP),
    "qk": (QK, (1, 4, 6), (1, 4, 6), None),
    "pv": (PV, (1, 4, 4), (1, 4, 6), None),
}


@pytest.mark.parametrize("case", LOWERED.values(), ids=LOWERED.keys())
def test_every_platform_is_given_an_integer_product(case):
    operator, x_shape, other_shape, w_spec = case
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x_shape, other_shape)]

    def run(op, x, other):
        if w_spec is None:
            return op(operator, x, static(), static(), rhs=other)
        return op(operator, x, static(), packed(w_spec, 4, other))

    integer, simulated = (functools.partial(run, op) for op in (integer_op, simulated_op))
    for platform in ("cpu", "tpu", "cuda"):
        assert lowered_has_int_dot(integer, *shapes, platforms=[platform])
    # Integer convolutions do not run on GPU: none may be left.
    assert "convolution" not in jax.jit(integer).lower(*shapes).as_text()
    assert not lowered_has_int_dot(simulated, *shapes)
    if operator in (DENSE, QK):
        assert lowered_has_int_dot(integer, *shapes, compiled=True)
        assert not lowered_has_int_dot(simulated, *shapes, compiled=True)
    with pytest.raises(ValueError, match="needs the device itself"):
        lowered_has_int_dot(integer, *shapes, platforms=["tpu"], compiled=True)


def test_products_are_counted_as_often_as_they_are_made():
    """Of a function that is called twice, of two sites with one inside a loop, of none."""
    codes = jax.ShapeDtypeStruct((4, 4), jnp.int8)

    @jax.jit
    def once(a, b):
        return jax.lax.dot(a, b, preferred_element_type=jnp.int32)

    def twice(a, b):
        return once(a, b) + once(b, a)

    def looped(a, b):
        def add(total, _):
            return total + once(a, b), None

        return jax.lax.scan(add, once(b, b), None, 3)[0]

    for platform in ("cpu", "tpu", "cuda"):
        assert lowered_int_dots(once, codes, codes, platforms=[platform]) == 1
        assert lowered_int_dots(twice, codes, codes, platforms=[platform]) == 2
        assert lowered_int_dots(looped, codes, codes, platforms=[platform]) == 2
    assert lowered_int_dots(lambda a, b: a @ b, codes, codes) == 0


BROKEN = {
    "more than 8 bits": {"qmax": 1023},
    "are not codes": {"zero_point": 3.5},
    "zero points -3": {"zero_point": -3},
}


@jax.jit
def dense(x, qparams):
    return integer_op(DENSE, x, qparams, packed(CHANNEL, 4, jnp.asarray(draw((6, 4), 7))))


@pytest.mark.parametrize("message", BROKEN)
def test_numbers_that_forbid_integers_are_nan_inside_and_an_error_outside(message):
    fields = {name: jnp.float32(value) for name, value in BROKEN[message].items()}
    qparams = static().replace(**fields)
    assert np.isnan(dense(draw((3, 6), 3), qparams)).all()
    with pytest.raises(ValueError, match=f"block/dense: .*{message}"):
        check_executable({"dense": qparams}, "block")


def test_numbers_that_allow_integers_pass():
    check_executable({"input": (step_table(), dynamic_qparams(TOKEN, 0, 255)), "q": static()})
    assert np.isfinite(dense(draw((3, 6), 3), static())).all()


def test_nan_inputs_and_uncalibrated_steps_stay_visible():
    x = draw((3, 6), 3)
    x[1, 2] = np.nan
    assert np.isnan(dense(x, static())).any(1).tolist() == [False, True, False]
    uncalibrated = select(step_table(), step_context(7.0))
    assert np.isnan(dense(draw((3, 6), 3), uncalibrated)).all()


CONV, X = same_conv(3), (1, 4, 4, 6)
X_PAIRS = QuantSpec(granularity="group", group=2)
LOG = QuantSpec(grid="log2")
REFUSED = {
    "'log2' are not proportional": (PV, (1, 4, 4), LOG, (1, 4, 6), TENSOR),
    "the weight: codes of the grid 'log2'": (DENSE, X, TENSOR, (6, 4), LOG),
    "the input of conv varies along the contracted": (CONV, X, CHANNEL, (3, 3, 6, 4), CHANNEL),
    "scale of v varies along the contracted axis": (PV, (1, 4, 4), TENSOR, (1, 4, 6), TOKEN),
    "2 groups and the input 3": (DENSE, X, X_PAIRS, (6, 4), W_GROUP),
    "into groups": (QK, (1, 4, 6), TENSOR, (1, 4, 6), X_GROUP),
    "groups along axis -1 of v": (PV, (1, 4, 4), TENSOR, (1, 4, 6), X_GROUP),
    "per output channel": (DENSE, X, TENSOR, (6, 4), X_PAIRS),
    r"does not fit an input \(1, 4, 4, 5\)": (CONV, (1, 4, 4, 5), TENSOR, (3, 3, 6, 4), CHANNEL),
    r"kernel \(3, 3, 6, 4\) does not fit": (
        Operator("conv"), (1, 2, 2, 6), TENSOR, (3, 3, 6, 4), CHANNEL,
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_no_integer_product_can_honour_is_refused(message):
    operator, x_shape, x_spec, other_shape, other_spec = REFUSED[message]

    def run(x, other):
        xq = qparams_of(x_spec, 8, x)
        if operator in (QK, PV):
            return integer_op(operator, x, xq, qparams_of(other_spec, 8, other), rhs=other)
        return integer_op(operator, x, xq, packed(other_spec, 4, other))

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, np.zeros(x_shape), np.zeros(other_shape))


def test_operands_that_are_missing_are_refused():
    x = jnp.zeros((1, 4, 6))
    weight = qtensor.from_codes(np.zeros((6, 4), np.int32), static(), 8)
    with pytest.raises(ValueError, match="got TimeIndexed"):
        integer_op(DENSE, x, step_table(), weight)
    with pytest.raises(ValueError, match="got NoneType"):
        integer_op(DENSE, x, None, weight)
    with pytest.raises(ValueError, match="needs its weight as a QTensor"):
        integer_op(DENSE, x, static(), static())
    with pytest.raises(ValueError, match="needs k and its QParams"):
        integer_op(QK, x, static(), None, rhs=x)
    with pytest.raises(ValueError, match="'log2' are not proportional"):
        check_executable(static().replace(spec=LOG), "attn/pv")
