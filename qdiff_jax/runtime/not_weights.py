"""What lies in the place of weights, told by its beginning: nothing, text, a pointer, an old format."""

from __future__ import annotations

import codecs
import pathlib

_SHOWN = 60  # characters of a text that a message repeats


def refuse_other_files(head: bytes, path: pathlib.Path) -> None:
    """ValueError if a file that begins with `head` (its first 512 bytes) is clearly no weights file."""
    if not head:
        raise ValueError(f"{path} is empty; download or copy it again.")
    if head[257:262] == b"ustar":
        raise ValueError(
            f"{path} is a checkpoint in the tar format of PyTorch before 0.1.10, which is not read; load "
            "it with torch and save it again."
        )
    text = _as_text(head)
    if text is None:
        return
    if text.lower().startswith("version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not weights; run `git lfs pull`.")
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    if text.startswith("<"):
        raise ValueError(
            f"{path} is a web page, not weights: the download was answered with HTML or XML ({shown!r}); "
            "open it to see why, and download it again."
        )
    raise ValueError(
        f"{path} is text, not weights: it begins {shown!r}; if that is a server's error, download it "
        "again, else give the file of the weights."
    )


def _as_text(head: bytes) -> str | None:
    """The text that a file begins with, white space collapsed; None for anything binary.

    A zip archive cut within its first bytes is no text, nor are pickles of protocol 0, which torch
    writes when it is told to.
    """
    if len(head) < 2 or head.startswith((b"PK\x03", b"L119547037146038801333356L")):
        return None
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1"):
        if encoding == "utf-16" and head[:2] not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            continue
        try:
            # Incremental, since the head may end within a character.
            text = codecs.getincrementaldecoder(encoding)().decode(head)
        except UnicodeDecodeError:
            continue
        # Without its mark, any bytes are UTF-16 of some script.
        if encoding in ("utf-16-le", "utf-16-be") and not text.isascii():
            continue
        if text.strip() and all(c.isprintable() or c.isspace() for c in text):
            return " ".join(text.split())
    return None
