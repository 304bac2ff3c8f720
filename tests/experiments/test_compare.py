"""The leaderboard: two smoke configs, shared full precision, resumed without doing anything again."""

import csv
import pathlib

import numpy as np
import pytest
from PIL import Image

from experiments import compare as compare_module
from experiments.compare import compare, make_run, parse_overrides, protocol, with_bits
from qdiff_jax.export.bundle import stored_bytes

from ..main_job import ROOT, digests

pytestmark = pytest.mark.slow

PTQD = str(ROOT / "configs" / "methods" / "ptqd.py")
BASELINE = str(ROOT / "configs" / "methods" / "baseline.py")
SIZES = {"calibration.samples": 4, "evaluation.samples": 4}
GIVEN = ([f"{BASELINE}:smoke"], ["w8a8", "w4a8"], [f"{PTQD}:smoke"])


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    paths = compare(*GIVEN, out, overrides=SIZES)
    with open(paths["csv"], newline="") as file:
        return out, paths, list(csv.DictReader(file))


def test_every_variant_has_a_row_with_every_figure(board):
    out, paths, rows = board
    names = [row["label"] for row in rows]
    assert names[0] == "fp32"
    assert set(names[1:]) == {"ptqd_w4a8", "rtn_w8a8", "rtn_w4a8"}
    bits = [(int(row["w_bits"]), int(row["a_bits"])) for row in rows]
    assert bits == sorted(bits, reverse=True)
    for row in rows[1:]:
        bundle = out / "runs" / row["run"] / "variants" / row["label"] / "bundle"
        assert int(row["stored_bytes"]) == stored_bytes(bundle).tensors
        assert float(row["rollout_mse"]) > 0 < float(row["eps_rel_mse"])
        assert float(row["calibrate_s"]) >= 0 <= float(row["reconstruct_s"])
    bitops = {row["label"]: float(row["bitops"]) for row in rows}
    assert bitops["rtn_w4a8"] == bitops["ptqd_w4a8"] < bitops["rtn_w8a8"]
    assert bitops["fp32"] == 32 * 32 * float(rows[0]["macs"])
    text = paths["md"].read_text()
    assert all(f"| {name} |" in text for name in names)


def test_full_precision_is_made_once_and_shared(board):
    out, _, _ = board
    made = digests(out / "shared")
    assert len(made) == 3
    for run in (out / "runs").iterdir():
        own = digests(run, "trajectories/*") | digests(run, "variants/fp32/*")
        assert set(own.values()) == set(made.values())


def test_pictures_show_something(board):
    _, paths, _ = board
    for name, path in paths.items():
        if name not in ("md", "csv"):
            with Image.open(path) as picture:
                assert np.asarray(picture.convert("L")).std() > 5


def test_the_same_command_again_runs_nothing(board, monkeypatch):
    out, paths, _ = board
    before = {p: p.stat().st_mtime_ns for p in out.glob("runs/**/*") if p.is_file()}
    table = paths["csv"].read_text()

    def refuse(*args):
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr(compare_module, "quantize", refuse)
    compare(*GIVEN, out, overrides=SIZES)
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("runs/**/*") if p.is_file()}
    assert paths["csv"].read_text() == table


def test_what_cannot_be_compared_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match=r"sampler.options.eta is 0.0 and 1.0.*--set=key=value"):
        compare([], [], [f"{PTQD}:smoke", f"{PTQD}:smoke,eta=1"], tmp_path)
    with pytest.raises(ValueError, match="would share the folder"):
        compare([f"{PTQD}:smoke"], ["w4a8", "w4a8"], [], tmp_path)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare([f"{PTQD}:smoke"], [], [], tmp_path)
    with pytest.raises(ValueError, match="did you mean 'calibration.samples'"):
        compare([], [], [f"{PTQD}:smoke"], tmp_path, overrides={"calibration.sample": 3})
    assert not list(tmp_path.iterdir())


def test_full_precision_is_not_shared_between_prompts(tmp_path):
    path, found = tmp_path / "prompts.txt", []
    for line in ("a cat", "a dog"):
        path.write_text(line)
        run = make_run(str(ROOT / "configs/methods/tfmq.py:smoke,model=sd"), {"prompts": str(path)})
        found.append(protocol(run.parsed))
    assert found[0] != found[1]


def test_words_and_overrides_of_the_command():
    assert with_bits("configs/x.py", "w4a8") == "configs/x.py:w4a8"
    assert (
        with_bits("configs/x.py:base=brecq,laptop", "w4a8") == "configs/x.py:w4a8,base=brecq,laptop"
    )
    assert parse_overrides(["a.b=3", "c=ddpm", "d=(4, 8)"]) == {"a.b": 3, "c": "ddpm", "d": (4, 8)}
    with pytest.raises(ValueError, match="key=value"):
        parse_overrides(["a"])
    name = make_run(f"{PTQD}:w8a8,smoke,eta=0.5", {}).name
    assert name == "ptqd-w8a8-smoke-eta=0.5"
    assert pathlib.PurePath(name).name == name
