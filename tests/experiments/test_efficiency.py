"""experiments.efficiency on drawn images: known damages in their order, and shards of other runs left out."""

import dataclasses
import hashlib
import json
import pathlib
import types

import numpy as np
import pytest

from experiments import efficiency
from experiments.efficiency import drawn_shards, metrics_of
from qdiff_jax.data.images import load_images
from qdiff_jax.eval.described import Described
from qdiff_jax.eval.efficiency import Efficiency
from qdiff_jax.eval.resize import crop_resize
from qdiff_jax.eval.shards import Shard
from qdiff_jax.observe.archive import load_arrays, save_arrays

from .judging import config, install

COUNT, SHARD = 64, 32
DAMAGES = (0, 8, 30, 90)  # spread of the noise on each pixel


@pytest.fixture(scope="module")
def real():
    whole = load_images("synthetic:64", "test")
    return np.stack([crop_resize(image, 8) for image in whole.images]), whole.labels


def noisy(images, spread):
    noise = np.random.default_rng(spread).normal(size=images.shape) * spread
    return np.clip(images + noise, 0, 255).astype(np.uint8)


@pytest.fixture
def workdirs(tmp_path, real, monkeypatch):
    """Full precision's evaluation and three damaged ones, as `experiments.evaluate` leaves them."""
    stub = install(monkeypatch)
    network = stub.network("classifier_fashion", None)
    images, labels = real
    protocol = {
        "samples": COUNT,
        "network": network.name,
        "network_sha256": network.fingerprint,
        "tool": "",
        "reference_sha256": hashlib.sha256(images.tobytes()).hexdigest(),
    }
    folders = []
    for spread in DAMAGES:
        folder = tmp_path / f"damage{spread}"
        for first in range(0, COUNT, SHARD):
            part = slice(first, first + SHARD)
            shard = Shard(noisy(images[part], spread), labels[part].astype(np.int32), np.zeros(()))
            save_arrays(folder / "shards" / f"{first:07d}.npz", shard)
        record = {"subject": {}, "protocol": protocol, "metrics": {}}
        (folder / "metrics.json").write_text(json.dumps(record))
        folders.append(str(folder))
    return folders


def run(monkeypatch, workdirs, out, **overrides):
    args = types.SimpleNamespace(
        config=config(data__limit=0, **overrides),
        reference=workdirs[0],
        variants=workdirs[1:],
        out=str(out),
        draws=6,
        compile_cache=str(out / "cache"),
    )
    monkeypatch.setattr(efficiency.flags, "FLAGS", args)
    monkeypatch.setattr(efficiency, "log_progress", lambda: None)
    monkeypatch.setattr(efficiency, "enable_compile_cache", lambda directory: None)
    efficiency.main(["efficiency"])


def test_known_damages_are_ordered_by_few_samples(workdirs, monkeypatch, tmp_path, capsys):
    # More shards than were measured on, of a longer run before.
    source = pathlib.Path(workdirs[1]) / "shards"
    black = load_arrays(source / "0000000.npz", Shard)
    black = dataclasses.replace(black, images=np.zeros_like(black.images))
    save_arrays(source / "0000064.npz", black)
    run(monkeypatch, workdirs, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "efficiency.json").read_text())
    assert found["pool"] == COUNT
    assert found["network"] == "classifier_fashion"
    assert {"pixel MSE", "class agreement", "Frechet distance", "recall"} <= set(found["metrics"])
    assert found["metrics"]["pixel MSE"]["needed"] == 4
    assert found["metrics"]["pixel MSE"]["paired"]
    assert not found["metrics"]["Frechet distance"]["paired"]
    text = (tmp_path / "out" / "efficiency.md").read_text()
    assert "| pixel MSE | 4 | yes |" in text
    assert text in capsys.readouterr().out
    for suffix in ("png", "pdf"):
        assert (tmp_path / "out" / f"efficiency.{suffix}").stat().st_size > 5_000


def test_what_was_measured_otherwise_is_refused(workdirs, monkeypatch, tmp_path):
    for overrides, message in (
        ({"network": "other"}, "measured with network 'classifier_fashion' and the config gives"),
        ({"network_weights": "w"}, "was measured with network_sha256"),
        ({"tool": "adm"}, "was measured with tool '' and the config gives 'adm'"),
        ({"data__reference": "train"}, "was measured with reference_sha256"),
    ):
        with pytest.raises(ValueError, match=message):
            run(monkeypatch, workdirs, tmp_path / "out", **overrides)
    (pathlib.Path(workdirs[2]) / "shards" / "0000032.npz").unlink()
    with pytest.raises(ValueError, match="has 32 of the 64 samples"):
        run(monkeypatch, workdirs, tmp_path / "out")
    assert [p.name for p in drawn_shards(pathlib.Path(workdirs[0]), 32)] == ["0000000.npz"]


def test_metrics_are_those_of_the_chosen_samples():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 16, 16, 1), np.uint8) for _ in range(3)]
    labels = np.arange(32) % 10

    def seen(labels=labels):
        features = rng.normal(size=(32, 5)).astype(np.float32)
        return Described(features, labels, rng.integers(0, 10, 32))

    sets, real = [seen() for _ in range(3)], seen()
    metrics = metrics_of(sets, images, real)
    chosen = np.array([3, 5, 30])
    floats = [i.astype(np.float64) / 127.5 - 1 for i in images]
    expected = np.square(floats[2] - floats[0])[chosen].mean()
    assert metrics["pixel MSE"].of(1, chosen) == pytest.approx(expected, rel=1e-5)
    apart = np.square(sets[1].features - sets[0].features).sum(1)[chosen].mean()
    assert metrics["feature distance"].of(0, chosen) == pytest.approx(apart, rel=1e-5)
    right = (sets[2].predicted == labels)[chosen].mean()
    assert metrics["class agreement"].of(1, chosen) == pytest.approx(right)
    rising = {name for name, metric in metrics.items() if metric.rising}
    assert rising == {"pixel MSE", "feature distance", "Frechet distance", "kernel distance"}
    unknown = seen(np.full(32, -1))
    assert "class agreement" not in metrics_of([unknown] * 3, images, unknown)


def test_the_picture_has_a_line_for_each_metric(tmp_path):
    sizes = np.array([4, 8, 16])
    found = {"one": Efficiency(sizes, np.array([0.2, 0.6, 1.0]), 16)}
    efficiency.draw(found, tmp_path / "one")
    found["two"] = Efficiency(sizes, np.array([1.0, 0.4, 0.2]), None)
    efficiency.draw(found, tmp_path / "two")
    first, second = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "two"))
    assert first != second
