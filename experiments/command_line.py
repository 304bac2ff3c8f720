"""How a command starts and how it ends on bad input: with the sentence that says so, not with a traceback."""

from __future__ import annotations

import pathlib
import sys
import traceback
from collections.abc import Callable

from absl import app, logging

import qdiff_jax

_PACKAGE = pathlib.Path(qdiff_jax.__file__).resolve().parent
_HERE = pathlib.Path(__file__).resolve().parent
_OURS = (_PACKAGE, _HERE, _HERE.parent / "configs")


def sentence_of(error: BaseException) -> str | None:
    """What a user is told: the message of an error that a `raise` of this project says, or of the system about
    a file.

    None for what another library raised or no `raise` foresaw: that is a defect and needs its traceback.
    """
    if isinstance(error, OSError) and error.filename:
        return str(error)
    raised = traceback.extract_tb(error.__traceback__)
    if isinstance(error, AssertionError) or not raised:
        return None
    if not (raised[-1].line or "").startswith("raise "):
        return None
    last = pathlib.Path(raised[-1].filename).resolve()
    return str(error) if any(last.is_relative_to(folder) for folder in _OURS) else None


def run(main: Callable[[list[str]], None]) -> None:
    """`app.run`, and exit status 1 with one sentence for bad input; `--verbosity=1` shows the traceback too."""
    try:
        app.run(main)
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None or logging.level_debug():
            raise
        print(f"Error: {sentence}", file=sys.stderr)
        sys.exit(1)
