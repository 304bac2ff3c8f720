"""Phases as data: when each operand begins, and the grid that is full precision until then."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.quant.qparams import dynamic_qparams, from_range
from qdiff_jax.quant.quantizer import fake_quant
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.stages.quantize_phases import Phase, progressive, quantized_from, starts

from . import chain

GROUPS = (("a",), ("b", "c"), ("temb", "proj", "mix"))


def test_groups_begin_one_after_the_other_and_products_last():
    begins = starts(progressive(GROUPS, 3), chain.plan(1, 4))
    assert begins["a/conv:weight"] == begins["a/conv:input"] == 0
    assert begins["b/conv:weight"] == begins["c/conv:input"] == 3
    assert begins["temb/dense_1:weight"] == begins["mix/conv:weight"] == 6
    assert begins["a/qk:q"] == begins["c/qk:k"] == 9
    assert set(starts(progressive(GROUPS, 0), chain.plan(1, 4)).values()) == {0}
    assert len(progressive(GROUPS, 1)) == len(GROUPS) + 1


def test_weights_alone_need_no_phase_for_products():
    phases = (Phase(5, tuple(name for group in GROUPS for name in group)),)
    assert set(starts(phases, chain.plan(1, None)).values()) == {5}


def test_a_block_without_a_phase_or_with_two_is_refused():
    with pytest.raises(ValueError, match="mix/conv:input is planned and no phase quantizes it"):
        starts(progressive((("temb", "proj"), ("a", "b", "c")), 1), chain.plan(1, 4))
    with pytest.raises(ValueError, match="Block 'a' is in two phases"):
        starts((*progressive(GROUPS, 1), Phase(9, ("a",))), chain.plan(1, 4))
    with pytest.raises(ValueError, match="a/qk:q is planned and no phase"):
        starts(progressive(GROUPS, 1)[:-1], chain.plan(1, 4))


@pytest.mark.parametrize(
    ("spec", "codes", "ends"),
    [
        (QuantSpec(), (0, 15), (-0.3, 4.0)),
        (QuantSpec(symmetric=True), (0, 255), (0.0, 1.0)),
        (QuantSpec(granularity="channel"), (0, 3), (-np.ones(6), 2 * np.ones(6))),
        (QuantSpec(granularity="split", boundary=2), (0, 15), (-np.ones(2), np.float32([1, 9]))),
    ],
)
def test_before_its_step_an_operand_is_in_full_precision(spec, codes, ends):
    grid = from_range(spec, *(np.float32(e) for e in ends), *codes)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)), jnp.float32)

    @jax.jit
    def at(begun):
        value = lambda x: fake_quant(quantized_from(grid, begun), x)  # noqa: E731
        return value(x), jax.grad(lambda x: jnp.sum(value(x)))(x)

    before, slope = at(False)
    np.testing.assert_allclose(before, x, atol=1e-6 * float(np.max(grid.scale) * (codes[1] + 1)))
    np.testing.assert_allclose(slope, 1.0, rtol=1e-6)
    np.testing.assert_array_equal(at(True)[0], fake_quant(grid, x))


def test_before_its_step_nothing_pulls_at_the_scale():
    grid = from_range(QuantSpec(), -0.3, 4.0, 0, 15)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)), jnp.float32)

    def made(scale, begun):
        return jnp.sum(fake_quant(quantized_from(grid.replace(scale=scale), begun), x) ** 2)

    slope = jax.jit(jax.grad(made))
    assert float(slope(grid.scale, False)) == 0.0
    assert float(slope(grid.scale, True)) != 0.0


def test_a_grid_without_a_fine_form_is_refused():
    for grid in (
        dynamic_qparams(QuantSpec(dynamic=True), 0, 15),
        from_range(QuantSpec(grid="log2"), 0.0, 1.0, 0, 15),
    ):
        with pytest.raises(ValueError, match="cannot be widened to full precision"):
            quantized_from(grid, jnp.asarray(True))
