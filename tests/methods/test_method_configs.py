"""What the words of configs/methods set: the papers' sizes, ablations, and what they refuse. Nothing is run."""

import pathlib

import numpy as np
import pytest

from experiments.quantize_config import read_config
from experiments.quantize_job import prepare
from experiments.quantize_sets import calibration_sets
from experiments.quantize_settings import check_sizes, method_settings
from qdiff_jax.config import load_config
from qdiff_jax.methods.builders import second_phase
from qdiff_jax.methods.tfmq import tfmq
from qdiff_jax.observe.trajectory import Trajectory
from qdiff_jax.stages.progressive import round_configs

from .cases import TIMESTEPS, calibration, model

FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "methods"


def read(name, words=""):
    return read_config(load_config(f"{FOLDER}/{name}.py:{words}"))


@pytest.mark.parametrize(
    ("name", "samples"),
    [("qdiffusion", 256), ("tfmq", 256), ("tdq", 256), ("tcaq", 256), ("ptqd", 1024)],
)
def test_the_papers_sizes_are_the_default_and_a_laptops_are_not(name, samples):
    config = read(name)
    assert config.calibration.samples == samples
    check_sizes(config, config.sampler.steps)
    assert read(name, "laptop").calibration.samples == 16


def test_ptqd_stands_on_brecq_as_in_its_paper():
    config = read("ptqd")
    settings = method_settings(config)
    assert (config.ptqd.base, config.ptqd.per_tensor) == ("brecq", True)
    assert (settings.weights.steps, settings.weights.batch_size) == (10_000, 8)
    phase = second_phase(settings)
    assert (phase.steps, phase.batch_size, phase.p) == (5_000, 16, 2.4)
    assert (config.calibration.selector, config.calibration.count) == ("random_steps", 1024)
    assert not read("ptqd", "base=rtn").ptqd.per_tensor
    assert read("ptqd", "laptop").ptqd.base == "rtn"


def test_the_second_phase_has_its_own_length_everywhere():
    settings = method_settings(read("qdiffusion", "laptop"))
    assert settings.weights.temporal_steps == 2000
    phase = second_phase(settings)
    assert (phase.steps, phase.temporal_steps) == (40, 0)
    assert phase.batch_size == settings.weights.batch_size


def test_activation_bits_by_step_are_in_the_name():
    assert set(read("ptqd", "w4a4,mixed,laptop").variants) == {"ptqd_mixed_w4a4"}


def test_bits_by_step_without_activation_bits_are_refused_before_any_work():
    with pytest.raises(ValueError, match="ptqd_mixed_w4a32: bits by step need activations"):
        prepare(load_config(f"{FOLDER}/ptqd.py:w4a32,mixed,smoke"))


@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
def test_rounds_cost_as_much_as_no_rounds(rounds):
    config = read("tcaq", f"laptop,rounds={rounds}")
    settings = method_settings(config)
    made = round_configs(settings.weights, rounds, config.tcaq.round_share)
    assert sum(c.steps for c in made) == pytest.approx(150, abs=rounds)
    assert sum(c.temporal_steps for c in made) == pytest.approx(1500, abs=rounds)


def test_a_budget_says_at_what_length_rounds_are_compared():
    assert read("tcaq", "rounds=0").reconstruct.steps == 20_000
    assert read("tcaq", "rounds=0,budget=2").reconstruct.steps == 30_000
    assert read("tcaq", "rounds=0,budget=4,laptop").reconstruct.temporal_steps == 2000


def test_without_daq_the_tables_stay():
    for words in ("no_daq", "criterion=uniform", "uniform"):
        config = read("tcaq", f"{words},laptop").tcaq
        assert (config.daq, config.softmax.criterion) == (True, "uniform")
    assert read("tcaq").tcaq.softmax.criterion == "mle"
    assert read("tcaq", "attn_out_mse").tcaq.softmax.criterion == "attn_out_mse"
    with pytest.raises(ValueError, match="no_daq is criterion=uniform, and criterion=mse"):
        read("tcaq", "no_daq,criterion=mse")


def test_the_words_of_tfmq():
    config = read("tfmq")
    assert (config.tfmq_split, config.activations.batch_size) == ("shortcut", 16)
    assert read("tfmq", "laptop").tfmq_split == "none"
    assert read("tfmq", "laptop,split=both").tfmq_split == "both"
    settings = method_settings(read("tfmq", "laptop,faithful,freeze"))
    assert (settings.variant, settings.faithful_margin, settings.freeze) == ("faithful", 1.0, True)
    assert method_settings(read("tfmq", "faithful,margin=1.1")).faithful_margin == 1.1


def test_what_tfmq_is_made_of_frozen_and_split():
    sets = (model(), calibration(), calibration(), TIMESTEPS)
    made = tfmq(*sets, freeze=True, split="shortcut")
    assert [stage.name for stage in made.stages] == [
        "split_skips",
        "calibrate_weights",
        "round_frozen",
        "tfmq_weights",
        "calibrate_activations",
    ]
    assert "freeze, split=shortcut" in made.notes
    for other in ({"tiar": False}, {"rounding": "closed_form"}):
        with pytest.raises(ValueError, match="leaves the temporal block at its nearest codes"):
            tfmq(*sets, freeze=True, **other)


def test_the_words_of_ndtc_reach_the_set():
    """States that hold the number of their step: mirrored, they belong to the step from the other end."""
    steps, samples = 10, 64
    position = np.broadcast_to(np.arange(steps, dtype=np.float32)[:, None], (steps, samples))
    zeros = np.zeros(samples, np.int32)
    index = np.arange(steps, dtype=np.int32)
    trajectory = Trajectory(
        position, np.float32(index), index, None, position, zeros, np.arange(samples)
    )

    def drawn(words):
        config = read("ptq4dm", f"laptop,{words}")
        return calibration_sets(config, trajectory).weights

    mirrored = drawn("mirror_bug,mean=0.2,std=0.1")
    np.testing.assert_array_equal(mirrored.x, steps - 1 - mirrored.index)
    plain = drawn("mean=0.2,std=0.1")
    np.testing.assert_array_equal(plain.x, plain.index)
    assert plain.index.max() <= 6
    assert drawn("std=0").index.tolist() == [4] * 256
