"""Recipes: parts of different papers in one method, "csb+svdquant+efficientdm".

A part is a method's builder and the kinds of its stages that the part takes (`stages.stage.KINDS`): all that
the method has under its own name, or one of them under the name that its paper gives it (PTQ4DiT's CSB,
TCAQ-DM's TCR and PAR). Parts have the settings of their methods and nothing of their own. They stand in the
order of the work:

    transform   other parameters of the same function      csb, tcr
    plan        other grids                                svdquant's groups, qdiffusion's split
    ranges, codes                                          rtn, brecq, tfmq, closed_form, svdquant, ...
    rounds      codes again, on the quantized sampler's states    par
    training    the network as a whole                     efficientdm, binarydm
    correction  of sampling                                ptqd

Codes are decided by one part: two that round are refused. What trains after it goes on from its codes and
leaves its own ranges out, so that the last word on the codes is the training's; how the rounding part rounds
(its steps or the closed form) is its own setting. After a transform every later part is built on the parameters
that the transform has left.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import NamedTuple

from qdiff_jax.stages.deferred import on_left_parameters
from qdiff_jax.stages.stage import KINDS, Method, Model, Stage

JOIN = "+"


class Part(NamedTuple):
    """method: whose builder makes the stages. kinds: of those that are taken. continues: whether its training
    begins from codes where there are some. repeats: whether `par` can have it decide its codes again. by_step:
    whether it leaves tables by step, which training cannot go on from."""

    method: str
    kinds: tuple[str, ...]
    continues: bool = False
    repeats: bool = False
    by_step: bool = False


_WHOLE = ("ranges", "codes")
PARTS: dict[str, Part] = {
    "csb": Part("ptq4dit", ("transform",)),
    "tcr": Part("tcaq", ("transform",)),
    "rtn": Part("rtn", _WHOLE),
    "ptq4dm": Part("ptq4dm", ("plan", *_WHOLE)),
    "brecq": Part("brecq", _WHOLE, repeats=True),
    "qdiffusion": Part("qdiffusion", ("plan", *_WHOLE), repeats=True),
    "tfmq": Part("tfmq", _WHOLE, repeats=True, by_step=True),
    "closed_form": Part("closed_form", _WHOLE, repeats=True),
    "tdq": Part("tdq", _WHOLE, by_step=True),
    "tcaq": Part("tcaq", ("transform", *_WHOLE, "rounds")),
    "ptq4dit": Part("ptq4dit", ("transform", *_WHOLE)),
    "svdquant": Part("svdquant", ("plan", *_WHOLE), repeats=True),  # in closed form
    "par": Part("tcaq", ("rounds",)),
    "efficientdm": Part("efficientdm", ("ranges", "training"), continues=True),
    "binarydm": Part("binarydm", ("ranges", "training")),
    "ptqd": Part("ptqd", ("correction",)),
}
_DECIDED = {"codes", "training"}
_DECIDES = {n for n, p in PARTS.items() if _DECIDED & set(p.kinds) and not p.continues}
_TRANSFORMS = {n for n, p in PARTS.items() if p.kinds == ("transform",)}


def parts_of(name: str) -> tuple[str, ...]:
    """("csb", "svdquant") of "csb+svdquant". Raises ValueError for an unknown part, with those there are."""
    names = tuple(word.strip() for word in name.split(JOIN))
    for word in names:
        if word not in PARTS:
            near = difflib.get_close_matches(word, PARTS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"Part {word!r} of the recipe {name!r} is unknown; there are {sorted(PARTS)}.{hint}"
            )
    return names


def check_order(name: str) -> None:
    """Raise ValueError for a recipe whose parts are in an order that makes no sense, in one sentence."""
    names = parts_of(name)
    placed: list[tuple[str, str]] = []  # (kind, part) of the parts before
    for i, word in enumerate(names):
        if word in names[:i]:
            raise ValueError(f"Recipe {name!r} has {word!r} twice; a part works once.")
        fault = _fault(word, placed)
        if fault:
            raise ValueError(f"Recipe {name!r}: {fault}.")
        placed += [(kind, word) for kind in _taken(PARTS[word], _coded(placed))]
    if not _coded(placed):
        raise ValueError(
            f"Recipe {name!r} quantizes no weights; end it with a part that does, such as "
            f"{name + JOIN + 'rtn'!r}."
        )


def _fault(word: str, placed: list[tuple[str, str]]) -> str:
    """What is wrong with a part behind those placed, "" for nothing."""
    kinds = _taken(PARTS[word], _coded(placed))
    first = min(kinds, key=KINDS.index)
    says = f"{word!r} {_DOES[first]}"
    decided = next((part for _, part in placed if part in _DECIDES), None)
    trained = next((part for kind, part in placed if kind == "training"), None)
    late = next((p for p in placed if _place(p[0]) > _place(first)), None)
    if decided and word in _DECIDES:
        after = ", ".join(sorted(set(PARTS) - _DECIDES - _TRANSFORMS))
        return (
            f"{decided!r} and {word!r} both decide the codes of the weights; keep one of them (codes may be "
            f"followed by {after})"
        )
    own = PARTS[word].method
    same = next((p for kind, p in placed if kind == "transform" and PARTS[p].method == own), None)
    if same and "transform" in kinds:
        return f"{same!r} and {word!r} both bring the transform of {own}; leave one of them out"
    if decided and PARTS[word].continues and PARTS[decided].by_step:
        return (
            f"{word!r} learns one range for each activation, and {decided!r} leaves tables by step; take "
            "another part before it, such as 'brecq'"
        )
    if trained and "training" in kinds:
        return f"{trained!r} and {word!r} both train the network as a whole; keep one of them"
    if late:
        return f"{says}, and {late[1]!r} before it {_DOES[late[0]]} already; put {word!r} first"
    if first in ("rounds", "correction") and not _coded(placed):
        return (
            f"{says}, and nothing before it has quantized any weights; put a part that does before it, such as "
            "'brecq'"
        )
    if first == "rounds" and not PARTS[decided].repeats:
        able = ", ".join(name for name, part in PARTS.items() if part.repeats)
        return f"{says}, which {decided!r} cannot; put it behind one of {able}"
    return ""


def _coded(placed: list[tuple[str, str]]) -> bool:
    return any(kind in _DECIDED for kind, _ in placed)


_DOES = {
    "transform": "changes the parameters that others calibrate and round",
    "plan": "changes the grids",
    "ranges": "calibrates ranges",
    "codes": "rounds weights",
    "rounds": "decides codes again",
    "training": "trains the network as a whole",
    "correction": "corrects the sampling of the network as it is",
}


def _place(kind: str) -> int:
    """Ranges and codes are one place: which comes first is a method's own business."""
    return KINDS.index("ranges" if kind == "codes" else kind)


