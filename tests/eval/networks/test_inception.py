"""Inception-v3 against a float64 reference in torch on random weights made from their names."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.eval.networks.inception import (
    Inception,
    MixedE,
    inception_params,
    inception_shapes,
)

from ...parity.networks import seeded

CASE = pathlib.Path(__file__).parents[2] / "parity" / "networks" / "inception.npz"


@functools.cache
def stored():
    with np.load(CASE, allow_pickle=False) as file:
        return json.loads(str(file["manifest"])), {key: file[key] for key in file.files}


def features(side, batch):
    manifest, _ = stored()
    tensors = seeded.state_dict(manifest)
    tensors["Mixed_5b.branch1x1.bn.num_batches_tracked"] = np.int64(7)  # in the file, not needed
    params = inception_params(tensors, "the seeded weights")
    image = (0.5 * seeded.normal("image", (batch, side, side, 3))).astype(np.float32)
    return jax.jit(Inception().apply)({"params": params}, jnp.asarray(image))


def check(found, side):
    """Within 1e-4 of each feature's spread, four hundred times float32's noise here."""
    _, arrays = stored()
    for name, value in found.items():
        expected = arrays[f"{side}/{name}"]
        assert value.shape == expected.shape
        np.testing.assert_allclose(
            value, expected, rtol=0, atol=1e-4 * expected.std(), err_msg=name
        )


def test_the_features_of_small_images():
    """107 pixels: every block, with borders and insides, at an eighth of the cost."""
    check(features(107, batch=2), 107)


@pytest.mark.slow
def test_the_features_at_299():
    found = features(299, batch=1)
    assert found["spatial"].shape == (1, 2023)
    check(found, 299)


def test_the_size_of_the_network():
    shapes = jax.tree.leaves(inception_shapes())
    assert len(shapes) == 472
    assert sum(leaf.size for leaf in shapes) == 23_885_392
    manifest, _ = stored()
    assert sum(int(np.prod(shape)) for shape in manifest.values()) == 23_885_392


def test_the_last_block_takes_the_maximum():
    """The one place where a port of the ImageNet model shows only in the second digit."""
    x = jnp.zeros((1, 8, 8, 16)).at[0, 0, 0].set(9.0)
    params = MixedE(True).init(jax.random.key(0), x)["params"]
    pool = {"params": params["branch_pool"]}
    kernel = pool["params"]["kernel"][0, 0]
    normalized = np.float32(1 / np.sqrt(1 + 1e-3))
    for maximum, corner in ((True, 9.0), (False, 9.0 / 4)):  # four places of the corner are inside
        y = MixedE(maximum).apply({"params": params}, x)[0, 0, 0, -192:]
        expected = np.maximum(corner * np.asarray(kernel).sum(0) * normalized, 0)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_strict_both_ways():
    tensors = {key: np.zeros(shape, np.float32) for key, shape in stored()[0].items()}
    tensors["AuxLogits.fc.weight"] = np.zeros((1000, 768), np.float32)
    with pytest.raises(ValueError, match=r"in 1 parameters \(AuxLogits.fc.weight: .*, wanted none"):
        inception_params(tensors, "the file")
    del tensors["AuxLogits.fc.weight"], tensors["fc.bias"]
    with pytest.raises(ValueError, match="fc/bias: absent"):
        inception_params(tensors, "the file")
