"""TDQ and TCAQ-DM as methods: their stages, what they refuse, and one whole run each."""

import json

import numpy as np
import pytest

from experiments.quantize import quantize
from experiments.quantize_config import read_config
from experiments.quantize_settings import method_settings
from qdiff_jax.config import load_config
from qdiff_jax.export.bundle import load_bundle
from qdiff_jax.methods.registry import CalibrationSets, MethodSettings, build
from qdiff_jax.methods.tcaq import TcaqConfig, tcaq
from qdiff_jax.methods.tdq import TdqConfig, tdq
from qdiff_jax.models.registry import miniature
from qdiff_jax.observe.selectors import CalibrationSet
from qdiff_jax.quant.timed import TimeIndexed
from qdiff_jax.sites import flatten_sites
from qdiff_jax.stages.layer_rounding import ClosedFormConfig

from ..main_job import ROOT
from .cases import pairs

CONFIGS = ROOT / "configs" / "methods"
TIMES = np.float32([100.0, 900.0])
WORDS = ("w4a8", "w8a8,laptop", "w4a4,smoke", "w4a32,model=dit,smoke")


def calibration():
    zeros = np.zeros(2, np.int32)
    x = np.zeros((2, 8, 8, 1), np.float32)
    return CalibrationSet(x, TIMES, np.arange(2, dtype=np.int32), zeros, zeros, x)


def names(method):
    return [stage.name for stage in method.stages]


def made(name, **settings):
    sets = CalibrationSets(calibration(), calibration(), TIMES)
    return build(name, miniature().model, sets, MethodSettings(**settings))


def test_tdq_has_a_post_training_and_an_aware_form():
    assert names(made("tdq")) == [
        "calibrate_weights",
        "tdq_weights",
        "calibrate_time_scales",
        "reconstruct_time_scales",
    ]
    solve = ClosedFormConfig(walk_batch=2)
    assert names(made("tdq", rounding="closed_form", closed_form=solve)) == [
        "calibrate_time_scales",
        "calibrate_weights",
        "tdq_weights",
        "reconstruct_time_scales",
    ]
    assert names(made("tdq", tdq=TdqConfig(mode="qat"))) == [
        "per_tensor_weights",
        "calibrate_weights",
        "calibrate_time_scales",
        "train_time_scales",
    ]


def test_tcaq_is_made_of_parts_that_can_be_left_out():
    sets = (miniature().model, calibration(), calibration(), TIMES)
    full = tcaq(*sets, source=pairs())
    assert names(full) == [
        "calibrate_channel_factors",
        "calibrate_weights",
        "calibrate_activations",
        "calibrate_softmax_grids",
        "tcaq_round_0",
        "resample_1",
        "tcaq_round_1",
        "resample_2",
        "tcaq_round_2",
    ]
    solved = names(tcaq(*sets, source=pairs(), rounding="closed_form", config=TcaqConfig(rounds=1)))
    assert solved[4:] == [
        "tcaq_weights_0",
        "tcaq_round_0",
        "resample_1",
        "tcaq_weights_1",
        "tcaq_round_1",
    ]
    bare = tcaq(*sets, source=None, config=TcaqConfig(tcr=False, daq=False, rounds=0))
    assert names(bare) == ["calibrate_weights", "calibrate_activations", "tcaq_round_0"]


def test_what_they_cannot_do_is_refused():
    sets = (miniature().model, calibration(), calibration(), TIMES)
    with pytest.raises(ValueError, match="rounds=0"):
        tcaq(*sets, source=None)
    for method in (lambda **k: tcaq(*sets, None, **k), lambda **k: tdq(*sets, **k)):
        with pytest.raises(ValueError, match="rounding 'nearest' is unknown"):
            method(rounding="nearest")
    with pytest.raises(ValueError, match="mode='qat' trains its weights"):
        tdq(*sets, rounding="closed_form", config=TdqConfig(mode="qat"))
    with pytest.raises(ValueError, match="one of .*ptq.*qat"):
        TdqConfig(mode="qad")


@pytest.mark.parametrize("name", ["tdq", "tcaq"])
@pytest.mark.parametrize("words", WORDS)
def test_every_word_of_the_config_is_read(name, words):
    config = read_config(load_config(f"{CONFIGS}/{name}.py:{words}"))
    settings = method_settings(config)
    assert {v.method for v in config.variants.values()} == {"rtn", name}
    if words == "w4a8":  # the papers' sizes
        assert settings.weights.steps == 20_000
        assert settings.tdq.train.steps == 200_000 or name == "tcaq"
        assert settings.tcaq == TcaqConfig()


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["adaround", "closed_form"])
@pytest.mark.parametrize("name", ["tdq", "tcaq"])
def test_the_whole_method_runs_to_a_bundle_and_a_report(name, rounding, tmp_path):
    config = load_config(f"{CONFIGS}/{name}.py:w4a8,rounding={rounding},smoke")
    with config.unlocked():
        del config.variants["rtn_w4a8"]
    quantize(config, tmp_path)
    (_, variant) = json.loads((tmp_path / "report.json").read_text())["variants"]
    assert variant["name"] == f"{name}_w4a8"
    assert np.isfinite(variant["eps_rel_mse"])
    bundle = load_bundle(tmp_path / "variants" / f"{name}_w4a8" / "bundle")
    flat = flatten_sites(bundle.quant)
    if name == "tdq":  # every activation by an ordinary step table
        assert all(isinstance(site.lhs, TimeIndexed) for site in flat.values())
        assert {site.lhs.table.spec.grid for site in flat.values()} == {"affine"}
    else:
        record = json.loads((tmp_path / "variants" / f"{name}_w4a8" / "quantize.json").read_text())
        stages = {key.split("_", 1)[1]: report for key, report in record["stages"].items()}
        assert stages["resample_2"]["gap"] < stages["resample_1"]["gap"]
        assert isinstance(flat["mid_attn_1/pv"].lhs, TimeIndexed)
