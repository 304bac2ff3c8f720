"""The metrics file survives a killed writer and a resumed run."""

import json
import sys

import numpy as np
import pytest

from qdiff_jax.runtime.metrics import metrics_writer, read_metrics


def test_values_come_back_plain(tmp_path):
    write = metrics_writer(tmp_path / "new" / "folder")
    write(3, {"loss": np.float32(0.5), "bad": float("nan"), "what": "text", "n": 2})
    (record,) = read_metrics(tmp_path / "new" / "folder")
    assert (record["step"], record["loss"], record["n"]) == (3, 0.5, 2)
    assert (record["bad"], record["what"]) == ("nan", "text")
    json.loads((tmp_path / "new" / "folder" / "metrics.jsonl").read_text())  # strict JSON, no NaN


def test_a_torn_line_is_skipped_and_later_records_win(tmp_path):
    write = metrics_writer(tmp_path)
    write(1, {"loss": 3.0})
    write(2, {"loss": 2.0})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-10])  # killed while it wrote step 2
    write = metrics_writer(tmp_path)
    write(2, {"loss": 1.5})
    write(2, {"accuracy": 0.9})
    records = read_metrics(path)
    assert [r["step"] for r in records] == [1, 2]
    assert (records[1]["loss"], records[1]["accuracy"]) == (1.5, 0.9)


def test_tensorboard_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"\.\[tensorboard\]"):
        metrics_writer(tmp_path, tensorboard=True)
