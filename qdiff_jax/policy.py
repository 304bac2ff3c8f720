"""Which operand of which site is quantized, how, and by which rule: rules -> `SitePlan`.

A rule names sites by a shell-style pattern and operands by their role; the first rule that takes an
operand wins. A rule that takes nothing is an error: a misspelt pattern must not silently leave a
layer in full precision. The policies that have a name are in `named_policies`.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Sequence

from qdiff_jax.quant.spec import QuantSpec, code_range
from qdiff_jax.sites import Site

WEIGHT = QuantSpec(granularity="channel", axis=-1)
BINARY_WEIGHT = QuantSpec(grid="binary", granularity="channel", axis=-1)  # of 1 bit
ACTIVATION = QuantSpec()
ALWAYS_ZERO = QuantSpec(symmetric=True)
FULL_PRECISION = None
ACTIVATIONS = ("input", "q", "k", "v", "softmax")
ROLES = ("weight", *ACTIVATIONS)


@dataclasses.dataclass(frozen=True)
class Rule:
    """pattern: of site names ("*" crosses "/"). operands: roles it speaks of. bits: None keeps them
    in full precision. name: shown in the plan. Raises ValueError for an unknown role, or bits
    without a spec."""

    name: str
    pattern: str
    operands: tuple[str, ...]
    bits: int | None
    spec: QuantSpec | None

    def __post_init__(self):
        unknown = [operand for operand in self.operands if operand not in ROLES]
        if unknown:
            raise ValueError(f"Rule {self.name!r} names operands {unknown}; there are {ROLES}.")
        if self.bits is not None and self.spec is None:
            raise ValueError(
                f"Rule {self.name!r} asks for {self.bits} bits without saying on which grid: give a "
                "QuantSpec, or bits=None to keep full precision."
            )

    def takes(self, site: str, operand: str) -> bool:
        return operand in self.operands and fnmatch.fnmatchcase(site, self.pattern)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One operand of the plan; bits None means full precision."""

    site: str
    operand: str
    bits: int | None
    spec: QuantSpec | None
    rule: str

    @property
    def codes(self) -> tuple[int, int]:
        return code_range(self.spec, self.bits)


@dataclasses.dataclass(frozen=True)
class SitePlan:
    """All operands of a model, in order of execution, each with the rule that decided it."""

    entries: tuple[Entry, ...]

    def of(self, site: str) -> dict[str, Entry]:
        """The quantized operands of one site by role."""
        return {e.operand: e for e in self.entries if e.site == site and e.bits is not None}

    def quantized(self, *operands: str) -> tuple[Entry, ...]:
        """Entries that are quantized, of the given roles (all roles without arguments)."""
        return tuple(
            e
            for e in self.entries
            if e.bits is not None and (not operands or e.operand in operands)
        )

    def to_json(self) -> list[dict]:
        return [
            {
                **dataclasses.asdict(e),
                "spec": None if e.spec is None else dataclasses.asdict(e.spec),
            }
            for e in self.entries
        ]


def plan_from_json(items: Sequence[dict]) -> SitePlan:
    """The inverse of `SitePlan.to_json`."""
    return SitePlan(
        tuple(
            Entry(**{**item, "spec": None if item["spec"] is None else QuantSpec(**item["spec"])})
            for item in items
        )
    )


def make_plan(sites: Sequence[Site], rules: Sequence[Rule]) -> SitePlan:
    """Apply rules in order to every operand of every site.

    Raises ValueError if a rule takes nothing (with the nearest site name) or an operand has no rule.
    """
    taken = {i: 0 for i in range(len(rules))}
    entries = []
    for site in sites:
        for operand in site.operands:
            for i, rule in enumerate(rules):
                if rule.takes(site.name, operand):
                    taken[i] += 1
                    entries.append(Entry(site.name, operand, rule.bits, rule.spec, rule.name))
                    break
            else:
                raise ValueError(
                    f"No rule speaks of {site.name}:{operand}; end the rules with one for "
                    f"pattern '*' and operand {operand!r} (bits=None keeps it in full precision)."
                )
    idle = [rules[i] for i, count in taken.items() if not count]
    if idle:
        names = [site.name for site in sites]
        near = difflib.get_close_matches(idle[0].pattern, names, n=1, cutoff=0.0)
        raise ValueError(
            f"Rule {idle[0].name!r} (pattern {idle[0].pattern!r}, operands {idle[0].operands}) matches "
            f"no site that an earlier rule left; the nearest site name is {near[0]!r}. "
            "Correct the pattern or remove the rule."
        )
    return SitePlan(tuple(entries))
