"""Packing loses nothing, for every byte and every odd size, in NumPy and in JAX alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qdiff_jax.export.pack import field_width, pack, packed_size, unpack

ARRAYS = {"numpy": np.asarray, "jax": jnp.asarray}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS.keys())
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_every_byte_is_reached_and_survives(bits, array):
    every_byte = array(np.arange(256, dtype=np.uint8)[None])
    codes = unpack(every_byte, bits, 8 // bits)
    half = 1 << (bits - 1)
    assert codes.dtype == np.int8
    assert set(np.unique(np.asarray(codes))) == set(range(-half, half))
    assert np.array_equal(np.asarray(pack(codes, bits)), np.asarray(every_byte))


def test_layout_is_even_index_low_nibble_and_two_bit_fields_ascend():
    assert pack(np.array([1, -2, 7]), 4).tolist() == [0xE1, 0x07]
    assert pack(np.array([-2, -1, 0, 1, 1]), 2).tolist() == [0b01_00_11_10, 0b01]
    assert pack(np.array([-128, 127]), 8).dtype == np.int8


@settings(deadline=None, max_examples=30, derandomize=True)
@given(data=st.data(), bits=st.integers(1, 8), size=st.integers(1, 19), columns=st.integers(1, 3))
def test_round_trip_for_any_size(data, bits, size, columns):
    half = 1 << (bits - 1)
    codes = data.draw(hnp.arrays(np.int32, (size, columns), elements=st.integers(-half, half - 1)))
    packed = pack(codes, bits)
    assert packed.nbytes == packed_size(size, bits) * columns
    assert packed_size(size, bits) == int(np.ceil(size * field_width(bits) / 8))
    assert np.array_equal(unpack(packed, bits, size), codes)
    in_jax = pack(jnp.asarray(codes), bits)
    assert in_jax.dtype == packed.dtype
    assert np.array_equal(np.asarray(in_jax), packed)
    assert np.array_equal(np.asarray(unpack(in_jax, bits, size)), codes)


def test_packing_works_under_jit():
    codes = jnp.arange(-8, 7, dtype=jnp.int32)
    back = jax.jit(lambda c: unpack(pack(c, 4), 4, 15))(codes)
    assert np.array_equal(np.asarray(back), np.asarray(codes))


@pytest.mark.parametrize("bits", [0, 9, 4.0])
def test_impossible_widths_are_refused(bits):
    with pytest.raises(ValueError, match="codes of 1 to 8 bits"):
        pack(np.zeros((2,), np.int32), bits)


@pytest.mark.parametrize("bad", [8, -9])
def test_codes_outside_the_bits_are_refused(bad):
    with pytest.raises(ValueError, match=r"outside -8\.\.7"):
        pack(np.array([0, bad]), 4)


def test_floats_and_wrong_storage_are_refused():
    with pytest.raises(TypeError, match="must be integers"):
        pack(np.zeros((2,), np.float32), 4)
    with pytest.raises(ValueError, match="leading axis"):
        pack(np.int32(1), 4)
    with pytest.raises(ValueError, match=r"5 codes of 4 bits pack into uint8 \[3, ...\]"):
        unpack(np.zeros((2,), np.uint8), 4, 5)
    with pytest.raises(ValueError, match="int8"):
        unpack(np.zeros((2,), np.uint8), 8, 2)
