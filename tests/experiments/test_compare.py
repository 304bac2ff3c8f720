"""The leaderboard: two smoke configs, shared full precision, resumed without doing anything again."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from experiments import made_once
from experiments.compare import compare
from experiments.compare_runs import make_run, parse_overrides, protocol
from qdiff_jax.export.bundle import stored_bytes

from ..main_job import ROOT, digests

pytestmark = pytest.mark.slow

PTQD = str(ROOT / "configs" / "methods" / "ptqd.py")
PTQ4DM = str(ROOT / "configs" / "methods" / "ptq4dm.py")
BASELINE = str(ROOT / "configs" / "methods" / "baseline.py")
SIZES = {"evaluation.samples": 4, "evaluation.held_out": 2}
GIVEN = ([f"{BASELINE}:smoke", f"{PTQ4DM}:smoke"], ["w8a8", "w4a8"], [f"{PTQD}:smoke"])


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    paths = compare(*GIVEN, out, overrides=SIZES)
    return out, paths, rows_of(paths)


def rows_of(paths):
    with open(paths["csv"], newline="") as file:
        return list(csv.DictReader(file))


def refuse(*args, **options):
    raise AssertionError("a finished run was run again")


def test_every_variant_has_a_row_with_every_figure(board):
    out, paths, rows = board
    names = [row["label"] for row in rows]
    assert names[0] == "fp32"
    quantized = ["ptq4dm_w4a8", "ptq4dm_w8a8", "ptqd_w4a8", "rtn_w4a8", "rtn_w8a8"]
    assert sorted(names[1:]) == quantized
    assert [row["number"] for row in rows] == [str(i) for i in range(len(rows))]
    bits = [(int(row["w_bits"]), int(row["a_bits"])) for row in rows]
    assert bits == sorted(bits, reverse=True)
    for row in rows[1:]:
        bundle = out / "runs" / row["run"] / "variants" / row["label"] / "bundle"
        assert int(row["stored_bytes"]) == stored_bytes(bundle).tensors
        assert float(row["rollout_mse"]) > 0 < float(row["eps_rel_mse"])
        for key in ("record_s", "record_cpu_s", "calibrate_s", "calibrate_cpu_s"):
            assert float(row[key]) >= 0
        assert row["policy"] == "common"
        assert row["tensor_bits"] == ("8" if "ptq4dm" in row["label"] else "")
        assert row["commit"]
    bitops = {row["label"]: float(row["bitops"]) for row in rows}
    assert bitops["rtn_w4a8"] == bitops["ptqd_w4a8"] < bitops["rtn_w8a8"]
    assert bitops["fp32"] == 32 * 32 * float(rows[0]["macs"])
    text = paths["md"].read_text()
    assert all(f"| {name} |" in text for name in names)
    assert not list(out.glob("runs/*/pictures"))


def test_full_precision_is_made_once_and_shared(board):
    out, _, _ = board
    made = digests(out / "shared")
    assert len(made) == 5
    for run in (out / "runs").iterdir():
        own = digests(run, "trajectories/*") | digests(run, "variants/fp32/*")
        assert set(own.values()) == set(made.values())


def test_other_trajectories_to_calibrate_on_leave_what_is_measured_on(board, tmp_path):
    out, _, _ = board
    compare([], [], [f"{BASELINE}:w8a8,smoke"], tmp_path, overrides=SIZES)
    more = {**SIZES, "calibration.samples": 8}
    compare([], [], [f"{BASELINE}:w8a8,smoke"], tmp_path, overrides=more)
    folders = [set(digests(run, "trajectories/*.npz").items()) for run in tmp_path.glob("runs/*")]
    assert [name for name, _ in set.intersection(*folders)] == ["trajectories/held_out.npz"]


def test_pictures_show_something(board):
    _, paths, _ = board
    drawn = [path for name, path in paths.items() if name not in ("md", "csv")]
    assert len(drawn) == 3  # quality, and errors at each of two widths
    for path in drawn:
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 5


def test_the_same_command_again_runs_nothing(board, monkeypatch):
    out, paths, _ = board
    before = {p: p.stat().st_mtime_ns for p in out.glob("runs/**/*") if p.is_file()}
    table = paths["csv"].read_text()
    monkeypatch.setattr(made_once, "quantize", refuse)
    compare(*GIVEN, out, overrides=SIZES)
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("runs/**/*") if p.is_file()}
    assert paths["csv"].read_text() == table


def test_a_run_that_diverges_is_a_row_that_says_so_and_stops_no_other(board, tmp_path, monkeypatch):
    out = shutil.copytree(board[0], tmp_path / "out")

    def diverge(*args, **options):
        raise FloatingPointError("the loss of unit 'mid' became nan.")

    given = ([*GIVEN[0]], [*GIVEN[1], "w4a4"], GIVEN[2])
    for made in (diverge, refuse):  # what diverged is not tried again
        monkeypatch.setattr(made_once, "quantize", made)
        paths = compare(*given, out, overrides=SIZES)
        rows = {row["label"]: row for row in rows_of(paths)}
        assert rows["rtn_w4a4"]["rollout_mse"] == "diverged"
        assert rows["rtn_w4a4"]["bitops"] == ""
        assert float(rows["rtn_w4a8"]["rollout_mse"]) > 0
        text = paths["md"].read_text()
        assert "- rtn_w4a4: no result: the loss of unit 'mid' became nan." in text
    assert len(list(out.glob("runs/*/failed.json"))) == 2


def test_rows_of_another_commit_are_said_aloud(board, tmp_path, monkeypatch):
    out = shutil.copytree(board[0], tmp_path / "out")
    (record,) = out.glob("runs/baseline-w4a8*/variants/rtn_w4a8/metrics.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "commit": "0ld"}))
    monkeypatch.setattr(made_once, "quantize", refuse)
    paths = compare(*GIVEN, out, overrides=SIZES)
    rows = {row["label"]: row for row in rows_of(paths)}
    assert "0ld" in rows["rtn_w4a8"]["commit"]
    assert "0ld" not in rows["rtn_w8a8"]["commit"]
    assert "**Rows of different commits stand here" in paths["md"].read_text()


def test_what_cannot_be_compared_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match=r"sampler.options.eta is 0.0 and 1.0.*--set=key=value"):
        compare([], [], [f"{PTQD}:smoke", f"{PTQD}:smoke,eta=1"], tmp_path)
    with pytest.raises(ValueError, match="would share the folder"):
        compare([f"{PTQD}:smoke"], ["w4a8", "w4a8"], [], tmp_path)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare([f"{PTQD}:smoke"], [], [], tmp_path)
    with pytest.raises(ValueError, match="did you mean 'calibration.samples'"):
        compare([], [], [f"{PTQD}:smoke"], tmp_path, overrides={"calibration.sample": 3})
    odd = {"reconstruct.walk_batch": 3}
    with pytest.raises(ValueError, match="config.reconstruct.walk_batch"):
        compare([f"{PTQD}:smoke"], ["w4a8"], [], tmp_path, overrides=odd)
    assert not list(tmp_path.iterdir())


def test_full_precision_is_not_shared_between_prompts(tmp_path):
    path, found = tmp_path / "prompts.txt", []
    for line in ("a cat", "a dog"):
        path.write_text(line)
        run = make_run(str(ROOT / "configs/methods/tfmq.py:smoke,model=sd"), {"prompts": str(path)})
        found.append(protocol(run.parsed))
    assert found[0] != found[1]


def test_words_and_overrides_of_the_command():
    assert parse_overrides(["a.b=3", "c=ddpm", "d=(4, 8)"]) == {"a.b": 3, "c": "ddpm", "d": (4, 8)}
    with pytest.raises(ValueError, match="key=value"):
        parse_overrides(["a"])
    assert make_run(f"{PTQD}:w8a8,smoke,eta=0.5", {}).name == "ptqd-w8a8-smoke-eta=0.5"
