"""Pipelines: what a prompt or a label becomes, the null condition, latents to pictures."""

import jax
import numpy as np
import pytest

from qdiff_jax.diffusion.guidance import classifier_free, null_labels
from qdiff_jax.models import clip_tokenizer
from qdiff_jax.models.families import example_inputs, parse_model
from qdiff_jax.models.miniature_pipelines import byte_tokenizer, miniature_pipeline
from qdiff_jax.models.pipeline import Pipeline, conditions, decode, null_condition

PROMPTS = ["a red circle", "a blue square"]
LATENT = ("random:ldm", "random:dit_latent", "random:sd", "random:pixart")


def asked(pipeline, count=2):
    return PROMPTS[:count] if pipeline.takes == "prompts" else np.arange(count)


@pytest.mark.parametrize("name", [*LATENT, "random:miniature"])
def test_a_condition_is_what_the_network_takes(name):
    pipeline = miniature_pipeline(name)
    y = conditions(pipeline, asked(pipeline))
    wanted = example_inputs(parse_model(pipeline.diffusion.config), 2)[2]
    assert jax.tree.structure(y) == jax.tree.structure(wanted)
    for found, example in zip(jax.tree.leaves(y), jax.tree.leaves(wanted)):
        assert (found.shape, found.dtype) == (example.shape, example.dtype)
    # Guidance takes the null condition as it is.
    null = null_labels(classifier_free(2.0, null_condition(pipeline)), y)
    assert jax.tree.map(np.shape, null) == jax.tree.map(np.shape, y)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(null), jax.tree.leaves(y)))


@pytest.mark.parametrize("name", ["random:sd", "random:pixart"])
def test_a_prompt_has_its_own_row_whatever_it_is_encoded_with(name):
    pipeline = miniature_pipeline(name)
    both, other = conditions(pipeline, PROMPTS), conditions(pipeline, PROMPTS[1:])
    for leaf, alone in zip(jax.tree.leaves(both), jax.tree.leaves(other)):
        np.testing.assert_array_equal(leaf[1:], alone)
    many = conditions(pipeline, [*PROMPTS] * 10)  # more than one batch of texts
    for leaf, more in zip(jax.tree.leaves(both), jax.tree.leaves(many)):
        np.testing.assert_array_equal(np.tile(leaf, (10, *[1] * (leaf.ndim - 1))), more)


def test_pixart_is_told_the_size_of_the_picture_and_which_tokens_are_padding():
    y = conditions(miniature_pipeline("random:pixart"), ["abc"])
    assert y["mask"].tolist() == [[1, 1, 1, 1] + [0] * 8]  # three bytes and the end
    assert y["resolution"].tolist() == [[16, 16]]
    assert y["aspect_ratio"].tolist() == [[1]]


@pytest.mark.parametrize("name", ["random:ldm", "random:sd"])
def test_latents_become_pictures_in_any_batches(name):
    pipeline = miniature_pipeline(name)
    latents = np.random.default_rng(0).normal(size=(3, *pipeline.latent_shape)).astype(np.float32)
    images = decode(pipeline, latents, 2)
    assert images.shape == (3, *pipeline.image_shape)
    np.testing.assert_allclose(decode(pipeline, latents[::-1], 2)[::-1], images, atol=1e-5)
    assert np.abs(images[0] - images[1]).max() > 1e-2


def test_a_model_in_pixels_is_its_own_pipeline():
    pipeline = Pipeline(miniature_pipeline("random:miniature").diffusion)
    x = np.ones((2, 8, 8, 1), np.float32)
    np.testing.assert_array_equal(decode(pipeline, x), x)
    assert pipeline.image_shape == pipeline.latent_shape == (8, 8, 1)
    assert null_condition(pipeline) == 10


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        ("random:sd", [3, 4], "conditional on prompts, and was given 3"),
        ("random:ldm", ["a cat"], "conditional on labels, and was given 'a cat'"),
        ("random:ldm", np.array([0, 11]), "whole numbers .* from 0 to 10"),
        ("random:ldm", np.array([0.5]), "whole numbers"),
        ("random:sd", None, "give it prompts, one for each sample"),
        ("random:sd", [], "give it prompts, one for each sample"),
    ],
)
def test_the_wrong_condition_is_refused(name, wanted, message):
    with pytest.raises(ValueError, match=message):
        conditions(miniature_pipeline(name), wanted)


def test_a_byte_is_a_token_of_the_vocabulary_made_in_code():
    tokenizer = byte_tokenizer()
    ids = clip_tokenizer.encode(tokenizer, "ab c")
    symbols = {i: symbol for symbol, i in tokenizer.ids.items()}
    assert [symbols[i] for i in ids] == ["a", "b</w>", "c</w>"]
    assert max(tokenizer.ids.values()) == tokenizer.ids[clip_tokenizer.END] == 513
