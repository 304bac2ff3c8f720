"""Captions as CLIP's token ids: lower-cased byte-pair encoding with a mark at the end of each word.

The vocabulary is read from a file and not shipped. Text is normalized as transformers' CLIPTokenizer
does (NFC, runs of whitespace as one space, lower case). OpenAI's own tokenizer further repairs broken
encodings (ftfy) and undoes HTML escapes, which differs only on text that has them.
"""

import gzip
import json
import pathlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

START, END = "<|startoftext|>", "<|endoftext|>"
_SPECIAL = re.compile(f"({re.escape(START)}|{re.escape(END)})")
_SUFFIX = "</w>"
# Lines of OpenAI's file that are used; the rest of it belongs to a larger vocabulary.
_OPENAI_MERGES = 49152 - 256 - 2
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


class ClipTokenizer(NamedTuple):
    """ids: of every symbol; ranks: of every merge, first ones first."""

    ids: Mapping[str, int]
    ranks: Mapping[tuple[str, str], int]


def load_tokenizer(path) -> ClipTokenizer:
    """Reads a vocabulary.

    Args:
      path: a folder with `vocab.json` and `merges.txt` (in Hugging Face repositories: the root or
        `tokenizer/`), or OpenAI's file `bpe_simple_vocab_16e6.txt.gz` (also unpacked).

    Raises:
      ValueError: nothing there, or a damaged or incomplete vocabulary.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(
            f"there is no CLIP vocabulary at {path}; give a folder with vocab.json and merges.txt, or "
            "bpe_simple_vocab_16e6.txt.gz."
        )
    try:
        if path.is_dir():
            ids = json.loads((path / "vocab.json").read_text("utf-8"))
            merges = _merges((path / "merges.txt").read_text("utf-8"))
        else:
            raw = path.read_bytes()
            text = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
            merges = _merges(text.decode("utf-8"))[:_OPENAI_MERGES]
            symbols = [*byte_symbols(), *map("".join, merges), START, END]
            ids = {symbol: i for i, symbol in enumerate(symbols)}
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"the CLIP vocabulary {path} cannot be read ({error}).") from error
    needed = [START, END, *byte_symbols(), *map("".join, merges)]
    lacking = [symbol for symbol in needed if symbol not in ids]
    if lacking:
        raise ValueError(
            f"the CLIP vocabulary {path} lacks {len(lacking)} symbols, such as {lacking[0]!r}; "
            "vocab.json and merges.txt must be those of one CLIP model."
        )
    return ClipTokenizer(ids, {pair: rank for rank, pair in enumerate(merges)})


def encode(tokenizer: ClipTokenizer, text: str) -> list[int]:
    """The ids of a text of any length, without start and end. The two special tokens may be in it."""
    found = []
    for word in _words(text):
        if word in (START, END):
            found.append(tokenizer.ids[word])
        else:
            found += [tokenizer.ids[symbol] for symbol in _merged(word, tokenizer.ranks)]
    return found


def tokenize(
    tokenizer: ClipTokenizer, texts: Sequence[str], length: int = 77, pad: int | None = None
) -> np.ndarray:
    """Captions [B, length] int32: start, the text, end, padding; a long text loses its tail.

    pad: the id to fill up with. None: that of the end, as Stable Diffusion and Hugging Face's CLIP do
    (OpenAI: 0). The pooled features of CLIP do not depend on it.
    """
    start, end = tokenizer.ids[START], tokenizer.ids[END]
    rows = np.full((len(texts), length), end if pad is None else pad, np.int32)
    for row, text in zip(rows, texts):
        ids = [start, *encode(tokenizer, text)[: length - 2], end]
        row[: len(ids)] = ids
    return rows


def _merges(text: str) -> list[tuple[str, str]]:
    """Pairs, one to a line below a line with the version."""
    pairs = []
    for line in text.split("\n")[1:]:
        if line.strip():
            left, right = line.split()
            pairs.append((left, right))
    return pairs


def byte_symbols() -> list[str]:
    """The symbols before any merge, in the order of the vocabulary: of every byte, inside and ending a word."""
    letters = _byte_letters().values()
    return [*letters, *(letter + _SUFFIX for letter in letters)]


def _byte_letters() -> dict[int, str]:
    """A printable letter for each byte, in the order of the vocabulary (that of GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


_LETTERS = _byte_letters()


def _words(text: str) -> Iterator[str]:
    """Special tokens, contractions, runs of letters, single digits, runs of anything else."""
    for part in _SPECIAL.split(text):
        if part in (START, END):
            yield part
        else:
            yield from _plain_words(part)


def _kind(character: str) -> str:
    """ "L" a letter, "N" a numeral, " " whitespace, else "" (Unicode's general category)."""
    if character.isspace():
        return " "
    major = unicodedata.category(character)[0]
    return major if major in "LN" else ""


def _plain_words(text: str) -> Iterator[str]:
    text = unicodedata.normalize("NFC", text)
    # Letter by letter: lower-casing a whole string treats a sigma at the end of a word differently.
    text = "".join(character.lower() for character in text)
    i = 0
    while i < len(text):
        kind = _kind(text[i])
        if kind == " ":
            i += 1
            continue
        contraction = next((c for c in _CONTRACTIONS if text.startswith(c, i)), None)
        j = i + 1
        if contraction:
            j = i + len(contraction)
        elif kind != "N":
            while j < len(text) and _kind(text[j]) == kind:
                j += 1
        yield text[i:j]
        i = j


def _merged(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """The word's symbols after all merges, always the earliest-learnt pair first."""
    symbols = [_LETTERS[byte] for byte in word.encode("utf-8")]
    symbols[-1] += _SUFFIX
    while len(symbols) > 1:
        pairs = list(zip(symbols, symbols[1:]))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged, i = [], 0
        while i < len(symbols):
            if i + 1 < len(symbols) and (symbols[i], symbols[i + 1]) == best:
                merged.append(symbols[i] + symbols[i + 1])
                i += 2
            else:
                merged.append(symbols[i])
                i += 1
        symbols = merged
    return symbols
