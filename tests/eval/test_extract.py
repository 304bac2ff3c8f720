"""extract: features in order whatever the cuts, one shape for the network, all devices used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.eval.extract import all_features, feature_batches
from qdiff_jax.runtime.mesh import data_mesh

IMAGES = np.random.default_rng(0).integers(0, 256, (21, 4, 4, 3), dtype=np.uint8)


def prepare(images):
    return jnp.asarray(images).astype(jnp.float32) / 255.0


@jax.jit
def apply(x):
    assert x.shape[0] == 8  # the network is compiled for one batch
    return {"pool": jnp.mean(x, axis=(1, 2)), "first": x[:, 0, 0, :1]}


@pytest.mark.parametrize("cuts", [[], [1, 2, 3], [5, 5, 17]])
def test_every_image_once_and_in_order(cuts):
    parts = list(feature_batches(apply, prepare, np.split(IMAGES, cuts), batch=8))
    assert [len(p["pool"]) for p in parts] == [8, 8, 5]
    found = all_features(parts)
    expected = IMAGES.astype(np.float64) / 255
    np.testing.assert_allclose(found["pool"], expected.mean(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found["first"], expected[:, 0, 0, :1], rtol=1e-6)
    assert set(all_features(parts, ("pool",))) == {"pool"}


def test_batches_are_split_over_the_devices():
    seen = []

    def spread(x):
        seen.append(len(x.sharding.device_set))
        return apply(x)

    mesh = data_mesh()
    split = all_features(feature_batches(spread, prepare, [IMAGES], batch=8, mesh=mesh))
    assert seen == [8, 8, 8]
    alone = all_features(feature_batches(apply, prepare, [IMAGES], batch=8))
    np.testing.assert_allclose(split["pool"], alone["pool"], rtol=1e-6)


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="no images to take features of"):
        list(feature_batches(apply, prepare, []))
    with pytest.raises(ValueError, match="one size first"):
        list(feature_batches(apply, prepare, [IMAGES, IMAGES[:, :3]], batch=8))
