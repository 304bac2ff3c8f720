"""EfficientDM on the shipped U-Net, whose activation ranges move with the step as the toy's do not."""

import json

import pytest

from experiments.quantize import quantize
from qdiff_jax.config import load_config

from ..main_job import ROOT

pytestmark = pytest.mark.slow
# The laptop's setting cut to minutes: 60 steps on the sampler's own timesteps.
CUT = {
    "efficientdm.steps": 60,
    "calibration.samples": 8,
    "activations.batch_size": 32,
    "reconstruct.walk_batch": 32,
    "evaluation.held_out": 8,
    "evaluation.samples": 8,
    "evaluation.batch": 8,
    "classifier": "",
}


def eps_error(words, workdir) -> float:
    """Of the noise estimate on held-out trajectories of the teacher."""
    config = load_config(f"{ROOT}/configs/methods/efficientdm.py:w4a4,laptop{words}", CUT)
    with config.unlocked():
        del config.variants["rtn_w4a4"]
    quantize(config, workdir)
    variants = json.loads((workdir / "report.json").read_text())["variants"]
    return {v["name"]: v["eps_rel_mse"] for v in variants}["efficientdm_w4a4"]


def test_step_tables_gain_over_one_learned_range_for_all_steps(tmp_path):
    tables, shared = (eps_error(words, tmp_path / f"w{words}") for words in ("", ",no_talsq"))
    print(tables, shared)
    assert tables < shared
