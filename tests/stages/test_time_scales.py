"""TDQ's stages on the miniature chain: starts, per-unit training, resuming, and training of everything."""

import functools

import jax
import numpy as np
import pytest

from qdiff_jax.export.qtensor import QTensor
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.quant.time_mlp import bake, predict_step
from qdiff_jax.quant.timed import TimeIndexed
from qdiff_jax.sites import flatten_sites
from qdiff_jax.stages.reconstruct_time_scales import reconstruct_time_scales
from qdiff_jax.stages.stage import run_stage
from qdiff_jax.stages.time_scales import TimeScaleConfig, calibrate_time_scales
from qdiff_jax.stages.train_time_scales import TrainConfig, train_time_scales
from qdiff_jax.stages.weights import round_to_nearest

from . import chain

CONFIG = TimeScaleConfig(encoding=8, hidden=8, steps=12, batch_size=16, lr=5e-3, dropout=0.0)


@functools.cache
def data():
    return chain.calibration()


@functools.cache
def started(a_bits=4):
    state, _ = run_stage(round_to_nearest(chain.model()), chain.state(4, a_bits))
    stage = calibrate_time_scales(chain.model(), data(), chain.TIMESTEPS, CONFIG, batch_size=16)
    return run_stage(stage, state)


def networks(on_progress=None, save_seconds=60.0):
    return reconstruct_time_scales(
        chain.model(),
        chain.UNITS,
        data(),
        chain.TIMESTEPS,
        CONFIG,
        walk_batch=16,
        save_seconds=save_seconds,
        on_progress=on_progress,
    )


@functools.cache
def trained():
    return run_stage(networks(), started()[0], chunk=8)


def planned():
    return [f"{e.site}:{e.operand}" for e in chain.plan(4, 4).quantized() if e.operand != "weight"]


def held(state, name):
    site, _, operand = name.rpartition(":")
    found = flatten_sites(state.quant)[site]
    return found.lhs if operand in ("input", "q", "softmax") else found.rhs


@pytest.mark.parametrize("which", [started, trained])
def test_every_planned_activation_holds_the_table_of_its_network(which):
    state, _ = which()
    assert sorted(state.aux["time_scales"]) == sorted(planned())
    for name, scale in state.aux["time_scales"].items():
        table = held(state, name)
        assert isinstance(table, TimeIndexed)
        assert isinstance(table.table, QParams)
        assert not table.table.rows
        assert chain.leaves_equal(table, bake(scale, chain.TIMESTEPS))
        zero = np.asarray(table.table.zero_point)
        np.testing.assert_array_equal(zero, np.round(zero))


def test_starts_follow_the_moments_of_what_the_site_sees():
    name = "a/conv:input"
    values = chain.site_values(chain.model().params, data())[name]
    scale = started()[0].aux["time_scales"][name]
    assert not scale.centred  # the input of this convolution is a SiLU output
    assert scale.offset > 0.27
    start = (np.abs(values).mean() + 16 * values.std()) / 15
    # The stage saw the chain with 4-bit weights and a subset of the values.
    np.testing.assert_allclose(predict_step(scale.layers, chain.TIMESTEPS), start, rtol=0.25)
    assert started()[0].aux["time_scales"]["mix/conv:input"].centred


def test_training_lowers_the_loss_of_units_and_moves_every_network():
    _, report = trained()
    units = {u["unit"]: u for u in report["units"] if u["trained"]}
    assert {"mix", "a", "b", "c"} <= set(units)
    assert sum(u["last_loss"] for u in units.values()) < sum(
        u["first_loss"] for u in units.values()
    )
    before, after = (s[0].aux["time_scales"] for s in (started(), trained()))
    assert not any(chain.leaves_equal(before[n].layers, after[n].layers) for n in before)
    assert report["network_passes"] == 1.0


def test_weights_stay_as_they_were():
    for name, site in flatten_sites(started()[0].quant).items():
        if isinstance(site.rhs, QTensor):
            assert chain.leaves_equal(site.rhs, flatten_sites(trained()[0].quant)[name].rhs)


@pytest.mark.parametrize("calls", [1, 3])
def test_interrupted_and_resumed_equals_uninterrupted(calls, tmp_path):
    left = iter(range(calls))

    def kill(done, total, **shown):
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(networks(kill, 0.0), started()[0], tmp_path, chunk=8)
    resumed, _ = run_stage(networks(), started()[0], tmp_path, chunk=8)
    whole = trained()[0]
    assert chain.leaves_equal((resumed.quant, resumed.aux), (whole.quant, whole.aux))


def test_without_planned_activations_there_is_nothing_to_train():
    begun = chain.state(4, None)
    stage = calibrate_time_scales(chain.model(), data(), chain.TIMESTEPS, CONFIG)
    state, report = run_stage(stage, begun)
    assert report["network_passes"] == 0.0
    state, _ = run_stage(networks(), state)
    assert chain.leaves_equal(state.quant, begun.quant)


class TestTraining:
    config = TrainConfig(steps=12, batch_size=8, lr=1e-2, warmup=2, dropout=0.0, save_seconds=0.0)

    @staticmethod
    @functools.cache
    def state():
        stage = calibrate_time_scales(chain.model(), data(), chain.TIMESTEPS, CONFIG, batch_size=16)
        return run_stage(stage, chain.state(4, 4))[0]

    def targets(self):
        full = jax.jit(chain.model().module.apply)
        prediction = full({"params": chain.model().params}, data().x, data().t)
        return data().replace(eps_fp=np.asarray(prediction)[..., :3])

    def test_a_rotation_rests(self):
        """It has no gradient, and decay would make it none; a divisor has one and is trained."""
        own = chain.model()
        layer = {"rotation": np.ones((3, 2), np.float32), "divisor": np.ones(6, np.float32)}
        block = {"conv": {**own.params["a"]["conv"], **layer}}
        turned = own._replace(params={**own.params, "a": block})
        stage = train_time_scales(turned, data(), chain.TIMESTEPS, self.config)
        others = stage.init(self.state(), None).work["trainable"]["others"]
        assert "a/conv/rotation" not in others
        assert {"a/conv/divisor", "a/conv/bias"} <= set(others)

    def test_the_loss_falls_codes_are_decided_and_a_kill_changes_nothing(self, tmp_path):
        stage = train_time_scales(chain.model(), self.targets(), chain.TIMESTEPS, self.config)
        state, report = run_stage(stage, self.state(), chunk=5)
        assert report["last_loss"] < report["first_loss"]
        for entry in chain.plan(4, 4).quantized("weight"):
            tensor = flatten_sites(state.quant)[entry.site].rhs
            assert isinstance(tensor, QTensor)
            assert tensor.bits == entry.bits
            assert tensor.qparams.scale.shape == ()
        assert "a/conv/bias" in state.aux["params"]
        assert not any(path.endswith("kernel") for path in state.aux["params"])
        carry = stage.run(stage.init(self.state(), tmp_path), 5)
        assert carry.step == 5
        resumed, _ = run_stage(stage, self.state(), tmp_path, chunk=5)
        assert chain.leaves_equal((resumed.quant, resumed.aux), (state.quant, state.aux))
