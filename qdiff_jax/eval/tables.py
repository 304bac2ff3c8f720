"""The comparison as tables: which columns there are, what they mean, how a number is written.

The terminal, report.md and report.html show the same cells. Every function takes the records that
`report.check_variants` returns, in which a null number whose key is in the record's `nonfinite` map
was nan or inf.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

ABSENT = "\u2013"  # not measured
Variant = Mapping[str, Any]


class Column(NamedTuple):
    header: str
    unit: str  # "" for a pure number
    meaning: str  # one sentence
    cell: Callable[[Variant, Variant], str]  # (variant, reference) -> text

    @property
    def title(self) -> str:
        return f"{self.header} ({self.unit})" if self.unit else self.header


def significant(value: float) -> str:
    """Three significant digits, in scientific notation below 1e-3 and from 1e5 on."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    # One decimal place fewer for every digit before the point.
    places = 2 - math.floor(math.log10(float(f"{abs(value):.2e}")))
    return f"{value:.{max(places, 0)}f}"


def size(count: int) -> str:
    """Bytes in KiB, or in MiB from 1 MiB on."""
    if count < 1024:
        return f"{count} B"
    if count < 1024**2:
        return f"{count / 1024:.1f} KiB"
    return f"{count / 1024**2:.2f} MiB"


def _number(key: str, write: Callable[[float], str]) -> Callable[[Variant, Variant], str]:
    def cell(variant: Variant, reference: Variant) -> str:
        del reference
        if key in variant.get("nonfinite", ()):
            return "diverged"
        return ABSENT if variant[key] is None else write(variant[key])

    return cell


def _psnr(variant: Variant, reference: Variant) -> str:
    if variant["psnr_db"] is None and variant["rollout_mse"] == 0:
        return "exact"
    return _number("psnr_db", lambda value: f"{value:.1f}")(variant, reference)


def _bits(variant: Variant, reference: Variant) -> str:
    del reference
    return f"{variant['w_bits']:g}/{variant['a_bits']:g}"


def _ratio(variant: Variant, reference: Variant) -> str:
    return f"{reference['stored_bytes'] / variant['stored_bytes']:.2f}\u00d7"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


_VARIANT = Column("Variant", "", "The name of the configuration.", lambda v, _: str(v["name"]))
_BITS = Column("Bits", "W/A", "Bits of the weights and of the activations.", _bits)

AGREEMENT = (
    _VARIANT,
    _BITS,
    Column(
        "\u03b5 error",
        "rel. MSE",
        "Squared error of the predicted noise over its squared size, both networks fed the "
        "full-precision trajectory.",
        _number("eps_rel_mse", significant),
    ),
    Column(
        "Rollout",
        "MSE",
        "Mean squared error of the final image when both models sample from the same noise on "
        "their own, for images in [\u22121, 1].",
        _number("rollout_mse", significant),
    ),
    Column(
        "PSNR",
        "dB",
        "The rollout error as a peak signal-to-noise ratio, higher being better.",
        _psnr,
    ),
    Column(
        "Features",
        "ratio",
        "Squared distance of paired images in a classifier's features over the spread of the "
        "full-precision images: 0 is the same, 2 is unrelated.",
        _number("feature_distance", significant),
    ),
    Column(
        "Temporal",
        "1\u2212cos",
        "Cosine distance of the time embeddings that reach the blocks, averaged over timesteps and "
        "blocks.",
        _number("temporal_cosine", significant),
    ),
    Column(
        "Mismatch",
        "%",
        "Share of time embeddings that lie closer to the full-precision embedding of another "
        "timestep than to that of their own.",
        _number("temporal_mismatch", _percent),
    ),
)

COST = (
    _VARIANT,
    _BITS,
    Column(
        "Stored",
        "",
        "Size of the model as stored, scales and zero points included.",
        lambda variant, _: size(variant["stored_bytes"]),
    ),
    Column(
        "Smaller",
        "",
        "How many times smaller it is than the full-precision model.",
        _ratio,
    ),
    Column(
        "Calibrate",
        "s",
        "Wall time spent measuring ranges.",
        _number("calibrate_s", significant),
    ),
    Column(
        "Reconstruct",
        "s",
        "Wall time spent learning how to round the weights.",
        _number("reconstruct_s", significant),
    ),
    Column(
        "Compile",
        "s",
        "Time spent compiling, reported apart since a warm cache removes it.",
        _number("compile_s", significant),
    ),
)

TABLES = (("Agreement with full precision", AGREEMENT), ("Cost", COST))


def rows(
    columns: Sequence[Column], variants: Sequence[Variant], reference: Variant
) -> list[list[str]]:
    """The cells of a table, a list for every variant in the order given."""
    return [[column.cell(variant, reference) for column in columns] for variant in variants]


def terminal(variants: Sequence[Variant], reference: Variant) -> Group:
    """Both tables for a rich console; each fits 80 characters with names of up to 15."""
    tables = []
    for title, columns in TABLES:
        table = Table(
            title=title,
            box=box.SIMPLE_HEAD,
            title_justify="left",
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for index, column in enumerate(columns):
            header = f"{column.header}\n{column.unit}" if column.unit else column.header
            table.add_column(header, justify="right" if index else "left", no_wrap=True)
        for row in rows(columns, variants, reference):
            table.add_row(*map(Text, row))  # as text: a name may hold rich's markup
        tables.append(table)
    return Group(*tables)


def markdown(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> str:
    """One table as GitHub's Markdown, followed by what its columns mean."""

    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    rule = ["---", *["---:"] * (len(columns) - 1)]
    table = [line([column.title for column in columns]), line(rule), *map(line, cells)]
    meanings = [f"- **{column.header}**: {column.meaning}" for column in columns]
    return "\n".join([*table, "", *meanings])
