"""End-to-end tuning: what it improves, what stays fixed to the bit, what survives a kill."""

import jax
import numpy as np
import pytest
from absl import logging

from qdiff_jax.sites import flatten_sites
from qdiff_jax.stages.stage import decide_codes, run_stage, tuned_params
from qdiff_jax.stages.tune import TuneConfig, tune

from . import chain

CONFIG = TuneConfig(steps=12, batch_size=16, lr=5e-3, save_seconds=0.0)


@pytest.fixture(scope="module")
def calibration():
    bare = chain.calibration(per_step=8)
    full = jax.jit(chain.model().module.apply)({"params": chain.model().params}, bare.x, bare.t)
    return bare.replace(eps_fp=np.asarray(full))


@pytest.fixture(scope="module")
def start():
    begun = chain.state(w_bits=3)
    return begun.replace(quant=decide_codes(begun.quant, chain.model().params))


@pytest.fixture(scope="module")
def whole(start, calibration):
    return run_stage(tune(chain.model(), calibration, CONFIG), start, chunk=5)


def test_prediction_comes_nearer_and_codes_stay(start, whole):
    state, report = whole
    assert report["kept"]
    assert report["after"] < 0.9 * report["before"]
    before, after = flatten_sites(start.quant), flatten_sites(state.quant)
    for name, site in after.items():
        np.testing.assert_array_equal(site.rhs.data, before[name].rhs.data)
        assert (np.asarray(site.rhs.qparams.scale) > 0).all()
        assert not np.array_equal(site.rhs.qparams.scale, before[name].rhs.qparams.scale)
        assert site.bias.shape == site.rhs.shape[-1:]


@pytest.mark.parametrize("chunks", [1, 2])
def test_resumed_equals_uninterrupted(start, whole, calibration, tmp_path, chunks):
    work = tune(chain.model(), calibration, CONFIG)
    carry = work.init(start, tmp_path)
    for _ in range(chunks):
        carry = work.run(carry, 5)
    seen = []
    again = tune(
        chain.model(), calibration, CONFIG, on_progress=lambda done, total, loss: seen.append(done)
    )
    state, report = run_stage(again, start, tmp_path, chunk=5)
    assert seen[0] == min(5 * chunks + 5, 12)
    assert chain.leaves_equal(state.quant, whole[0].quant)
    assert report["after"] == whole[1]["after"]


def test_a_network_that_got_worse_is_put_back(start, calibration, caplog):
    logging.use_absl_handler()
    wild = TuneConfig(steps=2, batch_size=16, lr=2.0)
    with caplog.at_level("WARNING"):
        state, report = run_stage(tune(chain.model(), calibration, wild), start)
    assert not report["kept"]
    assert "nothing is changed" in caplog.text
    assert chain.leaves_equal(state.quant, start.quant)


def test_tuned_leaves_reach_the_parameters():
    params = {"block": {"norm": {"scale": np.ones(2), "bias": np.zeros(2)}}}
    made = tuned_params(params, {"params": {"block/norm/scale": np.full(2, 3.0)}})
    np.testing.assert_array_equal(made["block"]["norm"]["scale"], [3.0, 3.0])
    np.testing.assert_array_equal(made["block"]["norm"]["bias"], [0.0, 0.0])
    np.testing.assert_array_equal(params["block"]["norm"]["scale"], [1.0, 1.0])


def test_nothing_to_train():
    with pytest.raises(ValueError, match="trains nothing"):
        TuneConfig(scales=False, biases=False, norms=False)
