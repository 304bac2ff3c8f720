"""Inception-v3 against a float64 reference in torch on random weights made from their names."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.eval.networks import inception
from qdiff_jax.eval.networks.inception import (
    SIZE,
    Inception,
    inception_params,
    inception_shapes,
)

from ...parity.networks import seeded

CASE = pathlib.Path(__file__).parents[2] / "parity" / "networks" / "inception.npz"


@functools.cache
def stored():
    with np.load(CASE, allow_pickle=False) as file:
        return json.loads(str(file["manifest"])), {key: file[key] for key in file.files}


def test_the_features_of_an_image():
    """Within 1e-4 of each feature's spread; float32 alone is 4e-6 off."""
    manifest, expected = stored()
    tensors = seeded.state_dict(manifest)
    tensors["Mixed_5b.branch1x1.bn.num_batches_tracked"] = np.int64(7)  # in the file, not needed
    params = inception_params(tensors, "the seeded weights")
    image = (0.5 * seeded.normal("image", (1, SIZE, SIZE, 3))).astype(np.float32)
    found = jax.jit(Inception().apply)({"params": params}, jnp.asarray(image))
    assert {name: value.shape for name, value in found.items()} == {
        "pool": (1, 2048),
        "spatial": (1, 2023),
        "logits": (1, 1008),
        "logits_unbiased": (1, 1008),
    }
    for name, value in found.items():
        tolerance = 1e-4 * expected[name].std()
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=tolerance, err_msg=name)


def test_the_size_of_the_network():
    shapes = jax.tree.leaves(inception_shapes())
    assert len(shapes) == 472
    assert sum(leaf.size for leaf in shapes) == 23_885_392
    manifest, _ = stored()
    assert sum(int(np.prod(shape)) for shape in manifest.values()) == 23_885_392


def test_strict_both_ways():
    tensors = {key: np.zeros(shape, np.float32) for key, shape in stored()[0].items()}
    tensors["AuxLogits.fc.weight"] = np.zeros((1000, 768), np.float32)
    with pytest.raises(ValueError, match=r"in 1 parameters \(AuxLogits.fc.weight: .*, wanted none"):
        inception_params(tensors, "the file")
    del tensors["AuxLogits.fc.weight"], tensors["fc.bias"]
    with pytest.raises(ValueError, match="fc/bias: absent"):
        inception_params(tensors, "the file")


def test_the_published_file_is_known_by_its_digest(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"abc")  # whose sha256 begins with ba7816bf (FIPS 180-2, appendix B.1)
    assert not inception.is_published(path)
    assert not inception.is_published(tmp_path)
    monkeypatch.setattr(inception, "PUBLISHED", "ba7816bf")
    assert inception.is_published(path)
