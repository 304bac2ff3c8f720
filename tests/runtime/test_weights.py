"""Weights files keep names, values and the model's description, and never exist half-written."""

import numpy as np
import pytest

from qdiff_jax.runtime.weights import fit_weights, load_weights, save_weights

PARAMS = {"a": {"conv": {"kernel": np.ones((2, 3), np.float32)}}, "b": np.zeros(4, np.float32)}


def test_round_trip(tmp_path):
    path = tmp_path / "assets" / "w.safetensors"
    metadata = {"model": {"widths": [1, 2], "groups": None}, "step": 7, "kind": "diffusion"}
    save_weights(path, PARAMS, metadata)
    params, found = load_weights(path)
    assert found == metadata
    np.testing.assert_array_equal(params["a"]["conv"]["kernel"], PARAMS["a"]["conv"]["kernel"])
    assert set(params) == {"a", "b"}
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]


def test_transposed_arrays_keep_their_values(tmp_path):
    # A safetensors file holds bytes in row-major order; a transposed view is not.
    kernel = np.arange(6.0, dtype=np.float32).reshape(2, 3).T
    save_weights(tmp_path / "w.safetensors", {"k": kernel}, {})
    np.testing.assert_array_equal(load_weights(tmp_path / "w.safetensors")[0]["k"], kernel)


def test_damage_and_absence(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match="no weights file"):
        load_weights(path)
    save_weights(path, PARAMS, {})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged"):
        load_weights(path)


def test_another_models_weights_are_named():
    assert fit_weights(PARAMS, PARAMS, "f")["b"] is PARAMS["b"]
    other = {"a": {"conv": {"kernel": np.ones((2, 4))}}, "c": np.zeros(1)}
    with pytest.raises(
        ValueError, match=r"3 parameters \(a/conv/kernel: \(2, 3\), wanted \(2, 4\)"
    ):
        fit_weights(PARAMS, other, "f")
