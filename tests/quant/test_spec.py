"""QuantSpec refuses contradictions when it is made; code_range gives every published set."""

import pytest

from qdiff_jax.quant.spec import QuantSpec, code_range


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": "fp7"}, "grid"),
        ({"granularity": "row"}, "granularity"),
        ({"axis": 0}, "negative"),
        ({"granularity": "group"}, "group"),
        ({"group": 4}, "granularity='group'"),
        ({"granularity": "group", "group": 0}, "positive"),
        ({"zero_code": True}, "log grids"),
        ({"grid": "log2", "signed": True}, "signed=False"),
        ({"granularity": "cell", "dynamic": True}, "dynamic=False"),
        ({"narrow": True}, "narrow is for signed codes"),
    ],
)
def test_contradictory_fields_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(**fields)


def test_token_is_dynamic_whatever_was_said_so_equal_specs_hash_equal():
    assert QuantSpec(granularity="token") == QuantSpec(granularity="token", dynamic=True)
    assert len({QuantSpec(granularity="token"), QuantSpec(granularity="token", dynamic=True)}) == 1


def test_code_ranges():
    unsigned, signed = QuantSpec(), QuantSpec(signed=True)
    assert code_range(unsigned, 4) == (0, 15)
    assert code_range(signed, 4) == (-8, 7)
    assert code_range(signed, 4, narrow=True) == (-7, 7)
    assert code_range(QuantSpec(signed=True, narrow=True), 4) == (-7, 7)
    assert code_range(signed, 1) == (-1, 0)  # asymmetric: the shifted storage of 1 bit


@pytest.mark.parametrize(
    ("spec", "bits", "narrow"),
    [
        (QuantSpec(), 0, False),
        (QuantSpec(), 2.5, False),
        (QuantSpec(), True, False),
        (QuantSpec(), 4, True),
        (QuantSpec(signed=True, symmetric=True), 1, False),
        (QuantSpec(signed=True), 1, True),
    ],
)
def test_unusable_codes_raise(spec, bits, narrow):
    with pytest.raises(ValueError, match="bit|narrow"):
        code_range(spec, bits, narrow)
