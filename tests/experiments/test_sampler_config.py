"""What a config says of a sampler reaches its plan, and stays silent about what is at its default."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import evaluate as evaluate_configs
from configs import quickstart
from configs._sampler import sampler
from configs.methods import efficientdm
from experiments.evaluate_config import protocol
from experiments.evaluate_config import read_config as read_evaluation
from experiments.quantize_config import SamplerConfig
from experiments.quantize_config import read_config as read_quantization
from experiments.quantize_job import prepare, sampling_of
from qdiff_jax.config import load_config
from qdiff_jax.diffusion.euler import euler
from qdiff_jax.diffusion.protocols import PROTOCOLS
from qdiff_jax.diffusion.samplers import ddim
from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.diffusion.timesteps import make_timesteps
from qdiff_jax.methods.run import make_sampler
from qdiff_jax.observe.sources import SourceConfig, make_source

from ..main_job import ROOT

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


def test_euler_starts_and_interpolates_as_the_config_says():
    asked = SamplerConfig(name="euler", spacing="leading", steps=10, offset=1)
    own = dataclasses.replace(asked, start="unit", interpolation="log_sigma")
    noise = dataclasses.replace(asked, start="noise")
    plain, made = (make_sampler(LINEAR, config.as_json()) for config in (noise, own))
    grid = make_timesteps("leading", 1000, 10, offset=1)
    wanted = euler(make_schedule("linear"), grid, start="unit", interpolation="log_sigma")
    jax.tree.map(np.testing.assert_array_equal, made, wanted)
    assert plain.start_scale < made.start_scale == 1.0
    with pytest.raises(ValueError, match="spacing 'leading' starts with .*: say which"):
        make_sampler(LINEAR, asked.as_json())
    with pytest.raises(ValueError, match=r"'ddim' has no option \['start'\]"):
        make_sampler(LINEAR, SamplerConfig(start="unit").as_json())


def sampling(**sampler):
    config = quickstart.get_config("smoke")
    for key, value in sampler.items():
        config.sampler[key] = value
    config.activations.batch_size = 4
    job = prepare(config)
    return job, sampling_of(job)


def test_a_source_of_training_batches_samples_as_the_config_says():
    """With PLMS the sampler calls the network once more than there are timesteps."""
    job, own = sampling(name="plms", spacing="uniform", steps=10, offset=1, final="first")
    assert job.sampler.steps == 11
    source = make_source(SourceConfig(sampling_steps=0), job.sampler.steps, own, None)
    grid = make_timesteps("uniform", 1000, 10, offset=1)
    wanted = ddim(job.diffusion.schedule, grid, eta=1.0, final="first")
    jax.tree.map(np.testing.assert_array_equal, source.data, wanted)
    more = make_source(SourceConfig(sampling_steps=20), job.sampler.steps, own, None)
    np.testing.assert_array_equal(more.timesteps, make_timesteps("uniform", 1000, 20, offset=1))
    velocity = {**job.diffusion.source["schedule"], "prediction": "v"}
    diffusion = job.diffusion._replace(source={"schedule": velocity})
    pipeline = job.asked.pipeline._replace(diffusion=diffusion)
    job = job._replace(asked=job.asked._replace(pipeline=pipeline))
    source = make_source(SourceConfig(), 11, sampling_of(job), None)
    assert source.data.sampler is ddim(job.diffusion.schedule, grid, prediction="v").sampler


def test_a_source_that_cannot_be_is_refused_before_any_work():
    config = efficientdm.get_config("smoke")
    config.efficientdm.source.sampling_steps = 300
    config.sampler.spacing = "uniform"
    with pytest.raises(ValueError, match="spacing 'uniform' with steps=300 would visit 334"):
        prepare(config)


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


@pytest.mark.parametrize(
    "name", ["quickstart", "evaluate", "eval/sd14_plms50_cfg7p5", "methods/tdq"]
)
def test_every_key_of_a_sampler_can_be_a_flag(name):
    """A ConfigDict takes no key from the command line that its file does not write."""
    config = load_config(f"{ROOT}/configs/{name}.py")
    assert set(config.sampler) == {field.name for field in dataclasses.fields(SamplerConfig)}
    assert sampler() == dataclasses.asdict(SamplerConfig())
    with pytest.raises(TypeError, match="no \\['shfit'\\]"):
        sampler(shfit=3.0)
