"""Frechet distances for a leaderboard: which variants are judged, by which sampler, and never twice."""

import csv

import numpy as np
import pytest

from experiments import compare_images
from experiments.compare import compare
from experiments.compare_images import Judging, check_judging, evaluation
from experiments.compare_runs import make_run
from qdiff_jax.observe.archive import save_record
from qdiff_jax.runtime.finite import NotFiniteError

from ..main_job import ROOT
from .judging import install

PTQ4DM = str(ROOT / "configs" / "methods" / "ptq4dm.py")
BASELINE = str(ROOT / "configs" / "methods" / "baseline.py")
EVALUATE = str(ROOT / "configs" / "evaluate.py:main20")
SIZES = {"calibration.samples": 4, "evaluation.samples": 4}


@pytest.fixture(autouse=True)
def stub(monkeypatch):
    """The classifier does not read the miniature's 8x8 images."""
    return install(monkeypatch)


def judging(source, **overrides):
    few = {"samples": 6, "shard": 6, "batch": 6, "data.source": source, "data.pad_to": 0}
    return Judging(EVALUATE, ("w4a8",), {**few, **overrides})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Real images of the miniature's size."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 24)):
        images = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
        labels = rng.integers(0, 10, count)
        np.savez(folder / f"{split}.npz", images=images, labels=labels)
    return f"npz:{folder}/{{split}}.npz"


def test_a_run_is_judged_under_its_own_sampler(source):
    run = make_run(f"{BASELINE}:w4a8,smoke", {"seed": 3, "sampler.steps": 7})
    made = evaluation(run.parsed, "bundle", judging(source))
    assert (made.model, made.bundle, made.seed) == ("random:miniature", "bundle", 3)
    assert made.sampler.steps == 7
    assert made.sampler.spacing == run.parsed.sampler.spacing


def test_full_precision_is_judged_without_a_quantized_sampler(source):
    first = make_run(f"{PTQ4DM}:w4a8,smoke", {})
    assert evaluation(first.parsed, "bundle", judging(source)).sampler.tensor_bits == 8
    assert evaluation(first.parsed, "", judging(source)).sampler.tensor_bits == 0
    check_judging([first], judging(source))


def test_what_cannot_be_judged_is_said_before_anything_runs(source, stub):
    runs = [make_run(f"{BASELINE}:w4a8,smoke", {}), make_run(f"{PTQ4DM}:w4a8,smoke", {})]
    check_judging(runs, judging(source))
    described = stub.calls
    assert described > 0  # the real images, once for all runs on one model
    with pytest.raises(ValueError, match="no variant has the bits 'w2a8'.*w4a8"):
        check_judging(runs, judging(source)._replace(bits=("w2a8",)))
    with pytest.raises(ValueError, match="multiple of config.shard"):
        check_judging(runs, judging(source, samples=7))
    with pytest.raises(ValueError, match="names no network"):
        check_judging(runs, judging("", network="", **{"data.floor": ""}))
    with pytest.raises(ValueError, match=r"absent/test.npz"):
        check_judging(runs, judging("npz:absent/{split}.npz"))
    with pytest.raises(ValueError, match=r"\(8, 8, 1\)"):
        check_judging(runs, judging(source, **{"data.pad_to": 16}))


@pytest.mark.slow
def test_the_board_has_distances_at_those_bits_and_makes_them_once(source, tmp_path, monkeypatch):
    judged = []

    def fake(config, workdir):
        judged.append(config.bundle)
        if "ptq4dm" in config.bundle:
            raise NotFiniteError("3 of 6 samples are not finite.")
        distance = {"value": 2.0 + len(judged), "low": 1.5, "high": 9.0, "floor": 0.25}
        result = {"protocol": {}, "metrics": {"frechet": distance}}
        save_record(workdir / "metrics.json", result)
        return result

    monkeypatch.setattr(compare_images, "evaluate", fake)
    methods = [f"{PTQ4DM}:smoke", f"{BASELINE}:smoke"]
    given = (methods, ["w8a8", "w4a8"], [], tmp_path)
    paths = compare(*given, overrides=SIZES, judging=judging(source))
    with open(paths["csv"], newline="") as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    found = {name: row["frechet_value"] for name, row in rows.items() if row["w_bits"] != "8"}
    assert found == {"fp32": "3.0", "ptq4dm_w4a8": "diverged", "rtn_w4a8": "5.0"}
    assert {row["frechet_value"] for row in rows.values() if row["w_bits"] == "8"} == {""}
    assert judged[0] == ""
    assert len(judged) == 3
    text = paths["md"].read_text()
    assert "| 5.00 [1.50, 9.00] |" in text
    assert "- ptq4dm_w4a8: no result: 3 of 6 samples are not finite." in text
    assert "Floor of the Fréchet distance (as many real images): 0.250." in text
    assert compare(*given, overrides=SIZES, judging=judging(source))["md"].read_text() == text
    assert len(judged) == 3
    assert len(list((tmp_path / "judged").iterdir())) == 1
    compare(*given, overrides=SIZES, judging=judging(source, samples=12))
    assert len(judged) == 6
