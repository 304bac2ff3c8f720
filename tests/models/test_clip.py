"""CLIP's towers against transformers and against OpenAI's layout, on seeded weights."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.eval.networks.clip_images import preprocess
from qdiff_jax.models.clip import (
    SD_TEXT,
    VIT_B32,
    VIT_L14,
    ClipConfig,
    TextConfig,
    TextTower,
    TowerConfig,
    VisionTower,
    clip_shapes,
    text_shapes,
)
from qdiff_jax.models.port.clip import clip_params, text_config, text_params

from ..parity.networks import seeded

CASE = pathlib.Path(__file__).parents[1] / "parity" / "networks" / "clip.npz"
TINY = ClipConfig(
    TowerConfig(32, 2, 4),
    TowerConfig(24, 2, 3),
    embedding_dim=20,
    patch=8,
    size=24,
    vocabulary=50,
    positions=12,
)


@functools.cache
def stored():
    with np.load(CASE, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def tensors(layout):
    return seeded.state_dict(json.loads(str(stored()[f"{layout}/manifest"])))


@functools.partial(jax.jit, static_argnums=0)
def run(module, params, x):
    return module.apply({"params": params}, x)


@pytest.mark.parametrize("layout", ["hugging_face", "open_ai"])
def test_the_features_of_both_towers(layout):
    params = clip_params(tensors(layout), TINY, "the seeded weights")
    images = seeded.normal("image", (2, 24, 24, 3)).astype(np.float32)
    found = {
        "image": run(VisionTower(TINY), params["vision"], jnp.asarray(images)),
        "text": run(TextTower(TINY.text_config), params["text"], jnp.asarray(stored()["ids"])),
    }
    compared = 0
    for key, expected in stored().items():
        if key.startswith(f"{layout}/") and "_" in key.split("/")[1]:
            tower, output = key.split("/")[1].split("_")
            tolerance = 1e-4 * expected.std()
            np.testing.assert_allclose(found[tower][output], expected, rtol=0, atol=tolerance)
            compared += 1
    assert compared == (4 if layout == "hugging_face" else 2)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config"), [("clip-vit-b32", VIT_B32), ("clip-vit-l14", VIT_L14)])
def test_the_embeddings_at_the_published_sizes(name, config):
    """All layers and heads, 224 pixels and 77 tokens: 0.6 and 1.7 GB of weights, a minute each."""
    with np.load(CASE.with_name("clip_sizes.npz"), allow_pickle=False) as file:
        case = {key.removeprefix(f"{name}/"): file[key] for key in file.files}
    params = clip_params(seeded.state_dict(json.loads(str(case["manifest"]))), config, name)
    picture = jnp.asarray(seeded.pictures(224)[:1])
    found = {
        "image": run(VisionTower(config), params["vision"], picture),
        "text": run(TextTower(config.text_config), params["text"], jnp.asarray(case["ids"])),
    }
    for tower, features in found.items():
        expected = case[tower]
        assert features["embedding"].shape == expected.shape
        tolerance = 1e-4 * expected.std()
        np.testing.assert_allclose(features["embedding"], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("config", "parameters"), [(VIT_B32, 151_277_313), (VIT_L14, 427_616_513)])
def test_the_published_sizes(config, parameters):
    # The published counts include the temperature.
    assert 1 + sum(leaf.size for leaf in jax.tree.leaves(clip_shapes(config))) == parameters


@pytest.mark.parametrize("layout", ["hugging_face", "open_ai"])
def test_strict_both_ways(layout):
    whole = tensors(layout)
    extra = {"text_model.embeddings.position_ids": np.arange(12)[None]}  # old files carry it
    clip_params({**whole, **extra}, TINY, "f")
    with pytest.raises(ValueError, match=r"1 tensors without a parameter: vis.*projection\.bias"):
        clip_params({**whole, "visual_projection.bias": np.zeros(20)}, TINY, "f")
    lacking = [key for key in whole if "layers.1.mlp.fc1" in key or "resblocks.1.mlp.c_fc" in key]
    for key in lacking:
        del whole[key]
    with pytest.raises(ValueError, match=r"4 parameters without a tensor: .*/block_1/fc1/"):
        clip_params(whole, TINY, "f")


def test_wrong_inputs():
    params = clip_params(tensors("hugging_face"), TINY, "f")
    with pytest.raises(ValueError, match=r"images \[B, 24, 24, 3\], got"):
        run(VisionTower(TINY), params["vision"], jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(ValueError, match="N <= 12"):
        run(TextTower(TINY.text_config), params["text"], jnp.zeros((1, 13), jnp.int32))


@pytest.mark.parametrize("name", ["down", "up"])
def test_preprocessing_is_that_of_transformers(name):
    found = preprocess(stored()[f"{name}/image"][None], 24)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], stored()[f"{name}/pixels"], rtol=0, atol=1e-6)


def test_preprocessing_of_grey_images_and_of_floats():
    grey = stored()["up/image"][None, :, :, :1]
    np.testing.assert_array_equal(preprocess(grey, 24), preprocess(np.repeat(grey, 3, -1), 24))
    with pytest.raises(ValueError, match="uint8"):
        preprocess(grey.astype(np.float32), 24)


@functools.cache
def text_case():
    with np.load(CASE.with_name("text_encoders.npz"), allow_pickle=False) as file:
        case = {k.removeprefix("clip/"): file[k] for k in file.files if k.startswith("clip/")}
    meta = json.loads(str(case.pop("meta")))
    return case, text_config(meta["config"]), seeded.state_dict(meta["manifest"])


def test_the_hidden_states_that_condition_a_diffusion_model():
    """Without a projection, within 4 times what transformers' float32 is from its float64, also in the
    padding, which may be the end (Stable Diffusion) or 0 (OpenAI)."""
    case, config, state = text_case()
    assert config == TextConfig(TowerConfig(24, 2, 3, 40), vocabulary=50, positions=12)
    params = text_params(state, config)
    found = run(TextTower(config), params, case["ids"])
    assert set(found) == {"hidden", "pool"}
    hidden = np.asarray(found["hidden"])
    assert np.abs(hidden - case["hidden"]).max() < 4 * case["float32_error"]
    # The same caption, filled up in the two ways: equal up to its end, different behind.
    np.testing.assert_allclose(hidden[0, :5], hidden[1, :5], atol=1e-6)
    assert np.abs(hidden[0, 5:] - hidden[1, 5:]).max() > 0.1
    np.testing.assert_array_equal(found["pool"][0], hidden[0, 4])


def test_where_a_text_tower_is_found():
    _, config, state = text_case()
    params = text_params(state, config)
    assert all(key.startswith("text_model.") for key in state)
    bare = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    stable_diffusion = {f"cond_stage_model.transformer.{k}": v for k, v in state.items()}
    stable_diffusion["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(
        12
    )
    stable_diffusion["model.diffusion_model.out.2.bias"] = np.zeros(4)
    for other in (bare, stable_diffusion):
        jax.tree.map(np.testing.assert_array_equal, params, text_params(other, config))
    with pytest.raises(ValueError, match=r"1 tensors without a parameter: text_projection\.weight"):
        text_params(state | {"text_projection.weight": np.zeros((20, 24))}, config)
    projected = dataclasses.replace(config, embedding_dim=20)
    both = text_params(bare | {"text_projection.weight": np.ones((20, 24))}, projected)
    assert both["projection"]["kernel"].shape == (24, 20)


def test_the_text_tower_of_stable_diffusion():
    shapes = text_shapes(SD_TEXT)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 123_060_480


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "f describes a t5"),
        ({"hidden_act": "gelu"}, "not built here: hidden_act='gelu'"),  # that of Stable Diffusion 2
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps=1e-06"),
    ],
)
def test_text_configs_of_other_models(change, message):
    with np.load(CASE.with_name("text_encoders.npz"), allow_pickle=False) as file:
        fields = json.loads(str(file["clip/meta"]))["config"]
    assert (
        text_config(fields | {"architectures": ["CLIPTextModelWithProjection"]}).embedding_dim == 20
    )
    with pytest.raises(ValueError, match=message):
        text_config(fields | change, "f")


def test_a_text_config_that_is_cut():
    with np.load(CASE.with_name("text_encoders.npz"), allow_pickle=False) as file:
        fields = json.loads(str(file["clip/meta"]))["config"]
    fields |= {"architectures": ["CLIPTextModelWithProjection"]}
    cut = {k: v for k, v in fields.items() if k not in ("vocab_size", "projection_dim")}
    with pytest.raises(ValueError, match="f lacks vocab_size, projection_dim: it is cut"):
        text_config(cut, "f")
