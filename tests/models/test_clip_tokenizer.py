"""Token ids equal those of transformers' CLIPTokenizer, on a small made-up vocabulary."""

import gzip
import json
import pathlib

import numpy as np
import pytest

from qdiff_jax.models.clip_tokenizer import encode, load_tokenizer, tokenize

CASE = pathlib.Path(__file__).parents[1] / "parity" / "networks" / "clip_tokenizer.json"
STORED = json.loads(CASE.read_text())
END = STORED["vocab"]["<|endoftext|>"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps(STORED["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(STORED["merges"]), "utf-8")
    return tmp_path


def test_ids(folder):
    tokenizer = load_tokenizer(folder)
    for text, ids in zip(STORED["texts"], STORED["ids"]):
        (row,) = tokenize(tokenizer, [text])
        assert row.dtype == np.int32
        np.testing.assert_array_equal(row, ids + [END] * (77 - len(ids)), err_msg=text)


def test_padding_and_length(folder):
    tokenizer = load_tokenizer(folder)
    ids = encode(tokenizer, "a photo of a cat")
    (row,) = tokenize(tokenizer, ["a photo of a cat"], length=9, pad=0)
    np.testing.assert_array_equal(row, [END - 1, *ids, END, *[0] * (7 - len(ids))])
    (row,) = tokenize(tokenizer, ["a photo of a cat"], length=4)
    np.testing.assert_array_equal(row, [END - 1, *ids[:2], END])


@pytest.mark.parametrize("packed", [True, False])
def test_openai_file(folder, packed):
    text = (folder / "merges.txt").read_bytes()
    path = folder / "bpe.txt"
    path.write_bytes(gzip.compress(text) if packed else text)
    tokenizer = load_tokenizer(path)
    assert tokenizer == load_tokenizer(folder)


def test_unusable_vocabularies(folder):
    with pytest.raises(ValueError, match="no CLIP vocabulary at .*none"):
        load_tokenizer(folder / "none")
    (folder / "merges.txt").write_text("#version\nq q\n")
    with pytest.raises(ValueError, match="lacks 1 symbols, such as 'qq'"):
        load_tokenizer(folder)
    (folder / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(folder)
    (folder / "vocab.json").unlink()
    with pytest.raises(ValueError, match=r"cannot be read .*vocab\.json"):
        load_tokenizer(folder)
    cut = folder / "bpe.txt.gz"
    cut.write_bytes(gzip.compress(b"x" * 1000)[:20])
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(cut)
