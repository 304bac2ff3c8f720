"""The site plan of a model as a table: what each paper's policy does with every site, and what it comes to.

    python -m experiments.inspect --model=sd-v1-4 --bits=w4a8 --collapse
    python -m experiments.inspect --model=DiT-XL-2-256x256 --policies=common,official:ptq4dit --csv=plan.csv

`--model` is a published architecture (in its real size: shapes alone, no array is made), a shipped model, a
miniature, or a file that `experiments.train` wrote. Markdown to the terminal; `--csv` has every site with the
bits, the granularity and the rule of every policy.
"""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from experiments import command_line
from qdiff_jax.eval.cost import FULL_BITS
from qdiff_jax.eval.files import write_atomic
from qdiff_jax.eval.site_table import (
    SiteRow,
    Totals,
    Treatment,
    architecture_sites,
    collapse,
    site_rows,
    totals,
)
from qdiff_jax.methods.svdquant import SvdQuantConfig
from qdiff_jax.models import registry
from qdiff_jax.models.published import PUBLISHED
from qdiff_jax.named_policies import POLICIES, policy
from qdiff_jax.policy import SitePlan, make_plan
from qdiff_jax.sites import Site
from qdiff_jax.stages.group_grids import group_plan

NOTE = (
    "Bits are those of weight/input, q/k, or softmax/v; 32 is full precision. Sizes in MB (1e6 bytes): kernels "
    "at their bits, everything else in float32; scales and zero points apart. BitOps are multiply-accumulates "
    "times the bits of both operands, of one evaluation on one sample (guidance takes two), in T (1e12); "
    '"of layers" leaves out the products of attention. "Kept" counts convolutions and dense layers with a '
    "full-precision operand."
)


def config_of(name: str) -> Any:
    """The family's config of a published, shipped or miniature model, or of a weights file.

    Raises ValueError for an unknown name, listing those there are.
    """
    if name in PUBLISHED:
        return PUBLISHED[name].network
    if name in registry.names() or name.endswith(".safetensors"):
        return registry.load(name).model.module.config
    near = difflib.get_close_matches(name, [*PUBLISHED, *registry.names()], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"--model={name} is unknown; there are {', '.join(registry.names())}; of the published, "
        f"{', '.join(PUBLISHED)}; or give a .safetensors file.{hint}"
    )


def parse_bits(text: str) -> tuple[int | None, int | None]:
    """ "w4a8" as (4, 8), with None for 32. Raises ValueError for what is none."""
    match = re.fullmatch(r"w(\d+)a(\d+)", text)
    bits = tuple(map(int, match.groups())) if match else ()
    if not match or any(b not in (*range(1, 9), FULL_BITS) for b in bits) or bits[1] == 1:
        raise ValueError(
            f"--bits={text} must be like w4a8: weights 1 to 8 (1: binary), activations 2 to 8, or 32."
        )
    return tuple(None if b == FULL_BITS else b for b in bits)


def plans_of(
    sites: Sequence[Site], names: Sequence[str], bits: tuple[int | None, int | None]
) -> tuple[dict[str, SitePlan], list[str]]:
    """The plans of the policies named, and what those say that cannot be used here.

    names: ["all"] for every policy, of which those that do not fit are left out and reported; a policy
    asked for by name raises its ValueError.
    """
    every = list(names) == ["all"]
    plans, refused = {}, []
    for name in POLICIES if every else names:
        try:
            plans[name] = _as_run(name, sites, make_plan(sites, policy(name, sites, *bits)))
        except ValueError as error:
            if not every:
                raise
            refused.append(str(error))
    return plans, refused


def _as_run(name: str, sites: Sequence[Site], plan: SitePlan) -> SitePlan:
    """The plan with the grids of its method, where that has its own: SVDQuant's groups, adapted where they do
    not divide."""
    if name != "official:svdquant":
        return plan
    config = SvdQuantConfig()
    return group_plan(plan, sites, config.group, misfit="adapt", unsigned=config.unsigned)[0]


def short(name: str) -> str:
    return name.removeprefix("official:")


