"""Block-diagonal Hessians: the blocks of the whole one, each part rounded alone, and when they are taken."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from qdiff_jax.quant.hessian_size import hessian_parts, rounding_cost
from qdiff_jax.quant.moments import (
    Moments,
    chunk_moments,
    hessian,
    layer_loss,
    merge,
)
from qdiff_jax.quant.qparams import from_range
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.stages.layer_rounding import ClosedFormConfig, _factors, _round_layer, round_layer

from .aim import aimed

PARTS, SIZE, OUT, ROWS = 3, 8, 5, 200


def rows(seed=0):
    rng = np.random.default_rng(seed)
    mix = np.eye(PARTS * SIZE) + 0.3 * rng.standard_normal((PARTS * SIZE, PARTS * SIZE))
    x = rng.standard_normal((ROWS, PARTS * SIZE)) @ mix + 0.5
    r = 0.1 * rng.standard_normal((ROWS, OUT))
    return (jnp.asarray(v, jnp.float32) for v in (x, r, rng.uniform(0.5, 2.0, ROWS)))


def made(parts):
    x, r, weights = rows()
    half = ROWS // 2
    chunks = [slice(0, half), slice(half, ROWS)]
    return merge(*(chunk_moments(x[c], r[c], weights[c], parts) for c in chunks))


def kernel():
    return jnp.asarray(np.random.default_rng(1).standard_normal((1, 3, SIZE, OUT)), jnp.float32)


@pytest.mark.parametrize("centred", [True, False])
def test_a_stack_holds_the_diagonal_blocks_of_the_whole(centred):
    whole, stack = hessian(made(1), centred), hessian(made(PARTS), centred)
    assert stack.shape == (PARTS, SIZE, SIZE)
    for g in range(PARTS):
        own = slice(g * SIZE, (g + 1) * SIZE)
        np.testing.assert_allclose(stack[g], whole[own, own], rtol=2e-5, atol=1e-5)


def test_the_loss_is_that_of_the_whole_without_what_parts_share():
    stack, w = made(PARTS), kernel()
    change = 0.1 * jnp.sign(w)
    apart = jnp.asarray(jax.scipy.linalg.block_diag(*stack.spread))
    whole = stack.replace(spread=apart)
    np.testing.assert_allclose(
        layer_loss(w, w + change, stack), layer_loss(w, w + change, whole), rtol=1e-5
    )
    parted, wanted = (aimed(w, m) for m in (stack, whole))
    np.testing.assert_allclose(PARTS * (parted - w), wanted - w, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0, 10.0])
def test_the_way_of_parts_never_raises_the_loss_of_the_whole(noise):
    """Neighbouring taps see nearly the same; then all of the way of each part overshoots."""
    rng = np.random.default_rng(3)
    shared = rng.standard_normal((ROWS, SIZE))
    x = np.concatenate(
        [shared + noise * rng.standard_normal(shared.shape) for _ in range(PARTS)], 1
    )
    r = shared @ rng.standard_normal((SIZE, OUT))
    x, r, ones = (jnp.asarray(v, jnp.float32) for v in (x, r, np.ones(ROWS)))
    whole, stack = (chunk_moments(x, r, ones, parts) for parts in (1, PARTS))
    w = kernel()
    step = aimed(w, stack, ridge=1e-4) - w
    losses = [float(layer_loss(w, w + scale * step, whole)) for scale in (0.0, 1.0, PARTS)]
    assert losses[1] < losses[0]
    if noise <= 0.1:
        best = float(layer_loss(w, aimed(w, whole, ridge=1e-4), whole))
        assert losses[1] <= best + 0.01 * losses[0]
        assert losses[2] > 3.0 * losses[0]


@pytest.mark.parametrize("target", ["layer_quantized_input", "block_fp_output"])
def test_parts_are_rounded_as_layers_of_their_own(target):
    config = ClosedFormConfig(target=target)
    grid = from_range(
        QuantSpec(granularity="channel"), -2.5 * np.ones(OUT), 2.5 * np.ones(OUT), 0, 7
    )
    w, bias, stack = kernel(), jnp.zeros(OUT), made(PARTS)
    found = round_layer(w, bias, grid, stack, config)
    for g in range(PARTS):
        own = slice(g * SIZE, (g + 1) * SIZE)
        # Towards an asymmetric target each part goes its share of the way.
        share = PARTS if config.asymmetric else 1
        cross = stack.cross[own] / share
        alone = stack.replace(mean=stack.mean[own], spread=stack.spread[g], cross=cross)
        single = round_layer(w[:, g : g + 1], bias, grid, alone, config)
        np.testing.assert_array_equal(found.codes[:, g : g + 1], single.codes)
    assert float(found.loss) < float(found.nearest_loss)


def test_coordinate_descent_asks_for_the_whole():
    grid = from_range(
        QuantSpec(granularity="channel"), -2.5 * np.ones(OUT), 2.5 * np.ones(OUT), 0, 7
    )
    with pytest.raises(ValueError, match="hessian_mib"):
        round_layer(kernel(), jnp.zeros(OUT), grid, made(PARTS), ClosedFormConfig(sweeps=1))


@pytest.mark.parametrize(
    ("shape", "limit", "parts"),
    [
        ((3, 3, 320, 320), 2048, 1),
        ((3, 3, 2560, 1280), 2048, 9),
        ((3, 3, 2560, 1280), 512, 18),
        ((5120, 1280), 2048, 1),
        ((16384, 64), 2048, 4),
    ],
)
def test_the_fewest_parts_that_fit_are_taken(shape, limit, parts):
    assert hessian_parts(shape, limit) == parts
    assert rounding_cost(shape, 0, parts).bytes <= limit << 20


def test_a_layer_that_never_fits_is_an_error():
    with pytest.raises(ValueError, match="hessian_mib"):
        hessian_parts((3, 3, 2**20, 8), 1)


def test_taps_save_what_the_docstring_says():
    whole, taps = (rounding_cost((3, 3, 2560, 1280), 0, parts) for parts in (1, 9))
    assert whole.bytes == 12 * 4 * 23_040**2
    assert whole.bytes == pytest.approx(22 * taps.bytes, rel=0.02)
    assert whole.column_bytes == taps.column_bytes
    assert whole.solved == pytest.approx(2e13, rel=0.1)
    factors = [rounding_cost((3, 3, 2560, 0), 0, parts).solved for parts in (1, 9)]
    assert factors[0] == pytest.approx(81 * factors[1], rel=1e-6)


def test_time_cuts_what_memory_does_not():
    shape = (3, 3, 64, 32)
    assert hessian_parts(shape, 2048) == 1
    most = rounding_cost(shape, 0, 1).solved
    assert hessian_parts(shape, 2048, most) == 1
    assert hessian_parts(shape, 2048, most - 1) == 9
    assert rounding_cost(shape, 0, 9).solved < most / 9
    with pytest.raises(ValueError, match="hessian_seconds"):
        hessian_parts(shape, 2048, 10.0)
    config = ClosedFormConfig(hessian_seconds=0.5, multiply_adds_per_second=4e9)
    assert config.hessian_limit == (2048, 2e9)


def test_float64_takes_twice_the_memory():
    single = rounding_cost((64, 8), 0)
    with jax.enable_x64(True):
        double = rounding_cost((64, 8), 0)
    assert (double.bytes, double.column_bytes) == (2 * single.bytes, 2 * single.column_bytes)


def solving(inputs, outputs, parts):
    """The two functions that solve a layer, with the shapes of what they take."""

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    part = inputs // parts
    spread = array(inputs, inputs) if parts == 1 else array(parts, part, part)
    options = dict(act_order=True, asymmetric=True, centred=True, double=False)
    first = (spread, array(inputs), array(), 0.01, 0.05)
    factors = jax.eval_shape(functools.partial(_factors, **options), *first)
    grid = from_range(QuantSpec(granularity="channel"), -np.ones(outputs), np.ones(outputs), 0, 15)
    cross = array(inputs, outputs)
    moments = Moments(array(), array(inputs), array(outputs), spread, cross, array(outputs))
    second = (array(inputs, outputs), array(outputs), grid, moments, None, *factors)
    own = dict(block=128, centred=True, sweeps=0, kronecker_sweeps=0)
    return (_factors, first, options), (_round_layer, second, own)


def multiply_adds(jaxpr) -> float:
    """Of matrix products, factorisations, triangular solutions and products by element, loops unrolled."""
    total = 0.0
    for equation in jaxpr.eqns:
        shapes = [getattr(v.aval, "shape", ()) for v in equation.invars]
        name = equation.primitive.name
        times = equation.params.get("length", 1) if name == "scan" else 1
        if name == "dot_general":
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            free = math.prod(equation.outvars[0].aval.shape)
            total += free * math.prod(shapes[0][axis] for axis in contracted)
        elif name == "cholesky":
            total += math.prod(shapes[0]) * shapes[0][-1] / 6
        elif name == "triangular_solve":
            total += math.prod(shapes[1]) * shapes[0][-1] / 2
        elif name == "mul":
            total += math.prod(equation.outvars[0].aval.shape)
        for inner in jaxprs_in_params(equation.params):
            total += times * multiply_adds(inner)
    return total


@pytest.mark.parametrize(("inputs", "outputs", "parts"), [(384, 96, 1), (576, 64, 9)])
def test_the_estimate_of_time_is_that_of_the_program(inputs, outputs, parts):
    found = 0.0
    for function, args, options in solving(inputs, outputs, parts):
        found += multiply_adds(jax.make_jaxpr(functools.partial(function, **options))(*args).jaxpr)
    cost = rounding_cost((inputs, outputs), 0, parts)
    assert found == pytest.approx(cost.solved, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("inputs", "outputs", "parts"), [(384, 96, 1), (576, 64, 9)])
def test_the_estimate_of_memory_is_that_of_the_program(inputs, outputs, parts):
    cost, peaks = rounding_cost((inputs, outputs), 0, parts), []
    for function, args, options in solving(inputs, outputs, parts):
        made = function.lower(*args, **options).compile().memory_analysis()
        peaks.append(
            made.argument_size_in_bytes + made.output_size_in_bytes + made.temp_size_in_bytes
        )
    assert peaks[0] == pytest.approx(cost.bytes, rel=0.15)
    assert peaks[1] < cost.bytes + cost.column_bytes
