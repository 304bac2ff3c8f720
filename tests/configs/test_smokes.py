"""Every config is documented, and its smoke variant runs: without a network, without files, in seconds."""

import inspect
import json
import pathlib
import runpy

import pytest

from experiments.quantize import quantize
from experiments.train import train
from qdiff_jax.config import load_config
from qdiff_jax.runtime.weights import load_weights

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("[!_]*.py"))
TRAINED = [path for path in CONFIGS if path.stem.startswith("train_")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_what_to_run_and_what_to_expect(path):
    doc = inspect.cleandoc(runpy.run_path(str(path))["__doc__"])
    assert f"--config=configs/{path.name}" in doc
    assert "python -m experiments." in doc
    assert any(word in doc for word in ("Expected", "Measured", "ends near"))
    assert f"{path.name}:smoke" in doc


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_typo_names_the_nearest_word(path):
    with pytest.raises(ValueError, match="smoke"):
        load_config(f"{path}:smokey")


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_the_smoke_variant_trains(path, tmp_path):
    config = load_config(f"{path}:smoke")
    steps = train(config, tmp_path)
    assert steps == config.optimizer.total_steps
    params, header = load_weights(tmp_path / "weights.safetensors")
    assert header["kind"] == config.kind
    assert params


def test_the_smoke_variant_quantizes(smoke_run):
    # The run is the session's; what it leaves is looked at with the main job's own tests.
    assert (smoke_run / "report.html").exists()


def test_the_smoke_variant_shows_the_damage_of_rounding(tmp_path):
    path = CONFIGS[0].with_name("damage.py")
    assert load_config(f"{path}:dit").model == "dit_fashion"
    quantize(load_config(f"{path}:dit,smoke"), tmp_path)
    variants = json.loads((tmp_path / "report.json").read_text())["variants"]
    errors = {v["name"]: v["eps_rel_mse"] for v in variants}
    assert errors["rtn_w8a8"] < errors["rtn_w4a8"] < errors["rtn_w2a8"]


def test_every_config_is_run_here():
    # Their smokes are subjects of tests/experiments: test_evaluate.py and so on.
    elsewhere = {"quickstart", "damage", "evaluate", "bench_rounding", "claims", "terrain"}
    assert {path.stem for path in CONFIGS} == elsewhere | {path.stem for path in TRAINED}