def site_table(rows: Sequence[SiteRow], outside: int) -> str:
    """Markdown: the first policy in full, of the others the bits. outside: parameters of no site."""
    first, *others = rows[0].treated
    grouped = any(row.times > 1 for row in rows)
    header = ["site", *(["times"] if grouped else []), "operator", "shape", "parameters", "MACs"]
    header += [f"{short(first)}: bits", "granularity", *map(short, others), "rule"]
    lines = []
    for row in rows:
        t = row.treated[first]
        line = [row.site, *([str(row.times)] if grouped else []), row.operator, row.shape]
        line += [f"{row.parameters:,}" if row.parameters else "", f"{row.macs:,}"]
        line += [bits_cell(t), _pair(t.granularity)]
        lines.append([*line, *(bits_cell(row.treated[o]) for o in others), _pair(t.rule)])
    rest = {"site": "norms, embeddings, tables", "parameters": f"{outside:,}"}
    lines.append([rest.get(name, "") for name in header])
    return aligned(header, lines, left=("site", "operator", "shape", "granularity", "rule"))


def totals_table(found: Mapping[str, Totals], full: Totals) -> str:
    """Markdown: a row for full precision and for each policy."""
    header = ["policy", "parameters", "quantized", "kept", "size (MB)", "smaller", "scales (MB)"]
    header += ["TBitOps", "fewer", "of layers"]
    lines = []
    for name, t in {"full precision": full, **found}.items():
        lines.append(
            [
                name,
                f"{t.parameters:,}",
                f"{t.quantized:,}",
                str(t.unquantized),
                f"{t.size / 1e6:.2f}",
                f"{full.size / t.size:.2f}x",
                f"{t.scales / 1e6:.2f}",
                f"{t.bitops / 1e12:.4g}",
                f"{full.bitops / t.bitops:.1f}x",
                f"{t.layer_bitops / 1e12:.4g}",
            ]
        )
    return aligned(header, lines, left=("policy",))


def aligned(header: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[str]) -> str:
    """A Markdown table whose columns line up in a terminal, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

    def line(cells):
        padded = (
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(header, cells, widths, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = (
        "-" * (width + 2) if name in left else "-" * (width + 1) + ":"
        for name, width in zip(header, widths, strict=True)
    )
    return "\n".join([line(header), f"|{'|'.join(rule)}|", *map(line, lines)])


def bits_cell(treatment: Treatment) -> str:
    return "/".join(map(str, treatment.bits))


def _pair(words: Sequence[str]) -> str:
    """Both operands' words, once where they are the same."""
    return " / ".join(dict.fromkeys(word or "-" for word in words))


def as_csv(rows: Sequence[SiteRow]) -> str:
    """A line for every site; for each policy and operand its bits, granularity and rule."""
    names = list(rows[0].treated)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields = ("bits", "granularity", "rule")
    sides = ("first", "second")
    writer.writerow(
        ["site", "times", "operator", "operands", "shape", "parameters", "macs"]
        + [f"{name} {side} {field}" for name in names for side in sides for field in fields]
    )
    for row in rows:
        held = [part[i] for name in names for i in range(2) for part in row.treated[name]]
        writer.writerow(
            [row.site, row.times, row.operator, "/".join(row.operands), row.shape]
            + [row.parameters, row.macs, *held]
        )
    return text.getvalue()


def describe(name: str, bits: str, names: Sequence[str], grouped: bool) -> tuple[str, str]:
    """The tables of a model as (Markdown, CSV)."""
    config, targets = config_of(name), parse_bits(bits)
    sites = architecture_sites(config)
    plans, refused = plans_of(sites, names, targets)
    full = totals(config, sites, plans_of(sites, ["common"], (None, None))[0]["common"])
    rows = site_rows(config, plans)
    rows = collapse(rows) if grouped else rows
    parts = [
        f"# {name} at {bits}",
        site_table(rows, full.parameters - sum(row.parameters for row in rows)),
        totals_table({n: totals(config, sites, plan) for n, plan in plans.items()}, full),
        *(f"Left out: {reason}" for reason in refused),
        NOTE,
    ]
    return "\n\n".join(parts) + "\n", as_csv(rows)


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    args = flags.FLAGS
    text, table = describe(args.model, args.bits, args.policies, args.collapse)
    print(text)
    if args.csv:
        write_atomic(args.csv, table)


if __name__ == "__main__":
    flags.DEFINE_string("model", "unet_fashion", "Name of a model, or a .safetensors file.")
    flags.DEFINE_string("bits", "w4a8", "Target bits of weights and activations.")
    flags.DEFINE_list("policies", ["all"], "Policies, the first one in full; all for every one.")
    flags.DEFINE_bool("collapse", False, "Equal sites of blocks that differ in numbers as one row.")
    flags.DEFINE_string("csv", None, "Write the table as CSV, too.")
    command_line.run(main)
