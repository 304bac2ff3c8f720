"""What methods are made of, stage by stage, and what they refuse; nothing is run but one walk."""

import pytest

from qdiff_jax.methods.brecq import brecq, paper_activation_steps
from qdiff_jax.methods.ptq4dm import ptq4dm
from qdiff_jax.methods.ptqd import PTQDConfig
from qdiff_jax.methods.qdiffusion import qdiffusion
from qdiff_jax.methods.registry import CalibrationSets, MethodSettings, build
from qdiff_jax.methods.tfmq import tfmq

from .cases import TIMESTEPS, calibration, method, model, outcome


def names(name: str, steps: int = 0) -> list[str]:
    return [stage.name for stage in method(name, steps).stages]


def test_stages_of_each_method_in_order():
    sets = (calibration(), calibration(), TIMESTEPS)
    full = brecq(model(), *sets, activation_steps=paper_activation_steps(steps=10))
    assert [stage.name for stage in full.stages] == [
        "calibrate_weights",
        "brecq_weights",
        "calibrate_activations",
        "brecq_activation_steps",
    ]
    assert names("brecq") == [stage.name for stage in full.stages[:3]]
    assert names("qdiffusion", 8) == ["split_skips", *(stage.name for stage in full.stages)]
    assert names("tfmq") == ["calibrate_weights", "tfmq_weights", "calibrate_activations"]
    assert names("rtn") == ["calibrate_weights", "round_to_nearest", "calibrate_activations"]
    assert names("ptq4dm") == ["symmetric_weights", *names("rtn")]
    assert names("ptqd") == [*names("rtn"), "calibrate_correction"]
    assert names("binarydm") == ["calibrate_activations", "calibrate_weights", "train_binary"]
    assert names("closed_form") == [
        "calibrate_activations",
        "calibrate_weights",
        "closed_form_weights",
    ]


def test_paper_activation_steps_are_those_of_the_specification():
    config = paper_activation_steps()
    assert (config.steps, config.scale_lr, config.p) == (5000, 4e-4, 2.4)
    assert (config.trains, config.inputs) == ("scales", "full_precision")


def test_inputs_and_targets_of_both_phases_cost_at_most_three_passes():
    # The second phase reads full precision alone: one pass, see the tests of the stage.
    assert outcome("brecq").reports["brecq_weights"]["network_passes"] + 1.0 <= 3.0


def test_unknown_names_are_refused():
    sets = (calibration(), calibration(), TIMESTEPS)
    with pytest.raises(ValueError, match="variant 'code' is unknown.*faithful"):
        tfmq(model(), *sets, variant="code")
    with pytest.raises(ValueError, match="'breqc' is unknown.*Did you mean 'brecq'"):
        build("breqc", model(), CalibrationSets(*sets), MethodSettings())
    with pytest.raises(ValueError, match="step tables at every site, which fsc=False switches off"):
        tfmq(model(), *sets, variant="faithful", fsc=False)
    settings = MethodSettings(ptqd=PTQDConfig(base="ptqd"))
    with pytest.raises(ValueError, match="PTQD goes on top of another method, not of 'ptqd'"):
        build("ptqd", model(), CalibrationSets(*sets, paired=object()), settings)
    with pytest.raises(ValueError, match="rounding 'nearest' is unknown"):
        qdiffusion(model(), calibration(), TIMESTEPS, rounding="nearest")
    with pytest.raises(ValueError, match="ptq4dm rounds to the nearest code, not by 'adaround'"):
        ptq4dm(model(), calibration(), rounding="adaround")


def test_options_of_ptqd_are_checked():
    for options in ({"variant": "code"}, {"step_bits": (4, 9)}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=rf"ptqd\.{next(iter(options))}"):
            PTQDConfig(**options)
    sets = CalibrationSets(None, None, TIMESTEPS)
    with pytest.raises(ValueError, match="needs paired estimates"):
        build("ptqd", model(), sets, MethodSettings())
