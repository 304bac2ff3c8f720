"""claims.md and claims.json: every claim over its seeds, its verdict, and the figure that was published."""

from __future__ import annotations

import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.claim_runs import MARGIN, Claim
from qdiff_jax.eval.files import write_atomic
from qdiff_jax.eval.tables import ABSENT, significant
from qdiff_jax.eval.verdicts import (
    DISAGREE,
    HOLDS,
    NO_EFFECT,
    NOT_SHOWN,
    ONE_SEED,
    REVERSED,
    Effect,
    over_seeds,
    verdict,
)

OTHER_ERRORS = {
    "rollout_about_shift": "rollout error about a common shift",
    "eps_rel_mse": "eps error",
    "temporal_cosine": "temporal features",
}
DIVERGED, NO_RESULT = "diverged", "no result"
_AIMS = {
    "error": "",
    "no_worse": f"; no worse than {MARGIN - 1:.0%}",
    "cheaper": f"; no worse than {MARGIN - 1:.0%}, at fewer BitOps",
    "spread": "; variance of x_0 nearer to full precision's",
}


def assemble(
    claims: Sequence[Claim],
    rows: Mapping[tuple[str, str], list[dict]],
    config: ConfigDict,
    out: pathlib.Path,
    command: str,
) -> pathlib.Path:
    """Write the ledger of the claims that have rows; returns the path of claims.md.

    rows: {(model, name): rows of the claim's seeds that are there}.
    """
    made: dict[tuple[str, str], dict] = {}
    for claim in claims:
        seen = rows[claim.model, claim.name]
        if seen:
            made[claim.model, claim.name] = over(claim, seen)
    for claim in claims:
        parts = [made.get((claim.model, name)) for name in claim.of]
        if parts and any(parts):
            made[claim.model, claim.name] = every(claim, dict(zip(claim.of, parts, strict=True)))
    order = [(claim.model, claim.name) for claim in claims]
    kept = [made[key] for key in order if key in made]
    write_atomic(out / "claims.json", json.dumps(kept, indent=1) + "\n")
    return write_atomic(out / "claims.md", _page(kept, len(claims), config, command))


def over(claim: Claim, rows: Sequence[dict]) -> dict[str, Any]:
    """A claim over its seeds: verdict, ratios with intervals, commits of the runs."""
    whole = [row for row in rows if not row["why"]]
    effects = [Effect(**row["effect"]) for row in whole]
    found = {
        **{key: getattr(claim, key) for key in ("model", "name", "group", "method", "part")},
        **{key: getattr(claim, key) for key in ("bits", "aim", "published")},
        "seeds": [row["seed"] for row in whole],
        "seeds_asked": claim.seeds,
        "effects": [effect._asdict() for effect in effects],
        "commits": sorted({commit for row in whole for commit in row["commits"]}),
        "why": [f"seed {row['seed']}, {row['why']}" for row in rows if row["why"]],
        "shift_shares": [row.get("shift_shares") for row in whole],
        "rollout": _interval([effect.ratio for effect in effects]),
    }
    for key in OTHER_ERRORS:
        values = [row[key] for row in whole if row.get(key) is not None]
        found[key] = {**_interval(values), "seeds": len(values)} if values else None
    if claim.aim == "cheaper":
        found["bitops"] = [row["bitops"] for row in whole]
    if found["why"]:
        broken = any(row["why"] and row["diverged"] for row in rows)
        return {**found, "verdict": DIVERGED if broken else NO_RESULT}
    limit = MARGIN if claim.aim in ("no_worse", "cheaper") else 1.0
    said = verdict(effects, limit=limit)
    if said == HOLDS and claim.aim == "cheaper" and any(a >= b for a, b in found["bitops"]):
        said = NOT_SHOWN
    return {**found, "verdict": said}


def every(claim: Claim, parts: Mapping[str, dict | None]) -> dict[str, Any]:
    """A claim that holds where all of others do; `parts` by name, None for one that has not been run."""
    lacking = [name for name, part in parts.items() if part is None]
    there = {name: part for name, part in parts.items() if part is not None}
    said = {part["verdict"] for part in there.values()}
    against = [name for name, part in there.items() if part["verdict"] == REVERSED]
    if against:  # one is enough
        found = REVERSED
    elif lacking:
        found = NOT_SHOWN
    else:
        order = (DIVERGED, NO_RESULT, ONE_SEED, DISAGREE, NO_EFFECT, NOT_SHOWN, HOLDS)
        found = next(word for word in order if word in said)
    worst = max(
        (part for part in there.values() if part["rollout"]["ratio"] is not None),
        key=lambda part: part["rollout"]["ratio"],
        default=None,
    )
    words = {
        "reversed by": against,
        "not run": lacking,
        "not shown for": [n for n, p in there.items() if p["verdict"] not in (HOLDS, REVERSED)],
    }
    notes = [f"{word} {', '.join(names)}" for word, names in words.items() if names]
    return {
        **{key: getattr(claim, key) for key in ("model", "name", "group", "method", "part")},
        **{key: getattr(claim, key) for key in ("bits", "aim", "published")},
        "of": {name: None if part is None else part["verdict"] for name, part in parts.items()},
        "seeds": [] if worst is None else worst["seeds"],
        "seeds_asked": claim.seeds,
        "effects": [],
        "commits": sorted({commit for part in there.values() for commit in part["commits"]}),
        "why": notes,
        # The hardest of them.
        "rollout": _interval([]) if worst is None else worst["rollout"],
        **dict.fromkeys(OTHER_ERRORS),
        "verdict": found,
    }


