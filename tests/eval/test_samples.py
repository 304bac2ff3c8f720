"""Images of a network that learns its variance: what is guided, and which networks can be asked."""

import dataclasses

import numpy as np
import pytest

from qdiff_jax.diffusion.guidance import classifier_free
from qdiff_jax.diffusion.sample import sample
from qdiff_jax.eval.samples import draw_samples, noise_key
from qdiff_jax.methods.run import make_sampler
from qdiff_jax.models.dit import DiTConfig
from qdiff_jax.models.families import make_module, parameter_shapes
from qdiff_jax.models.registry import predictor

from ..tiny_unet import random_params

CONFIG = DiTConfig(width=16, depth=1, heads=2, patch=4, resolution=8, in_channels=4, num_classes=3)
PLAN = make_sampler(
    {"schedule": "linear", "timesteps": 1000},
    {"name": "ddpm", "spacing": "spaced", "steps": 3, "options": {"variance": "learned_range"}},
)


def draw(config, **options):
    return draw_samples(
        make_module(config),
        {"params": random_params(parameter_shapes(config)), "quant": {}},
        PLAN,
        seed=0,
        count=2,
        batch_size=2,
        shape=(8, 8, 4),
        classes=3,
        guidance_scale=4.0,
        first=0,
        **options,
    )


@pytest.mark.parametrize(("asked", "guided"), [(0, 4), (3, 3)])
def test_a_learned_variance_is_never_guided_and_of_the_estimate_as_many_channels_as_asked(
    asked, guided
):
    expected = sample(
        predictor(make_module(CONFIG), variance=True),
        {"params": random_params(parameter_shapes(CONFIG)), "quant": {}},
        PLAN,
        noise_key(0),
        [0, 1],
        shape=(8, 8, 4),
        y=np.array([0, 1], np.int32),
        guidance=classifier_free(4.0, 3, channels=guided),
    ).x
    np.testing.assert_array_equal(draw(CONFIG, guided_channels=asked), expected)
    assert np.isfinite(expected).all()


def test_a_network_without_a_variance_cannot_be_asked_for_one():
    with pytest.raises(ValueError, match="'learned_range' needs a network that learns one"):
        draw(dataclasses.replace(CONFIG, learn_sigma=False))
