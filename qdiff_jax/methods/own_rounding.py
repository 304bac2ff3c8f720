"""Methods that decide codes in a way of their own, whatever `MethodSettings.rounding` asks for."""

from __future__ import annotations

from collections.abc import Callable

from qdiff_jax.methods.settings import MethodSettings

_ALWAYS = {
    "rtn": "rounds to nearest",
    "ptq4dm": "rounds to nearest",
    "efficientdm": "trains its codes",
    "binarydm": "trains its codes",
}
_WITH: dict[str, tuple[Callable[[MethodSettings], bool], str]] = {
    "tdq": (lambda s: s.tdq.mode == "qat", "with tdq.mode='qat' trains its codes"),
    "ptq4dit": (
        lambda s: not s.ptq4dit.reconstruction,
        "without ptq4dit.reconstruction rounds to nearest",
    ),
    "svdquant": (lambda s: s.svdquant.branch.gptq, "with svdquant.branch.gptq rounds by GPTQ"),
}
READING = ("brecq", "qdiffusion", "tfmq", "tdq", "tcaq", "ptq4dit", "svdquant")


def check_read(method: str, settings: MethodSettings, asked: str) -> None:
    """Raise ValueError for a method that would not read `settings.rounding` with these settings. asked: the
    method or recipe whose codes it decides, for the message."""
    applies, how = _WITH.get(method, (lambda _: False, ""))
    how = how if applies(settings) else _ALWAYS.get(method)
    if how:
        raise ValueError(
            f"rounding={settings.rounding!r} has no meaning for {asked}: {method} {how}; leave it out, or take "
            f"one of {', '.join(READING)}."
        )
