"""Prompts that a config names: read from their file, and told apart from others at the same path."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Sequence


def read_prompts(path: str) -> tuple[str, ...]:
    """The prompts of a text file, one a line; none for the path "".

    Raises ValueError if it cannot be read, or has none or an empty line."""
    if not path:
        return ()
    try:
        lines = [line.strip() for line in pathlib.Path(path).read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the prompts {path} cannot be read ({error}).") from error
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"the prompts {path} are an empty file; write one prompt a line.")
    if "" in lines:
        number = lines.index("") + 1
        raise ValueError(f"line {number} of the prompts {path} is empty; every line is a prompt.")
    return tuple(lines)


def prompts_digest(prompts: Sequence[str]) -> str | None:
    """sha256 of prompts, None without any: their file may be written again at the same path."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest() if prompts else None
