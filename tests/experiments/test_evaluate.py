"""Evaluations: resumed shard by shard, judged by one protocol, and refused where protocols differ."""

import dataclasses
import hashlib
import json
import pathlib

import numpy as np
import pytest

from experiments.card import figures_table, training_facts
from experiments.evaluate import compare, evaluate
from qdiff_jax.config import load_config
from qdiff_jax.data.images import load_images
from qdiff_jax.eval.shards import Shard, read_shards, shard_paths
from qdiff_jax.observe.archive import load_arrays, save_arrays

ROOT = pathlib.Path(__file__).parents[2]
SMOKE = str(ROOT / "configs" / "evaluate.py") + ":smoke"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Workdir and result of the smoke evaluation."""
    workdir = tmp_path_factory.mktemp("evaluation") / "w"
    return workdir, evaluate(load_config(SMOKE), workdir)


def test_the_smoke_evaluation_measures_everything(finished):
    workdir, result = finished
    assert set(result["metrics"]) == {
        "frechet",
        "kernel",
        "precision",
        "recall",
        "class_agreement",
    }
    for entry in result["metrics"].values():
        assert entry["low"] <= entry["value"] <= entry["high"]
    # Two steps from noise are further from drawn shapes than other drawn shapes are.
    assert result["metrics"]["frechet"]["value"] > result["metrics"]["frechet"]["floor"]
    assert json.loads((workdir / "metrics.json").read_text()) == result
    # Of the pixels in their order, as earlier versions took it of the whole array.
    images = load_images("synthetic:64", "test", pad_to=32).images
    assert result["protocol"]["reference_sha256"] == hashlib.sha256(images.tobytes()).hexdigest()
    assert result["metrics"]["frechet"]["name"] == "Frechet distance (classifier_fashion)"
    assert "FID" not in (workdir / "metrics.json").read_text()
    html = (workdir / "report.html").read_text()
    assert "Frechet distance (classifier_fashion)" in html
    assert 'src="data:image/png' in html
    for outside in ("http://", "https://", "<link", "<script src", "@import", "url("):
        assert outside not in html


def test_a_lost_shard_is_drawn_again_with_the_same_bits(finished):
    workdir, result = finished
    (first, _), (second, _) = shard_paths(workdir / "shards", 40, 20)
    before = load_arrays(second, Shard)
    untouched = first.stat().st_mtime_ns
    second.unlink()
    again = evaluate(load_config(SMOKE), workdir)
    np.testing.assert_array_equal(load_arrays(second, Shard).images, before.images)
    assert first.stat().st_mtime_ns == untouched
    assert again["metrics"] == result["metrics"]
    assert np.bincount(before.labels).tolist() == [2] * 10  # classes in turn


def test_more_samples_continue_fewer(finished, monkeypatch):
    workdir, _ = finished
    kept = {path: path.stat().st_mtime_ns for path, _ in shard_paths(workdir / "shards", 40, 20)}
    result = evaluate(load_config(SMOKE, {"samples": 60}), workdir)
    assert result["protocol"]["samples"] == 60
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    (workdir / "shards" / "0000040.npz").unlink()
    evaluate(load_config(SMOKE), workdir)  # back to what the other tests expect


def test_samples_paired_with_themselves_are_equal(finished, tmp_path):
    workdir, _ = finished
    (tmp_path / "shards").mkdir(parents=True)
    record = json.loads((workdir / "metrics.json").read_text())
    record["subject"]["sha256"] = "of the darker one"
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    for path, _ in shard_paths(workdir / "shards", 40, 20):
        shard = load_arrays(path, Shard)
        darker = dataclasses.replace(shard, images=shard.images // 2)
        save_arrays(tmp_path / "shards" / path.name, darker)
    paired = evaluate(load_config(SMOKE, {"paired": str(workdir)}), workdir)["metrics"]
    assert paired["mse"]["value"] == 0.0
    assert paired["ssim"]["value"] == pytest.approx(1.0)
    result = evaluate(load_config(SMOKE, {"paired": str(tmp_path)}), workdir)
    assert result["protocol"]["paired_sha256"] == "of the darker one"
    apart = result["metrics"]
    assert apart["mse"]["value"] > 1e-3
    assert apart["ssim"]["value"] < 0.99
    evaluate(load_config(SMOKE), workdir)


def test_only_like_protocols_compare(finished, tmp_path):
    workdir, result = finished
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.json").write_text(json.dumps(result))
    text = compare([str(workdir), str(other)], tmp_path / "out")
    assert text.count("\n| ") == 5  # header, rule, two evaluations, real images
    assert "| evaluation | Frechet distance (classifier_fashion) | kernel distance (" in text
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "Frechet distance (classifier_fashion)" in page
    assert "https://" not in page
    unlike = json.loads(json.dumps(result))
    unlike["protocol"]["sampler"]["steps"] = 50
    (other / "metrics.json").write_text(json.dumps(unlike))
    with pytest.raises(ValueError, match=r"not measured alike: sampler is .*'steps': 2"):
        compare([str(workdir), str(other)], tmp_path / "out")
    unlike = json.loads(json.dumps(result))
    unlike["protocol"]["paired_sha256"] = "another model"
    (other / "metrics.json").write_text(json.dumps(unlike))
    with pytest.raises(ValueError, match="not measured alike: paired_sha256 is None in the one"):
        compare([str(workdir), str(other)], tmp_path / "out")
    with pytest.raises(ValueError, match="run experiments.evaluate with that workdir first"):
        compare([str(workdir), str(tmp_path / "nothing")], tmp_path / "out")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"samples": 41}, "config.samples is 41; choose a multiple of config.shard=20"),
        ({"data.pad_to": 40}, r"images of synthetic:64 are \(40, 40, 1\) and the model draws"),
        ({"model": "unet_fashon"}, "Did you mean 'unet_fashion'"),
        ({"network": "classifier_fasion"}, "classifier_fashion"),
        ({"sampler.name": "dim"}, "unknown sampler 'dim'"),
        ({"extrapolate": True}, "40 samples are too few to extrapolate .* in 128 dimensions"),
        (
            {"tool": "torch-fidelity"},
            "draws subsets of 1000 for its kernel distance, and there are 40",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_cannot_run_is_refused_before_anything_is_drawn(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        evaluate(load_config(SMOKE, overrides), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_results_of_earlier_versions_compare(tmp_path):
    stored = sorted((ROOT / "experiments" / "results" / "evaluation" / "free50").glob("*.json"))
    text = compare([str(path) for path in stored], tmp_path)
    assert "class agreement" in text
    assert text.count("[") == 2 * 5 + 1


def test_a_damaged_shard_is_named(finished, tmp_path):
    path = tmp_path / "0000000.npz"
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"0000000.npz is damaged"):
        list(read_shards([path]))


def test_a_card_reads_the_run_and_its_evaluations(finished):
    _, result = finished
    lines = figures_table({"w": result})
    assert lines[0].startswith("| sampler | guidance | samples | class_agreement | recall |")
    assert "| dpmpp_2m, 2 steps | none | 40 |" in lines[2]
    assert "(floor " in lines[2]
    records = [
        {"step": step, "loss": 1.0 / step, "steps_per_second": 2.0} for step in range(50, 1001, 50)
    ]
    config = {
        "data": {"batch": 16},
        "optimizer": {"peak_lr": 1e-3, "cooldown": 100, "ema": 0.999},
    }
    facts = training_facts(records, config)
    assert "1,000 steps of 16 (16,000 images seen)" in facts["training"]
    assert facts["time"].startswith("0.1 hours")
    assert "0.0010 at step 1,000 (means of 50 steps)" in facts["loss"]
