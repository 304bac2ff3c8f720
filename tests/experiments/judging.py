"""Evaluations in seconds: the miniature model, and a network of random features in place of a trained one."""

import hashlib
import pathlib

import jax.numpy as jnp
import numpy as np

from qdiff_jax.config import load_config
from qdiff_jax.data.images import to_unit_range
from qdiff_jax.eval import backends
from qdiff_jax.eval.backends import FeatureNetwork

ROOT = pathlib.Path(__file__).parents[2]
TINY = {
    "model": "random:miniature",
    "sampler.name": "ddim",
    "sampler.spacing": "uniform",
    "data.pad_to": 0,
    "data.crop": "lsun",
    "data.size": 8,
}


def config(**overrides):
    """The smoke config of evaluate.py on the miniature model; `data__crop` is `data.crop`."""
    named = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_config(f"{ROOT / 'configs' / 'evaluate.py'}:smoke", {**TINY, **named})


class Stub:
    """apply(images [B, 8, 8, 1]) -> six features, their squares as spatial ones, and logits."""

    def __init__(self, classes=10):
        rng = np.random.default_rng(0)
        self.maps = {
            name: rng.normal(size=(64, width)).astype(np.float32)
            for name, width in (("pool", 6), ("spatial", 4), ("logits", classes))
        }
        self.calls = 0

    def apply(self, images):
        if images.shape[1:] != (8, 8, 1):
            raise ValueError(f"the stub takes images of 8x8, got {images.shape}")
        self.calls += 1
        flat = jnp.reshape(images, (len(images), 64))
        return {name: flat @ matrix for name, matrix in self.maps.items()}

    def network(self, name="stub", weights=None):
        digest = hashlib.sha256(f"{name} {weights}".encode()).hexdigest()
        return FeatureNetwork(name, digest, None, self.apply)


def install(monkeypatch, classes=10) -> Stub:
    stub = Stub(classes)
    monkeypatch.setattr(backends, "feature_network", stub.network)
    monkeypatch.setattr(backends, "preparation", lambda network, tool="": to_unit_range)
    return stub