def _taken(part: Part, coded: bool) -> tuple[str, ...]:
    """The kinds that a part takes, after codes have been decided or before."""
    return tuple(k for k in part.kinds if not (coded and part.continues and k == "ranges"))


def compose(
    name: str, model: Model, builders: dict[str, Callable[[Model, Method], Method]]
) -> Method:
    """The recipe as one method. builders: {part: (model, the method before it) -> its whole method}.

    Raises ValueError as `check_order` does, and for a part whose settings leave it nothing to do.
    """
    check_order(name)
    made, coded, transformed = Method(name, ()), False, False
    for word in parts_of(name):
        part, before = PARTS[word], made
        kinds = _taken(part, coded)

        def stages(own: Model, word=word, kinds=kinds, before=before) -> tuple[Stage, ...]:
            return tuple(s for s in builders[word](own, before).stages if s.kind in kinds)

        whole = builders[word](model, before)
        taken = on_left_parameters(model, stages) if transformed else stages(model)
        left = [s for s in whole.stages if s.kind not in part.kinds]
        if left and part.method == word:
            raise ValueError(
                f"Recipe {name!r}: the settings of {word!r} give it the stage {left[0].name!r}, which has no "
                "place in a recipe; switch it off."
            )
        if not taken:
            raise ValueError(
                f"Recipe {name!r}: the settings of {part.method} leave nothing of its part {word!r}; switch it "
                "on or leave the part out."
            )
        # A piece of a method has not done what the method's notes say.
        own_notes = whole.notes if part.method == word else ""
        notes = "; ".join(filter(None, (made.notes, f"{word}: {own_notes}" if own_notes else "")))
        again = whole.again if word in _DECIDES else made.again
        made = Method(name, (*made.stages, *taken), notes, again)
        coded |= bool({"codes", "training"} & set(kinds))
        transformed |= "transform" in kinds
    return made
