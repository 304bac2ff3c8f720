"""Binary weights: errors and gradients of the specification, the switch between two bases and one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.export.bundle import load_bundle, save_bundle
from qdiff_jax.export.qtensor import codes, dequantize, from_codes
from qdiff_jax.policy import BINARY_WEIGHT
from qdiff_jax.quant import quantizer
from qdiff_jax.quant.binary import (
    BinaryWeight,
    binary_sign,
    binary_weight,
    second_basis,
    single_basis,
)
from qdiff_jax.quant.qparams import from_range
from qdiff_jax.quant.ranges import METHODS, weight_qparams
from qdiff_jax.quant.spec import QuantSpec, code_range
from qdiff_jax.sites import SiteQuant, kernel_of
from qdiff_jax.stages.stage import fold_weights

PER_TENSOR = QuantSpec(grid="binary")
# Around 0, both bounds of the clipped identity, and residuals beyond them.
GRID = np.float32([-2.5, -1.2, -1.0, -0.9, -0.5, -1e-6, 0.0, 1e-6, 0.3, 0.8, 1.0, 1.1, 1.9, 2.4])


def draws(name, size=400_000):
    rng = np.random.default_rng(0)
    return getattr(rng, name)(size=size).astype(np.float32)[:, None]


def made(w, gate=1.0, on=True, second=True, spec=PER_TENSOR):
    grid = single_basis(w, spec)
    held = second_basis(w, grid) if second else None
    return BinaryWeight(grid.scale, held, jnp.float32(gate), jnp.asarray(on))


def error(w, w_hat):
    return float(
        np.sum((np.asarray(w_hat, np.float64) - w) ** 2) / np.sum(w.astype(np.float64) ** 2)
    )


@pytest.mark.parametrize(
    ("name", "one", "two"), [("standard_normal", 0.3634, 0.1307), ("laplace", 0.4998, 0.2291)]
)
def test_relative_errors_of_one_and_of_two_bases(name, one, two):
    """1 - 2 / pi for one basis of a Gaussian; the others of the specification."""
    w = draws(name)
    assert error(w, quantizer.fake_quant(single_basis(w, PER_TENSOR), w)) == pytest.approx(
        one, abs=2e-3
    )
    assert error(w, binary_weight(made(w), w)) == pytest.approx(two, abs=2e-3)
    if name == "standard_normal":
        assert float(made(w).first) == pytest.approx(0.798, abs=2e-3)
        assert float(made(w).second) == pytest.approx(0.4825, abs=2e-3)


def test_the_scale_is_the_mean_magnitude_of_its_channel_by_any_method():
    w = np.random.default_rng(1).standard_normal((3, 3, 4, 5)).astype(np.float32)
    expected = np.abs(w).reshape(-1, 5).mean(0)
    for method in METHODS:
        grid = weight_qparams(w, BINARY_WEIGHT, 1, method=method)
        np.testing.assert_allclose(grid.scale, expected, rtol=1e-6)
        assert grid.spec == BINARY_WEIGHT
    # The one of least squared error for a sign.
    best = [error(w, f * np.asarray(grid.scale) * np.sign(w)) for f in (0.97, 1.0, 1.03)]
    assert best[1] == min(best)


def test_the_sign_of_zero_is_plus_one_and_nan_stays():
    signs = np.asarray(binary_sign(jnp.float32([-2.0, -0.0, 0.0, 1e-9, np.nan])))
    np.testing.assert_array_equal(signs, [-1.0, 1.0, 1.0, 1.0, np.nan])


def test_the_gradient_of_the_sign_is_the_clipped_identity():
    slope = jax.vmap(jax.grad(binary_sign))(jnp.asarray(GRID))
    np.testing.assert_array_equal(slope, np.abs(GRID) <= 1)


def test_gradients_of_two_bases_are_those_of_the_specification():
    """sign(w) (1 - s2 1{|r| <= 1}); sign(r); s1 1{|w| <= 1} + s2 1{|r| <= 1} (1 - s1 1{|w| <= 1})."""
    first, second = np.float32(0.8), np.float32(0.45)

    def value(w, first, second):
        return binary_weight(BinaryWeight(first, second, jnp.float32(1), jnp.asarray(True)), w)

    by_w, by_first, by_second = jax.vmap(jax.grad(value, (0, 1, 2)), (0, None, None))(
        GRID, jnp.asarray(first), jnp.asarray(second)
    )
    sign = np.where(GRID >= 0, np.float32(1), np.float32(-1))
    rest = GRID - first * sign
    sign_rest = np.where(rest >= 0, np.float32(1), np.float32(-1))
    near, near_rest = np.abs(GRID) <= 1, np.abs(rest) <= 1
    assert near_rest.any() and not near_rest.all()  # noqa: PT018
    np.testing.assert_allclose(by_first, sign * (1 - second * near_rest), rtol=1e-6)
    np.testing.assert_array_equal(by_second, sign_rest)
    expected = first * near + second * near_rest * (1 - first * near)
    np.testing.assert_allclose(by_w, expected, rtol=1e-6)


@pytest.mark.parametrize("spec", [PER_TENSOR, BINARY_WEIGHT])
def test_a_closed_gate_is_one_basis_bit_for_bit(spec):
    w = np.random.default_rng(2).standard_normal((3, 3, 4, 6)).astype(np.float32)

    @jax.jit
    def value_and_slopes(binary):
        def total(first, w):
            made = binary_weight(binary.replace(first=first), w)
            return jnp.sum(made * w), made

        slopes, made = jax.grad(total, (0, 1), has_aux=True)(binary.first, jnp.asarray(w))
        return made, *slopes

    closed, alone = made(w, gate=0.0, spec=spec), made(w, second=False, spec=spec)
    zero = made(w, spec=spec)
    zero = zero.replace(second=jnp.zeros_like(zero.second))
    fake = quantizer.fake_quant(single_basis(w, spec), w)
    one = value_and_slopes(alone)
    np.testing.assert_array_equal(one[0], fake)
    np.testing.assert_array_equal(value_and_slopes(zero)[0], fake)
    for a, b in zip(value_and_slopes(closed), one, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(value_and_slopes(made(w, spec=spec))[0], fake)


def test_a_weight_that_is_not_on_yet_is_itself():
    w = jnp.asarray(GRID[:, None])
    off = made(GRID[:, None], on=False)
    np.testing.assert_array_equal(binary_weight(off, w), w)
    slope = jax.grad(lambda b: binary_weight(off.replace(first=b), w).sum())(off.first)
    assert float(slope) == 0.0


def test_the_grid_has_one_bit_and_no_zero():
    w = np.random.default_rng(3).standard_normal((5, 4)).astype(np.float32)
    w[0, 0] = 0.0
    grid = single_basis(w, BINARY_WEIGHT)

    @jax.jit
    def everything(w):
        held, w_hat = quantizer.codes(grid, w), quantizer.fake_quant(grid, w)
        slope = jax.grad(lambda w: quantizer.fake_quant(grid, w).sum())(w)
        again = quantizer.fake_quant(grid, w_hat)
        return held, w_hat, quantizer.dequantize(grid, held), again, slope

    held, w_hat, decoded, again, slope = jax.device_get(everything(w))
    np.testing.assert_array_equal(held, w >= 0)
    np.testing.assert_array_equal(decoded, w_hat)
    np.testing.assert_array_equal(again, w_hat)
    np.testing.assert_array_equal(np.abs(w_hat), np.broadcast_to(grid.scale, w.shape))
    np.testing.assert_allclose(slope, np.asarray(grid.scale) * (np.abs(w) <= 1), rtol=1e-6)
    w[1, 1] = np.nan
    assert np.isnan(everything(w)[1][1, 1])


def test_eight_codes_lie_in_a_byte_and_come_back():
    w = np.random.default_rng(4).standard_normal((3, 3, 5, 7)).astype(np.float32)
    grid = single_basis(w, BINARY_WEIGHT)
    held = quantizer.codes(grid, w)
    tensor = from_codes(held, grid, 1)
    assert (tensor.data.dtype, tensor.data.shape) == (np.uint8, (-(-45 // 8), 7))
    np.testing.assert_array_equal(codes(tensor), held)
    np.testing.assert_array_equal(dequantize(tensor), quantizer.fake_quant(grid, w))


def test_every_form_of_a_site_gives_one_kernel_and_a_bundle_takes_the_decided_one(tmp_path):
    w = np.random.default_rng(5).standard_normal((6, 4)).astype(np.float32)
    grid, params = single_basis(w, BINARY_WEIGHT), {"layer": {"kernel": jnp.asarray(w)}}
    tensor = from_codes(quantizer.codes(grid, w), grid, 1)
    fake = made(w, second=False, spec=BINARY_WEIGHT)
    wanted = np.asarray(quantizer.fake_quant(grid, w))
    for rhs in (grid, tensor, fake):
        np.testing.assert_array_equal(kernel_of(rhs, lambda: jnp.asarray(w)), wanted)
        folded, left = fold_weights(params, {"layer": SiteQuant(rhs=rhs)})
        np.testing.assert_array_equal(folded["layer"]["kernel"], wanted)
        assert left == {}

    def save(name, rhs):
        return save_bundle(
            tmp_path / name,
            params=params,
            quant={"layer": SiteQuant(rhs=rhs)},
            plan_json=[],
            model_config={"family": "none"},
            schedule_config={},
            sampler_config={},
            source={"sha256": "0"},
        )

    loaded = load_bundle(save("decided", tensor))
    back = loaded.quant["layer"].rhs
    assert loaded.params == {"layer": {}}
    assert (back.bits, back.shape, back.qparams.spec) == (1, (6, 4), BINARY_WEIGHT)
    np.testing.assert_array_equal(back.data, tensor.data)
    np.testing.assert_array_equal(dequantize(back), wanted)
    with pytest.raises(TypeError, match="BinaryWeight, which a bundle cannot hold: finish it"):
        save("open", fake)


@pytest.mark.parametrize(
    "fields",
    [
        {"signed": True},
        {"dynamic": True},
        {"granularity": "token"},
        {"granularity": "split", "axis": -2, "boundary": 2},
    ],
)
def test_a_binary_grid_of_another_kind_is_refused(fields):
    with pytest.raises(ValueError, match="grid 'binary' holds the codes 0 and 1"):
        QuantSpec(grid="binary", **fields)


def test_what_has_no_binary_form_is_refused():
    with pytest.raises(ValueError, match="the grid 'binary' has 1 bit, not 4"):
        code_range(BINARY_WEIGHT, 4)
    assert code_range(BINARY_WEIGHT, 1) == (0, 1)
    with pytest.raises(ValueError, match="do not follow from a range.*quant.binary"):
        from_range(BINARY_WEIGHT, -np.ones(3), np.ones(3), 0, 1)
    with pytest.raises(ValueError, match="empty or holds NaN"):
        single_basis(np.float32([[np.nan, 1.0]]), BINARY_WEIGHT)
    with pytest.raises(ValueError, match="makes the grid 'binary', not 'affine'"):
        single_basis(np.ones((2, 2)), QuantSpec())
