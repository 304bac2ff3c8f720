"""Which variants stand before and after a remedy, for each trouble that methods answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from absl import logging

# The trouble's measure: what is a remedy for it, and what stands before, best first.
ANSWERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "activations": (("tdq",), ("brecq", "rtn")),
    "rollout": (("ptqd", "par"), ("brecq", "rtn")),
    "temporal": (("tfmq",), ("brecq", "rtn")),
    "skips": (("qdiffusion",), ("brecq", "rtn")),
}


class Held(NamedTuple):
    """A variant as its bundle describes it. method, notes: of `stages.stage.Method`; alike: what a pair must
    share (bits, policy)."""

    method: str
    notes: str
    alike: tuple

    @property
    def solved(self) -> bool:
        return "rounding=closed_form" in self.notes

    @property
    def base(self) -> str:
        """What PTQD stands on, "" where nothing says so."""
        found = re.match(r"base=(\w+)", self.notes)
        return found[1] if found else ""


def choose_pairs(held: Mapping[str, Held]) -> dict[str, tuple[str, str]]:
    """{measure: (before, after)}: for each trouble the first variant with a remedy for it, and one without at
    the same bits and policy; a method's own base where it names one, else block reconstruction by the same way
    of rounding, else round-to-nearest. Troubles without either are left out.

    Raises ValueError if none is left, saying what each lacks.
    """
    pairs, lacks = {}, []
    for measure, (remedies_for, bases) in ANSWERS.items():
        found = [n for n, v in held.items() if set(v.method.split("+")) & set(remedies_for)]
        found.sort(key=lambda name: held[name].solved)  # stable: as the papers round, first
        pair = next((p for p in (_pair(held, name, bases) for name in found) if p), None)
        if pair is not None:
            pairs[measure] = pair
        elif found:
            lacks.append(f"{measure}: no {' or '.join(bases)} at the bits and policy of {found[0]}")
        else:
            lacks.append(f"{measure}: no {' or '.join(remedies_for)}")
    if not pairs:
        raise ValueError(f"nothing stands before and after a remedy ({'; '.join(lacks)}).")
    for lack in lacks:
        logging.info("left out, %s", lack)
    return pairs


def _pair(held: Mapping[str, Held], after: str, bases: Sequence[str]) -> tuple[str, str] | None:
    remedy = held[after]
    for base in [remedy.base] if remedy.base else bases:
        for name, other in held.items():
            plain = other.method == base and other.alike == remedy.alike
            if plain and (base == "rtn" or other.solved == remedy.solved):
                return name, after
    return None
