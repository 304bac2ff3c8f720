"""What a config says of a sampler reaches its plan, and stays silent about what is at its default."""

import dataclasses

import numpy as np
import pytest

from configs import evaluate as evaluate_configs
from configs import quickstart
from experiments.evaluate_config import protocol
from experiments.evaluate_config import read_config as read_evaluation
from experiments.quantize_config import SamplerConfig
from experiments.quantize_config import read_config as read_quantization
from qdiff_jax.diffusion.protocols import PROTOCOLS
from qdiff_jax.methods.run import make_sampler

LINEAR = {"schedule": "linear", "timesteps": 1000}


def test_a_default_config_is_written_as_it_always_was():
    assert SamplerConfig().as_json() == {
        "name": "ddim",
        "spacing": "uniform",
        "steps": 20,
        "options": {"eta": 0.0},
        "guidance_scale": -1.0,
    }
    config = read_evaluation(evaluate_configs.get_config("smoke"))
    assert "uint8" not in protocol(config, "", "", LINEAR)
    cut = dataclasses.replace(config, uint8="trunc_255")
    assert protocol(cut, "", "", LINEAR)["uint8"] == "trunc_255"


def test_a_config_can_ask_for_a_published_sampler():
    asked = {
        "sd14_plms50_cfg7p5": SamplerConfig(
            name="plms", spacing="uniform", steps=50, offset=1, final="first"
        ),
        "imagenet_20_cfg3": SamplerConfig(steps=20, offset=1, final="first"),
        "dit_50_cfg1p5": SamplerConfig(
            name="ddpm", spacing="spaced", steps=50, variance="learned_range", guided_channels=3
        ),
    }
    for name, config in asked.items():
        schedule = PROTOCOLS[name].schedule
        made, published = (
            make_sampler(schedule, sampler)
            for sampler in (config.as_json(), PROTOCOLS[name].sampler)
        )
        assert made.sampler is published.sampler
        for row in published.rows:
            np.testing.assert_array_equal(made.rows[row], published.rows[row])
    assert asked["dit_50_cfg1p5"].as_json()["guided_channels"] == 3


def test_what_cannot_be_done_is_refused_when_the_config_is_read():
    config = evaluate_configs.get_config("smoke")
    config.uint8 = "floor"
    with pytest.raises(ValueError, match="config.uint8='floor' is not known.*trunc_255"):
        read_evaluation(config)
    for key, value in (("variance", "learned_range"), ("guided_channels", 3)):
        config = quickstart.get_config("smoke")
        config.sampler[key] = value
        with pytest.raises(ValueError, match=f"config.sampler.{key} is {value!r}; use one of"):
            read_quantization(config)
