"""Images of a network that learns its variance: what is guided, and which networks can be asked."""

import dataclasses

import numpy as np
import pytest

from qdiff_jax.diffusion.guidance import classifier_free
from qdiff_jax.diffusion.sample import sample
from qdiff_jax.eval.samples import draw_samples, noise_key
from qdiff_jax.methods.run import make_sampler
from qdiff_jax.models.dit import DiTConfig
from qdiff_jax.models.families import make_module, model_json, parameter_shapes
from qdiff_jax.models.pixart import PixArtConfig
from qdiff_jax.models.registry import (
    load,
    predictor,
    sampling_predictor,
)
from qdiff_jax.models.unet_ddpm import UNetConfig
from qdiff_jax.models.unet_ldm import UNetLDMConfig
from qdiff_jax.models.unet_ldm_published import PUBLISHED
from qdiff_jax.runtime.weights import save_weights

from ..tiny_unet import random_params

CONFIG = DiTConfig(width=16, depth=1, heads=2, patch=4, resolution=8, in_channels=4, num_classes=3)
PLAN = make_sampler(
    {"schedule": "linear", "timesteps": 1000},
    {"name": "ddpm", "spacing": "spaced", "steps": 3, "options": {"variance": "learned_range"}},
)


def draw(config, guidance_scale=4.0, plan=PLAN, **options):
    return draw_samples(
        make_module(config),
        {"params": random_params(parameter_shapes(config)), "quant": {}},
        plan,
        seed=0,
        count=2,
        batch_size=2,
        shape=(8, 8, 4),
        classes=3,
        guidance_scale=guidance_scale,
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


# Guided diffusion's kind of U-Net, with labels and without a null class.
GUIDED = UNetLDMConfig(
    channels=8,
    multipliers=(1,),
    res_blocks=1,
    attention_downsampling=(),
    resolution=8,
    in_channels=4,
    out_channels=8,
    heads=1,
    head_channels=None,
    num_classes=3,
    groups=4,
)


def test_guided_diffusions_models_learn_their_variance():
    learned = {name for name, config in PUBLISHED.items() if config.learn_sigma}
    assert learned == {name for name in PUBLISHED if name.startswith("adm_")}
    module = make_module(GUIDED)
    assert sampling_predictor(module, PLAN) is predictor(module, True)
    with pytest.raises(ValueError, match="needs a network that learns one"):
        sampling_predictor(make_module(dataclasses.replace(GUIDED, out_channels=4)), PLAN)


def test_which_models_have_a_null_class(tmp_path):
    both = dataclasses.replace(GUIDED, context_dim=8)
    text = dataclasses.replace(both, num_classes=None)
    models = {GUIDED: None, both: 3, text: None, CONFIG: 3, PixArtConfig(): None}
    models |= {UNetConfig(): None, UNetConfig(num_classes=7): 7}
    for config, null in models.items():
        assert config.null_class == null
    header = {"model": model_json(GUIDED), "schedule": {"schedule": "linear", "timesteps": 1000}}
    save_weights(tmp_path / "m.safetensors", random_params(parameter_shapes(GUIDED)), header)
    guided = load(str(tmp_path / "m.safetensors"))
    assert (guided.classes, guided.null_class, guided.feature_class) == (3, None, 0)
    assert guided._replace(null_class=3).feature_class == 3


def test_a_model_without_a_null_class_is_not_guided():
    with pytest.raises(ValueError, match=r"scale 4\.0 evaluates .* no null class"):
        draw(GUIDED)
    # One step is enough: scale 1 and no guidance both give the network the labels as they are.
    one = make_sampler(
        {"schedule": "linear", "timesteps": 1000},
        {"name": "ddpm", "spacing": "spaced", "steps": 1, "options": {"variance": "learned_range"}},
    )
    found = [draw(GUIDED, scale, one) for scale in (1.0, -1.0)]
    np.testing.assert_array_equal(*found)
    assert np.isfinite(found[0]).all()
