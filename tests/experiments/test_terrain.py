"""The SQNR table of a third party's model, on a miniature with random weights."""

import json

import numpy as np
import pytest

from configs import terrain as configs
from experiments.quantize_config import read_config
from experiments.terrain import AT, MINIATURE, draw, run, table
from qdiff_jax.models.families import parameter_shapes
from qdiff_jax.models.registry import random_params


def test_the_smoke_variant_makes_a_table_and_resumes(tmp_path):
    config = read_config(configs.get_config("smoke"))
    params = random_params(parameter_shapes(MINIATURE), 0)
    run(config, MINIATURE, params, tmp_path)
    place = tmp_path / "variants" / "rtn_w4a8" / "sqnr.json"
    found = json.loads(place.read_text())
    assert set(found) == {"method", "w4a32", "w4a8", "cpu_seconds", "compile_seconds"}
    assert 0 < found["w4a8"] < found["w4a32"] < 40  # activations at 8 bits cost a little more
    made = place.stat().st_mtime_ns
    run(config, MINIATURE, params, tmp_path)
    assert place.stat().st_mtime_ns == made
    other = random_params(parameter_shapes(MINIATURE), 1)
    with pytest.raises(ValueError, match="was begun with other weights"):
        run(config, MINIATURE, other, tmp_path)
    last = (tmp_path / "sqnr.md").read_text().splitlines()[-1]
    assert last.startswith(f"| rtn |  |  | {found['w4a32']:.1f} | {found['w4a8']:.1f} |")


def test_a_row_gathers_the_runs_of_a_method(tmp_path):
    for name, cells in {"a": {"w8a32": 20.0}, "b": {"w8a8": 10.04, "w4a8": -1.0}}.items():
        folder = tmp_path / "variants" / name
        folder.mkdir(parents=True)
        (folder / "sqnr.json").write_text(json.dumps({"method": "x", "cpu_seconds": 2, **cells}))
    assert table(tmp_path).splitlines()[-1] == "| x | 20.0 | 10.0 |  | -1.0 | 4 |"


def test_noise_and_difficulties_are_those_of_the_model():
    maps = draw(0, 400, 4)
    assert maps.noisy.std() == pytest.approx(80, rel=0.03)
    assert maps.x.std() == pytest.approx(1, rel=0.03)
    np.testing.assert_allclose(maps.x, maps.noisy * AT.inward)
    assert (maps.y.shape, maps.y.min(), maps.y.max()) == ((400, 1), 0, 1)
    assert not np.array_equal(maps.x, draw(1, 400, 4).x)
