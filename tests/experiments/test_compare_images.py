"""Frechet distances for a leaderboard: which variants are judged, by which sampler, and never twice."""

import csv

import numpy as np
import pytest

from experiments import compare_images
from experiments.compare import compare, make_run
from experiments.compare_images import Judging, check_judging, evaluation
from qdiff_jax.observe.archive import save_record

from ..main_job import ROOT

BASELINE = str(ROOT / "configs" / "methods" / "baseline.py")
EVALUATE = str(ROOT / "configs" / "evaluate.py:main20")
SIZES = {"calibration.samples": 4, "evaluation.samples": 4}


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


def test_what_cannot_be_judged_is_said_before_anything_runs(source):
    runs = [make_run(f"{BASELINE}:w4a8,smoke", {})]
    check_judging(runs, judging(source))
    with pytest.raises(ValueError, match="no variant has the bits 'w2a8'.*w4a8"):
        check_judging(runs, judging(source)._replace(bits=("w2a8",)))
    with pytest.raises(ValueError, match="multiple of config.shard"):
        check_judging(runs, judging(source, samples=7))


@pytest.mark.slow
def test_the_board_has_distances_at_those_bits_and_makes_them_once(source, tmp_path, monkeypatch):
    judged = []

    def fake(config, workdir):
        # The classifier does not read the miniature's 8x8 images.
        judged.append(config.bundle)
        distance = {"value": 2.0 + len(judged), "low": 1.5, "high": 9.0, "floor": 0.25}
        result = {"protocol": {}, "metrics": {"frechet": distance}}
        save_record(workdir / "metrics.json", result)
        return result

    monkeypatch.setattr(compare_images, "evaluate", fake)
    given = ([f"{BASELINE}:smoke"], ["w8a8", "w4a8"], [], tmp_path)
    paths = compare(*given, overrides=SIZES, judging=judging(source))
    with open(paths["csv"], newline="") as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    found = {name: row["frechet_value"] for name, row in rows.items()}
    assert found == {"fp32": "3.0", "rtn_w8a8": "", "rtn_w4a8": "4.0"}
    assert judged == ["", str(tmp_path / "runs/baseline-w4a8-smoke/variants/rtn_w4a8/bundle")]
    text = paths["md"].read_text()
    assert "| 4.00 [1.50, 9.00] |" in text
    assert "Floor of the Fréchet distance (as many real images): 0.250." in text
    assert compare(*given, overrides=SIZES, judging=judging(source))["md"].read_text() == text
    assert len(judged) == 2
    compare(*given, overrides=SIZES, judging=judging(source, samples=12))
    assert len(judged) == 4