def _interval(ratios: Sequence[float]) -> dict[str, float | None]:
    if not ratios:
        return {"ratio": None, "low": None, "high": None}
    found = over_seeds(ratios)._asdict()
    return {key: value if value == value else None for key, value in found.items()}  # nan: none


def _cell(found: Mapping[str, Any] | None, seeds: int) -> str:
    if found is None or found["ratio"] is None:
        return ABSENT
    text = significant(found["ratio"])
    if found["low"] is not None:
        text += f" [{significant(found['low'])}, {significant(found['high'])}]"
    used = found.get("seeds", seeds)
    return text if used == seeds else f"{text} ({used} of {seeds} seeds)"


def _page(rows: Sequence[dict], claims: int, config: ConfigDict, command: str) -> str:
    head = ("model", "method", "part", "bits", "rollout error, with / without")
    head += (*OTHER_ERRORS.values(), "seeds", "verdict", "published")
    lines = [_line(head), "|---" * len(head) + "|"]
    for row in rows:
        seeds = len(row["seeds"])
        asked = row["seeds_asked"]
        part = row["part"] + _AIMS[row["aim"]]
        if row.get("bitops"):
            mean = (sum(costs) / len(costs) / 1e9 for costs in zip(*row["bitops"], strict=True))
            part += f" (10^9 BitOps: {' against '.join(map(significant, mean))})"
        # A verdict on some of the seeds is not the last.
        open_still = seeds < asked and row["verdict"] not in (DIVERGED, NO_RESULT)
        said = f"**{row['verdict']}**" + (" so far" if open_still else "")
        said += f": {'; '.join(row['why'])}" if row["why"] else ""
        # What the part decides (a grid, say) may be what was there without it.
        alike = [set(effect.values()) == {1.0} for effect in row["effects"]]
        said += ": both sides give the same errors" if alike and all(alike) else ""
        cells = [row["model"], row["method"], part, row["bits"], _cell(row["rollout"], seeds)]
        cells += [_cell(row[key], seeds) for key in OTHER_ERRORS]
        cells += [str(seeds) if seeds == asked else f"{seeds} of {asked}", said, row["published"]]
        lines.append(_line(cells))
    scale = float(config.guidance_scale)
    parts = [
        "# Claims of the papers, measured here",
        "Ratios below 1 mean that the part lowers the error; of two pairs, that it lowers the first's by more. "
        "In brackets: Student's 95 % interval of the geometric mean over seeds. A verdict asks that this "
        f"interval, and every seed's own over samples, leave 1 out (or {MARGIN}, where the claim is to be no "
        "worse); where there is no effect it comes out one way or the other in at most one of twenty claims. "
        "An error about a common shift leaves out what the errors of all samples have in common, pixel by "
        "pixel (a drift of brightness, say). "
        f"Samples: {config.samples}, guidance: "
        f"{'none' if scale < 0 else significant(scale)}. Claims with results: {len(rows)} of {claims}.",
        _commits(rows),
        "\n".join(lines),
        "## Seed by seed",
        "Ratio of each seed with its 95 % interval over samples, and the share that a shift common to all "
        "samples has in the rollout error of each side.",
        "\n".join(_seeds(rows)),
        f"Made by `{command}` on {platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}.",
    ]
    return "\n\n".join(parts) + "\n"


def _commits(rows: Sequence[dict]) -> str:
    found = sorted({commit for row in rows for commit in row["commits"]})
    if len(found) > 1:
        return (
            f"**MADE BY DIFFERENT CODE: the runs rest on {len(found)} commits, {', '.join(found)}.** Sides "
            "made by unlike code may differ in more than the part; claims.json names each claim's commits."
        )
    return f"Commit of all runs: {', '.join(found) or 'none yet'}."


def _seeds(rows: Sequence[dict]) -> list[str]:
    head = ("model", "claim", "bits", "ratio by seed", "share of a common shift, by side")
    lines = [_line(head), "|---" * len(head) + "|"]
    for row in rows:
        texts = [
            f"{seed}: {significant(e['ratio'])} [{significant(e['low'])}, {significant(e['high'])}]"
            for seed, e in zip(row["seeds"], row["effects"], strict=False)
        ]
        if texts:
            shares = [
                f"{seed}: {' / '.join(f'{share:.2f}' for share in found)}"
                for seed, found in zip(row["seeds"], row["shift_shares"], strict=True)
                if found
            ]
            cells = (row["model"], row["name"], row["bits"], "; ".join(texts))
            lines.append(_line((*cells, "; ".join(shares) or ABSENT)))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
