"""Feature networks by name: one interface for every metric that compares images in features."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.resources
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from qdiff_jax.data.images import to_unit_range
from qdiff_jax.eval.hub import on_disk
from qdiff_jax.eval.networks import clip_images, efficientnet, inception
from qdiff_jax.eval.networks.state_dict import fingerprint, read_tensors
from qdiff_jax.eval.resize import resize
from qdiff_jax.eval.tools import find_tool, preprocess
from qdiff_jax.models import registry
from qdiff_jax.models.clip import VIT_B32, VIT_L14, TextTower, VisionTower
from qdiff_jax.models.clip_tokenizer import load_tokenizer, tokenize
from qdiff_jax.models.port.clip import clip_params
from qdiff_jax.runtime.weights import load_weights

# Of a repository on the hub that is named without a file.
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")

CLIP_CONFIGS = {"clip-vit-b32": VIT_B32, "clip-vit-l14": VIT_L14}
_CLASSIFIER = "classifier_fashion"
_GRID = 4

# Where weights that are not shipped come from.
_SOURCES = {
    "inception-fid": (
        "pt_inception-2015-12-05-6726825d.pth of the releases of github.com/mseitzer/pytorch-fid, or "
        "weights-inception-2015-12-05-6726825d.pth of github.com/toshas/torch-fidelity"
    ),
    "clip-vit-b32": "the folder or model.safetensors of huggingface.co/openai/clip-vit-base-patch32",
    "clip-vit-l14": "the folder or model.safetensors of huggingface.co/openai/clip-vit-large-patch14",
}


class FeatureNetwork(NamedTuple):
    """Images to features.

    Attributes:
      name: as `feature_network` was asked for it.
      fingerprint: sha256 of the weights that `apply` uses, whatever file they came from. Numbers
        measured with different fingerprints must not be compared.
      size: side length that `apply` wants; None: the image's own.
      apply: preprocessed images [B, H, W, C] float32 -> dict of float32 features, each [B, D]; jitted.
    """

    name: str
    fingerprint: str
    size: int | None
    apply: Callable[[jax.Array], dict[str, jax.Array]]


class CaptionNetwork(NamedTuple):
    """Captions to features: as `FeatureNetwork`, but apply takes a list of B strings."""

    name: str
    fingerprint: str
    apply: Callable[[Sequence[str]], dict[str, jax.Array]]


def feature_network(name: str, weights=None) -> FeatureNetwork:
    """A feature network, ready to run. Images are resized and scaled before (`preparation` does it):

    - "inception-fid": 299 x 299, (v - 128) / 128 of 8-bit values v; "pool", "spatial", "logits",
      "logits_unbiased" (networks/inception.py). Needs weights.
    - "clip-vit-b32", "clip-vit-l14": what networks/clip_images.py makes; "pool", "embedding". Need
      weights, in the layout of OpenAI or of Hugging Face.
    - "efficientnet-lite0": 224 x 224, (v - 127) / 128; "pool", "logits". Weights from the extra
      `efficientnet` if none are given.
    - "classifier_fashion", the shipped classifier: 32 x 32 x 1 in [-1, 1]; "pool", "logits". Other
      weights of `experiments.train`'s classifier may be given.
    - "thumbnail": images of any size in [-1, 1]; "pool", the means of a 4x4 grid. No network and no
      weights, for smoke runs: it sees colours and layout alone.

    Args:
      name: one of the above.
      weights: path of the weights file (.safetensors, .pth, .bin; for Hugging Face also the folder), or
        `hub:OWNER/REPO/FILE` (see `eval.hub`).

    Raises:
      ValueError: an unknown name (listing those there are); weights that are missing (saying where they
        come from), damaged, of another network, or that the hub does not give.
    """
    if name not in _NETWORKS:
        near = difflib.get_close_matches(name, _NETWORKS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"No feature network is called {name!r}; there are {[*_NETWORKS]}.{hint}")
    return _NETWORKS[name](name, weights)


def caption_network(name: str, weights, vocabulary) -> CaptionNetwork:
    """The text tower of a CLIP: captions -> "pool" and "embedding", the latter for the CLIP score.

    Args:
      name: "clip-vit-b32" or "clip-vit-l14".
      weights: as for `feature_network`.
      vocabulary: folder with vocab.json and merges.txt, or bpe_simple_vocab_16e6.txt.gz; also
        `hub:OWNER/REPO` of the former.

    Raises:
      ValueError: as `feature_network` does, or for the vocabulary.
    """
    if name not in CLIP_CONFIGS:
        raise ValueError(f"No caption network is called {name!r}; there are {[*CLIP_CONFIGS]}.")
    config = CLIP_CONFIGS[name]
    source = _given(name, weights)
    tokenizer = load_tokenizer(on_disk(vocabulary, all_of=("vocab.json", "merges.txt")))
    if len(tokenizer.ids) != config.vocabulary:
        raise ValueError(
            f"the vocabulary {vocabulary} has {len(tokenizer.ids)} symbols and {name} was trained with "
            f"{config.vocabulary}; give CLIP's own."
        )
    params = clip_params(read_tensors(source), config, source)["text"]
    module = TextTower(config.text_config)

    def apply(captions: Sequence[str]) -> dict[str, jax.Array]:
        ids = tokenize(tokenizer, captions, config.positions)
        return _features(module, params, jnp.asarray(ids))

    return CaptionNetwork(name, fingerprint(params), apply)


def preparation(network: FeatureNetwork, tool: str = "") -> Callable[[np.ndarray], jax.Array]:
    """uint8 images [B, H, W, 1 or 3] -> what `network.apply` takes, as published for that network.

    Args:
      network: from `feature_network`.
      tool: whose resizing (a key of `tools.TOOLS`). Inception needs one, since its published scores
        differ by it; EfficientNet takes clean-fid's for "" ; CLIP (PIL's bicubic, centre cropped) and the
        classifier (no resizing) have one way only and do not look at it.

    Raises:
      ValueError: an unknown tool, or a network that is none of `feature_network`'s; later, images of
        another dtype or shape.
    """
    if network.name not in _NETWORKS:
        raise ValueError(
            f"how images are prepared for the network {network.name!r} is not known, only for "
            f"{[*_NETWORKS]}; give your own function as `prepare`."
        )
    if network.name == "inception-fid":
        find_tool(tool)
        return lambda images: preprocess(jnp.asarray(images), tool, network.size)
    if network.name == "efficientnet-lite0":
        row = find_tool(tool or "clean-fid")
        return lambda images: _centred(_rgb(images), network.size, row.rule)
    if network.name in CLIP_CONFIGS:
        return lambda images: jnp.asarray(clip_images.preprocess(np.asarray(images), network.size))
    return lambda images: to_unit_range(_uint8(images))


def _uint8(images) -> jax.Array:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"images are uint8 [B, H, W, 1 or 3], got {images.dtype} {list(images.shape)}; round "
            "samples to uint8 by the rule of the model's code first."
        )
    return jnp.asarray(images)


def _rgb(images) -> jax.Array:
    images = _uint8(images)
    return jnp.broadcast_to(images, (*images.shape[:3], 3))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _centred(images: jax.Array, size: int, rule: str) -> jax.Array:
    values = jnp.clip(resize(images, size, rule), 0.0, 255.0)
    return (values - 127.0) / 128.0


@functools.partial(jax.jit, static_argnums=0)
def _features(module: Any, params: Mapping, x: jax.Array) -> dict[str, jax.Array]:
    return module.apply({"params": params}, x)


def _network(name: str, module: Any, params: Mapping, size: int) -> FeatureNetwork:
    def apply(images: jax.Array) -> dict[str, jax.Array]:
        _check(images, name, (size, size, 3))
        return _features(module, params, images)

    return FeatureNetwork(name, fingerprint(params), size, apply)


def _check(images: jax.Array, name: str, shape: tuple[int, int, int]) -> None:
    if images.ndim != 4 or images.shape[1:] != shape or images.dtype != np.float32:
        raise ValueError(
            f"{name} takes preprocessed float32 images [B, {', '.join(map(str, shape))}], got "
            f"{images.dtype} {list(images.shape)}."
        )


def _given(name: str, weights) -> pathlib.Path:
    if weights is None:
        raise ValueError(f"{name} needs the path of its weights: {_SOURCES[name]}.")
    return on_disk(weights, any_of=_HUB_FILES)


def _inception(name: str, weights) -> FeatureNetwork:
    source = _given(name, weights)
    params = inception.inception_params(read_tensors(source), source)
    if not inception.is_published(source):
        logging.warning(
            "%s is not the published file (sha256 %s...): FID, sFID and IS are so called only if these are "
            "its weights in another format. Digest of the parameters: %s.",
            source,
            inception.PUBLISHED,
            fingerprint(params),
        )
    return _network(name, inception.Inception(), params, inception.SIZE)


def _clip(name: str, weights) -> FeatureNetwork:
    config, source = CLIP_CONFIGS[name], _given(name, weights)
    params = clip_params(read_tensors(source), config, source)["vision"]
    return _network(name, VisionTower(config), params, config.size)


def _efficientnet(name: str, weights) -> FeatureNetwork:
    source = efficientnet.installed_weights() if weights is None else on_disk(weights)
    params = efficientnet.efficientnet_params(read_tensors(source), source)
    return _network(name, efficientnet.EfficientNetLite0(), params, efficientnet.SIZE)


def _classifier(name: str, weights) -> FeatureNetwork:
    shipped = (
        importlib.resources.files("qdiff_jax.models") / "assets" / f"{_CLASSIFIER}.safetensors"
    )
    path = str(shipped if weights is None else on_disk(weights))
    classify = registry.classifier(path)
    params, header = load_weights(path)
    side, channels = header["model"]["resolution"], header["model"]["in_channels"]

    def apply(images: jax.Array) -> dict[str, jax.Array]:
        _check(images, name, (side, side, channels))
        logits, features = classify(images)
        return {"pool": features, "logits": logits}

    return FeatureNetwork(name, fingerprint(params), side, apply)


def _thumbnail(name: str, weights) -> FeatureNetwork:
    if weights is not None:
        raise ValueError(f"{name} has no weights, and {weights} was given; leave it out.")
    digest = hashlib.sha256(f"means of a {_GRID}x{_GRID} grid".encode()).hexdigest()
    return FeatureNetwork(name, digest, None, _grid_means)


@jax.jit
def _grid_means(images: jax.Array) -> dict[str, jax.Array]:
    batch, height, width, channels = images.shape
    if height % _GRID or width % _GRID:
        raise ValueError(f"thumbnail takes sides divisible by {_GRID}, got {images.shape}.")
    cells = images.reshape(batch, _GRID, height // _GRID, _GRID, width // _GRID, channels)
    return {"pool": cells.mean(axis=(2, 4)).reshape(batch, -1)}


_NETWORKS: dict[str, Callable[[str, Any], FeatureNetwork]] = {
    "inception-fid": _inception,
    "clip-vit-b32": _clip,
    "clip-vit-l14": _clip,
    "efficientnet-lite0": _efficientnet,
    _CLASSIFIER: _classifier,
    "thumbnail": _thumbnail,
}
