"""experiments.card: the card of a model from the files of its run and of its evaluations."""

import json
import shutil
import types

import numpy as np
import pytest
from PIL import Image

from experiments import card
from qdiff_jax.export.bundle import file_sha256
from qdiff_jax.runtime.metrics import metrics_writer
from qdiff_jax.runtime.weights import save_weights

METRICS = {
    "frechet": {"value": 2.5, "low": 2.4, "high": 2.6, "floor": 0.25},
    "recall": {"value": 0.5, "low": 0.4, "high": 0.6},
}


@pytest.fixture
def args(tmp_path):
    """A run in two workdirs, an evaluation and the weights: the command's arguments."""
    folders = [tmp_path / "run0", tmp_path / "run1"]
    for folder, steps in zip(folders, (range(50, 501, 50), range(550, 1001, 50))):
        write = metrics_writer(folder)
        for step in steps:
            write(step, {"loss": 10.0 / step, "steps_per_second": 5.0})
    config = {
        "model": {"channels": 8},
        "data": {"batch": 16},
        "optimizer": {"peak_lr": 1e-3, "cooldown": 100, "ema": 0.999},
        "diffusion": {"schedule": "linear", "timesteps": 1000, "label_dropout": 0.1},
    }
    (folders[1] / "config.json").write_text(json.dumps({"config": config}))
    weights = tmp_path / "assets" / "tiny.safetensors"
    params = {"dense": {"kernel": np.ones((30, 40), np.float16), "bias": np.ones(40, np.float16)}}
    save_weights(weights, params, {"kind": "diffusion"})
    evaluation = tmp_path / "ddim50"
    evaluation.mkdir()
    protocol = {
        "sampler": {"name": "ddim", "steps": 50, "guidance_scale": 3.0},
        "samples": 2000,
        "network": "classifier_fashion",
        "reference": "test",
    }
    record = {
        "subject": {"sha256": file_sha256(weights)},
        "protocol": protocol,
        "metrics": METRICS,
    }
    (evaluation / "metrics.json").write_text(json.dumps(record))
    Image.new("L", (8, 8)).save(evaluation / "samples.png")
    (tmp_path / "notes.md").write_text("It cannot draw hands.\n")
    return types.SimpleNamespace(
        training=[str(folder) for folder in folders],
        evaluations=[str(evaluation)],
        weights=str(weights),
        data="Drawn",
        hardware="a desk",
        command="train it",
        notes=str(tmp_path / "notes.md"),
    )


def test_every_figure_of_the_card_is_of_the_files(args, monkeypatch, tmp_path):
    monkeypatch.setattr(card.flags, "FLAGS", args)
    card.main(["card"])
    text = (tmp_path / "assets" / "tiny.md").read_text()
    for part in (
        "# tiny",
        "1,240 parameters, stored as float16",
        "1,000 steps of 16 (16,000 images seen)",
        "linear schedule, 1,000 steps, eps prediction, labels dropped with probability 0.1",
        "0.0100 at step 1,000",
        "| ddim, 50 steps | 3 | 2,000 | 0.500 | 2.50 (floor 0.250) |",
        "In the features of `classifier_fashion` against the test set",
        "| command | `train it` |",
        "It cannot draw hands.",
    ):
        assert part in text
    assert (tmp_path / "assets" / "tiny_loss.png").stat().st_size > 5_000
    shown = (tmp_path / "assets" / "tiny.png").read_bytes()
    assert shown == (tmp_path / "ddim50" / "samples.png").read_bytes()


def test_an_evaluation_of_other_weights_is_refused(args, monkeypatch, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(args.evaluations[0], other)
    record = json.loads((other / "metrics.json").read_text())
    record["subject"]["sha256"] = "f" * 64
    (other / "metrics.json").write_text(json.dumps(record))
    args.evaluations.append(str(other))
    monkeypatch.setattr(card.flags, "FLAGS", args)
    with pytest.raises(ValueError, match="other judged other weights than .*tiny.safetensors"):
        card.main(["card"])
    assert not (tmp_path / "assets" / "tiny.md").exists()
