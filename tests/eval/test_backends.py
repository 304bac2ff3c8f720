"""Every feature network behind its name: what it answers, what it refuses, what identifies it."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qdiff_jax.eval import backends
from qdiff_jax.eval.backends import (
    FeatureNetwork,
    caption_network,
    feature_network,
    preparation,
)
from qdiff_jax.eval.networks import clip_images
from qdiff_jax.eval.networks.state_dict import fingerprint, read_tensors
from qdiff_jax.eval.tools import preprocess
from qdiff_jax.models import registry
from qdiff_jax.models.clip import ClipConfig, TowerConfig
from qdiff_jax.models.port.clip import clip_params

from ..parity.networks import seeded

PARITY = pathlib.Path(__file__).parents[1] / "parity"
TOKENS = json.loads((PARITY / "networks" / "clip_tokenizer.json").read_text())
TINY = ClipConfig(TowerConfig(32, 2, 4), TowerConfig(24, 2, 3), 20, 8, 24, 50, 12)


def manifest(name, key="manifest"):
    with np.load(PARITY / "networks" / f"{name}.npz", allow_pickle=False) as file:
        return json.loads(str(file[key]))


@pytest.fixture
def tiny_clip(tmp_path, monkeypatch):
    """A folder as Hugging Face lays it out, with a small CLIP in the place of ViT-B/32."""
    config = dataclasses.replace(TINY, vocabulary=len(TOKENS["vocab"]))
    monkeypatch.setitem(backends.CLIP_CONFIGS, "clip-vit-b32", config)
    shapes = manifest("clip", "hugging_face/manifest")
    shapes["text_model.embeddings.token_embedding.weight"] = (config.vocabulary, 24)
    tensors = {key: np.asarray(value) for key, value in seeded.state_dict(shapes).items()}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "vocab.json").write_text(json.dumps(TOKENS["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(TOKENS["merges"]), "utf-8")
    return tmp_path, config, tensors


def test_the_shipped_classifier():
    network = feature_network("classifier_fashion")
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 1)), jnp.float32)
    found = network.apply(images)
    logits, features = registry.classifier()(images)
    np.testing.assert_array_equal(found["logits"], logits)
    np.testing.assert_array_equal(found["pool"], features)
    assert network.size == 32
    assert len(network.fingerprint) == 64
    assert network.fingerprint == feature_network("classifier_fashion").fingerprint


def test_clip_images_and_captions(tiny_clip):
    folder, config, tensors = tiny_clip
    network = feature_network("clip-vit-b32", folder)
    params = clip_params(tensors, config, "f")
    images = jnp.asarray(seeded.normal("image", (2, 24, 24, 3)), jnp.float32)
    found = network.apply(images)
    with np.load(PARITY / "networks" / "clip.npz", allow_pickle=False) as file:
        expected = file["hugging_face/image_embedding"]
    np.testing.assert_allclose(found["embedding"], expected, rtol=0, atol=1e-4)
    assert (network.name, network.size) == ("clip-vit-b32", 24)
    assert network.fingerprint == fingerprint(params["vision"])

    captions = caption_network("clip-vit-b32", folder / "model.safetensors", folder)
    found = captions.apply(["a photo", "the cat's hat"])["embedding"]
    swapped = captions.apply(["the cat's hat", "a photo"])["embedding"]
    assert found.shape == (2, 20)
    np.testing.assert_allclose(found, swapped[::-1], atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 0.1
    with pytest.raises(ValueError, match="has 574 symbols and clip-vit-l14 was trained with 49408"):
        caption_network("clip-vit-l14", folder, folder)


def test_the_fingerprint_is_of_the_values():
    params = {"a": {"kernel": jnp.arange(4.0)}, "b": jnp.zeros(2)}
    moved = {"a": {"kernel": jnp.arange(4.0) + 1e-6}, "b": jnp.zeros(2)}
    shaped = {"a": {"kernel": jnp.arange(4.0).reshape(2, 2)}, "b": jnp.zeros(2)}
    assert len({fingerprint(tree) for tree in (params, moved, shaped)}) == 3
    assert fingerprint(params) == fingerprint(jax.tree.map(np.asarray, params))


@pytest.mark.parametrize(("name", "size"), [("inception-fid", 299), ("efficientnet-lite0", 224)])
def test_weights_from_a_file(name, size, tmp_path):
    path = tmp_path / "weights.safetensors"
    shapes = manifest(name.split("-")[0])
    tensors = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, path)
    network = feature_network(name, path)
    assert (network.name, network.size) == (name, size)
    for wrong in (jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, size, size, 3), jnp.uint8)):
        with pytest.raises(ValueError, match=f"{name} takes preprocessed float32 .*{size}, 3"):
            network.apply(wrong)


def test_preparations():
    """What each network was published with, from the same 8-bit images."""
    rng = np.random.default_rng(0)
    grey, colour = (rng.integers(0, 256, (2, 12, 9, c), np.uint8) for c in (1, 3))

    def prepared(name, size, images, tool=""):
        network = FeatureNetwork(name, "", size, lambda x: {})
        return np.asarray(preparation(network, tool)(images))

    np.testing.assert_array_equal(
        prepared("inception-fid", 20, colour, "adm"), preprocess(jnp.asarray(colour), "adm", 20)
    )
    np.testing.assert_array_equal(
        prepared("clip-vit-l14", 16, colour), clip_images.preprocess(colour, 16)
    )
    assert np.abs(prepared("efficientnet-lite0", 16, np.full_like(grey, 127))).max() < 1e-6
    found = prepared("efficientnet-lite0", 16, grey)
    assert found.shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(found, prepared("efficientnet-lite0", 16, grey, "clean-fid"))
    assert np.abs(found - prepared("efficientnet-lite0", 16, grey, "adm")).max() > 0.01
    assert found.min() >= -127 / 128  # the cubic's overshoot is clipped
    assert prepared("classifier_fashion", 12, np.full_like(grey, 255)).max() == 1
    with pytest.raises(ValueError, match="torch-fidelity"):
        prepared("inception-fid", 20, colour)
    for name in ("classifier_fashion", "efficientnet-lite0"):
        with pytest.raises(ValueError, match="uint8"):
            prepared(name, 16, colour.astype(np.float32))


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"inception-fid.*clip-vit-l14.*Did you mean 'clip-vit-b32'"
    ):
        feature_network("clip-vit-b23")
    with pytest.raises(ValueError, match="pt_inception-2015-12-05-6726825d.pth"):
        feature_network("inception-fid")
    with pytest.raises(ValueError, match="openai/clip-vit-large-patch14"):
        feature_network("clip-vit-l14")
    monkeypatch.setattr("qdiff_jax.eval.networks.efficientnet.WHEEL", "no_such_package_at_all")
    with pytest.raises(ValueError, match=r"\.\[efficientnet\]"):
        feature_network("efficientnet-lite0")
    with pytest.raises(ValueError, match="No caption network is called 'inception-fid'"):
        caption_network("inception-fid", tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"has none of .*model\.safetensors"):
        feature_network("clip-vit-b32", tmp_path)
    with pytest.raises(ValueError, match="no weights file"):
        feature_network("inception-fid", tmp_path / "none.pth")


def test_tensors_of_a_checkpoint():
    """The state dict inside a training checkpoint is found; a file without one is named."""
    path = PARITY / "torch_files" / "zip.pt"
    tensors = read_tensors(path)
    np.testing.assert_array_equal(tensors["0.bias"], [6, 7])


def test_files_without_tensors(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match="damaged or no safetensors"):
        read_tensors(tmp_path)
    with pytest.raises(ValueError, match="no weights file"):
        read_tensors(tmp_path / "other.safetensors")


def test_a_thumbnail_is_the_means_of_a_grid():
    network = backends.feature_network("thumbnail")
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 16, 3)).astype(np.uint8)
    found = network.apply(backends.preparation(network)(images))["pool"]
    cells = images.reshape(2, 4, 2, 4, 4, 3).mean(axis=(2, 4)) / 127.5 - 1
    np.testing.assert_allclose(found, cells.reshape(2, 48), atol=1e-5)
    with pytest.raises(ValueError, match="sides divisible by 4"):
        network.apply(jnp.zeros((1, 6, 8, 3)))
    with pytest.raises(ValueError, match="thumbnail has no weights"):
        backends.feature_network("thumbnail", "w.pth")
