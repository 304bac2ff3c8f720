"""tables: how numbers are written."""

import pytest

from qdiff_jax.eval import tables


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (5.3e-6, "5.30e-6"),
        (0.000999, "9.99e-4"),
        (0.00153, "0.00153"),
        (0.31, "0.310"),
        (0.9996, "1.00"),
        (45.21, "45.2"),
        (9.999, "10.0"),
        (612.3, "612"),
        (99999, "99999"),
        (1e5, "1.00e5"),
        (-0.25, "-0.250"),
    ],
)
def test_three_significant_digits(value, text):
    assert tables.significant(value) == text


def test_sizes():
    written = [tables.size(n) for n in (1, 1023, 1024, 1536, 1024**2, 143_000_000)]
    assert written == ["1 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.00 MiB", "136.38 MiB"]


def test_every_column_is_explained_in_one_sentence():
    for _, columns in tables.TABLES:
        for column in columns:
            assert column.meaning.endswith(".")
            assert ". " not in column.meaning
