"""Bits by step: the rule of the allocation, and the same range on another number of codes."""

import numpy as np
import pytest

from qdiff_jax.policy import ACTIVATION, ALWAYS_ZERO, Entry, SitePlan
from qdiff_jax.quant.qparams import dynamic_qparams, from_range
from qdiff_jax.quant.quantizer import fake_quant
from qdiff_jax.quant.spec import QuantSpec, code_range
from qdiff_jax.quant.timed import from_ranges, select, step_context
from qdiff_jax.stages.step_bits import (
    TARGET_RULE,
    allocate_bits,
    forward_snr,
    target_entries,
    with_step_bits,
)

STEPS = np.float32([0.0, 300.0, 900.0])


def test_fewest_bits_whose_ratio_exceeds_the_forward_process():
    snr = {8: [50.0, 50.0, 50.0, 50.0], 4: [5.0, 5.0, 5.0, 5.0], 6: [20.0, 20.0, 20.0, 20.0]}
    np.testing.assert_array_equal(allocate_bits(snr, [1.0, 5.0, 30.0, 9999.0]), [4, 6, 8, 8])
    with pytest.raises(ValueError, match="at least one width"):
        allocate_bits({}, [1.0])


def test_a_wider_quantizer_that_does_worse_is_not_asked_for_more():
    """The fewest sufficient bits, even where the ratio is not monotone in the bits."""
    assert allocate_bits({4: [3.0], 5: [0.5], 8: [9.0]}, [1.0]) == [4]


def test_noisy_steps_get_fewer_bits_than_clean_ones():
    alpha_bar = np.linspace(0.999, 0.001, 20)
    forward = forward_snr(alpha_bar)
    np.testing.assert_allclose(forward, alpha_bar / (1 - alpha_bar))
    # The ratio of a uniform quantizer: 6 dB a bit.
    bits = allocate_bits({b: np.full(20, 4.0**b / 64) for b in range(4, 9)}, forward)
    assert (np.diff(bits) <= 0).all()
    assert bits[0] > bits[-1] == 4


@pytest.mark.parametrize("spec", [ACTIVATION, ALWAYS_ZERO], ids=["affine", "always zero"])
@pytest.mark.parametrize("tabled", [False, True])
def test_the_range_stays_and_the_codes_change_with_the_step(spec, tabled):
    lo, hi = (0.0, 3.0) if spec.symmetric else (-1.0, 3.0)
    rows = np.ones(3, np.float32)
    held = from_range(spec, lo, hi, 0, 255)
    if tabled:
        held = from_ranges(spec, lo * rows, hi * rows, 0, 255, STEPS, rule="step")
    table = with_step_bits(held, [8, 6, 4], STEPS)
    # No multiples of half a step, which may go either way.
    x = np.random.default_rng(0).uniform(lo, hi, 20_000).astype(np.float32)
    for j, bits in enumerate([8, 6, 4]):
        row = select(table, step_context(STEPS[j], j))
        np.testing.assert_allclose(row.scale, (hi - lo) / (2**bits - 1), rtol=1e-5)
        assert (int(row.qmin), int(row.qmax)) == code_range(spec, bits)
        found = np.unique(fake_quant(row, x))
        assert len(found) == 2**bits
        wanted = from_range(spec, lo, hi, *code_range(spec, bits))
        np.testing.assert_allclose(fake_quant(row, x), fake_quant(wanted, x), atol=1e-5)


@pytest.mark.parametrize("tabled", [False, True])
def test_both_parts_of_a_split_tensor_keep_their_ranges(tabled):
    spec = QuantSpec(granularity="split", axis=-1, boundary=2)
    lo, hi = np.float32([-1.0, -8.0]), np.float32([3.0, 8.0])
    held = from_range(spec, lo, hi, 0, 255)
    if tabled:
        rows = np.ones((3, 1), np.float32)
        held = from_ranges(spec, lo * rows, hi * rows, 0, 255, STEPS, rule="step")
    table = with_step_bits(held, [8, 6, 4], STEPS)
    x = np.random.default_rng(0).uniform(-8, 8, (50, 5)).astype(np.float32)
    for j, bits in enumerate([8, 6, 4]):
        row = select(table, step_context(STEPS[j], j))
        wanted = from_range(spec, lo, hi, *code_range(spec, bits))
        np.testing.assert_allclose(fake_quant(row, x), fake_quant(wanted, x), atol=1e-4)


def test_what_has_no_calibrated_range_is_refused():
    dynamic = dynamic_qparams(QuantSpec(dynamic=True), 0, 255)
    with pytest.raises(ValueError, match="block/op:input .* one calibrated"):
        with_step_bits(dynamic, [8, 8, 8], STEPS, "block/op:input")
    other = from_ranges(ACTIVATION, -np.ones(2), np.ones(2), 0, 255, [0.0, 5.0], rule="step")
    with pytest.raises(ValueError, match="other steps"):
        with_step_bits(other, [8, 8, 8], STEPS)
    ends = SitePlan((Entry("conv", "input", 8, ACTIVATION, "first layer at 8 bits"),))
    with pytest.raises(ValueError, match="this plan has none"):
        target_entries(ends)
    both = SitePlan((*ends.entries, Entry("mid", "input", 4, ACTIVATION, TARGET_RULE)))
    assert [e.site for e in target_entries(both)] == ["mid"]
    split = SitePlan((*ends.entries, Entry("up", "input", 4, ACTIVATION, f"{TARGET_RULE}, split")))
    assert [e.site for e in target_entries(split)] == ["up"]
