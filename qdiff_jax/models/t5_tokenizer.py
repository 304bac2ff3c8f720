"""Captions as T5's token ids, by the sentencepiece model that comes with the weights (`spiece.model`).

The vocabulary is read from a file and not shipped; the reader is the package `sentencepiece`, an extra.
Captions are taken as they are: the cleaning that some pipelines put before is theirs.
"""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np


def load_t5_tokenizer(path) -> Any:
    """The sentencepiece processor of a vocabulary.

    path: the file `spiece.model`, or the folder that holds it (in Hugging Face repositories: the root or
    `tokenizer/`).

    Raises ValueError: sentencepiece is not installed; no file there, or none of sentencepiece's; a model
    without the end and padding symbols of T5.
    """
    path = pathlib.Path(path)
    path = path / "spiece.model" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"there is no T5 vocabulary {path}; give the model's spiece.model or the folder with it."
        )
    try:
        sentencepiece = importlib.import_module("sentencepiece")
    except ImportError as error:
        raise ValueError(
            "reading T5's vocabulary needs the package sentencepiece: pip install -e '.[t5]'."
        ) from error
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or no sentencepiece model ({error}); download it again."
        ) from error
    if processor.eos_id() < 0 or processor.pad_id() < 0:
        raise ValueError(
            f"{path} has no end or no padding symbol, so it is not the vocabulary of a T5."
        )
    return processor


def tokenize_t5(tokenizer: Any, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Captions [B, length] int32, and a mask of that shape, True where a token is and False for padding.

    The text, the end, padding; a long text loses its tail and keeps the end. PixArt-alpha takes 120
    tokens, PixArt-sigma 300.
    """
    ids = np.full((len(texts), length), tokenizer.pad_id(), np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, filled, text in zip(ids, mask, texts):
        found = [*tokenizer.encode(text)[: length - 1], tokenizer.eos_id()]
        row[: len(found)] = found
        filled[: len(found)] = True
    return ids, mask
