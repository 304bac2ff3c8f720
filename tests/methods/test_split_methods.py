"""Q-Diffusion and PTQ4DM from plan to bundle on a small network; split sites simulated and in integers."""

import functools

import jax
import numpy as np
import pytest

from qdiff_jax.export.bundle import load_bundle, save_bundle
from qdiff_jax.export.integer import check_executable
from qdiff_jax.export.qtensor import QTensor, codes
from qdiff_jax.methods.ptq4dm import ptq4dm
from qdiff_jax.methods.qdiffusion import qdiffusion
from qdiff_jax.observe.capture import batch_bounds
from qdiff_jax.policy import make_plan, policy
from qdiff_jax.quant.quantizer import codes as nearest_codes
from qdiff_jax.quant.ranges import weight_qparams
from qdiff_jax.quant.timed import select, step_context
from qdiff_jax.sites import flatten_sites, list_sites, nest_sites
from qdiff_jax.stages.batch_ranges import BatchRangeConfig
from qdiff_jax.stages.calibrate import ActivationConfig
from qdiff_jax.stages.layer_rounding import ClosedFormConfig
from qdiff_jax.stages.reconstruct import ReconstructConfig
from qdiff_jax.stages.stage import fold_weights, initial_state, kernel_at

from .. import tiny_unet
from ..stages.chain import leaves_equal
from .test_methods import CONFIG, TIMESTEPS, calibration, finish, model

pytestmark = pytest.mark.slow

SPLIT = {f"up_0_block_{i}/{op}" for i in (0, 1) for op in ("conv1", "nin_shortcut")}
EVERY = pytest.mark.parametrize("name", ["qdiffusion", "ptq4dm"])


@functools.cache
def plan():
    x, t = tiny_unet.inputs(CONFIG, 1)
    sites = list_sites(model().module, x, t, np.zeros(1, np.int32))
    return make_plan(sites, policy("official:qdiffusion", sites, 4, 8))


def method(name, steps=4, on_progress=None, **own):
    if name == "ptq4dm":
        ranges = BatchRangeConfig(batch_size=6, values=32, candidates=10)
        return ptq4dm(model(), calibration(), activations=ranges, on_progress=on_progress)
    weights = ReconstructConfig(
        steps=steps, batch_size=8, lr=5e-2, schedule="cosine", walk_batch=12
    )
    scales = ReconstructConfig(
        steps=2, batch_size=8, walk_batch=12, trains="scales", inputs="full_precision", p=2.4
    )
    return qdiffusion(
        model(),
        calibration(),
        TIMESTEPS,
        weights=weights,
        activations=ActivationConfig(batch_size=6),
        activation_steps=scales if steps else None,
        on_progress=on_progress,
        **own,
    )


def begin():
    return initial_state(plan(), jax.random.key(5), "a" * 64)


@functools.cache
def outcome(name):
    return finish(method(name), begin())


@EVERY
def test_every_weight_holds_codes_of_its_plan(name):
    state = outcome(name).state
    flat = flatten_sites(state.quant)
    for entry in state.plan.quantized("weight"):
        tensor = jax.device_get(flat[entry.site].rhs)
        assert isinstance(tensor, QTensor)
        assert tensor.qparams.spec == entry.spec
        held = codes(tensor)
        assert (held.min() >= entry.codes[0]) & (held.max() <= entry.codes[1])
        assert entry.spec.symmetric == entry.spec.signed == (name == "ptq4dm")
    for entry in state.plan.quantized("input", "q", "k", "v", "softmax"):
        site = flat[entry.site]
        made = site.lhs if entry.operand in ("input", "q", "softmax") else site.rhs
        assert made.spec == entry.spec
        assert (np.asarray(made.scale) > 0).all()


def test_two_ranges_where_maps_meet_and_one_elsewhere():
    outcome_ = outcome("qdiffusion")
    for site, held in flatten_sites(outcome_.state.quant).items():
        if site in SPLIT:
            assert held.lhs.scale.shape == (2,)
            assert held.rhs.qparams.scale.shape == (2, CONFIG.channels)
            assert held.lhs.scale[0] != held.lhs.scale[1]
        else:
            assert held.lhs.scale.shape == ()
    assert set(outcome_.reports["split_skips"]["split"]) == SPLIT
    assert not flatten_sites(outcome("ptq4dm").state.quant)["up_0_block_0/conv1"].lhs.scale.shape


def test_split_weights_are_rounded_in_closed_form_too():
    own = dict(rounding="closed_form", closed_form=ClosedFormConfig(walk_batch=12))
    made = finish(method("qdiffusion", **own), begin())
    flat = flatten_sites(made.state.quant)
    layers = {
        name: layer
        for unit in made.reports["brecq_weights"]["units"]
        for name, layer in unit.get("layers", {}).items()
    }
    moved = 0
    for entry in made.state.plan.quantized("weight"):
        tensor = jax.device_get(flat[entry.site].rhs)
        kernel = kernel_at(model().params, entry.site)
        nearest = nearest_codes(weight_qparams(kernel, entry.spec, entry.bits), kernel)
        assert tensor.qparams.spec == entry.spec
        assert tensor.qparams.spec.granularity == ("split" if entry.site in SPLIT else "channel")
        assert layers[entry.site]["loss"] <= 1.001 * layers[entry.site]["nearest_loss"]
        moved += entry.site in SPLIT and bool((codes(tensor) != nearest).any())
    assert moved


def test_zero_steps_of_reconstruction_are_nearest_rounding():
    state = finish(method("qdiffusion", steps=0), begin()).state
    flat = flatten_sites(state.quant)
    for entry in state.plan.quantized("weight"):
        kernel = kernel_at(model().params, entry.site)
        wanted = nearest_codes(weight_qparams(kernel, entry.spec, entry.bits), kernel)
        np.testing.assert_array_equal(codes(flat[entry.site].rhs), wanted)


def forward(params, quant):
    x, y = calibration().x[:2], calibration().y[:2]
    variables = {"params": params, "quant": select(quant, step_context(TIMESTEPS[1], 1))}
    t = np.full(2, TIMESTEPS[1])
    return np.asarray(tiny_unet.forward(CONFIG)(variables, x, t, y))


@EVERY
def test_folded_packed_reloaded_and_executed_agree(name, tmp_path):
    state = outcome(name).state
    save_bundle(
        tmp_path / "bundle",
        params=model().params,
        quant=state.quant,
        plan_json=state.plan.to_json(),
        model_config={"family": "unet_ddpm"},
        schedule_config={},
        sampler_config={},
        source={"sha256": state.source},
    )
    bundle = load_bundle(tmp_path / "bundle")
    assert leaves_equal(bundle.quant, state.quant)
    packed = forward(model().params, state.quant)
    assert np.isfinite(packed).all()
    np.testing.assert_array_equal(forward(*fold_weights(bundle.params, bundle.quant)), packed)
    check_executable(bundle.quant)
    ready = {n: s.replace(execute=True) for n, s in flatten_sites(bundle.quant).items()}
    executed = forward(bundle.params, nest_sites(ready))
    # Codes next to a rounding tie may fall either way; a wrong scale would be far off.
    assert np.abs(executed - packed).max() < 0.05 * np.abs(packed).max()
    assert np.square(executed - packed).mean() < 1e-4 * np.square(packed).mean()


@EVERY
def test_interrupted_and_resumed_equals_uninterrupted(name, tmp_path):
    left = iter(range(2))

    def kill(done, total, **shown):
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finish(method(name, on_progress=kill), begin(), tmp_path, chunk=1)
    resumed = finish(method(name), begin(), tmp_path)
    assert leaves_equal(resumed.state.quant, outcome(name).state.quant)


def test_ranges_averaged_over_batches_follow_their_momentum():
    """0.9 of the old and 0.1 of the new, the first batch as it is: recomputed batch by batch."""
    ranges = []
    for start, stop in batch_bounds(24, 6):
        part = jax.tree.map(lambda leaf, a=start, b=stop: leaf[a:b], calibration())
        config = BatchRangeConfig(batch_size=6, values=32, candidates=10)
        report = finish(ptq4dm(model(), part, activations=config), begin()).reports
        ranges.append(report["calibrate_activations"]["ranges"]["mid_block_1/conv1:input"][1])
    wanted = functools.reduce(lambda old, new: 0.9 * old + 0.1 * new, ranges)
    made = outcome("ptq4dm").reports["calibrate_activations"]["ranges"]["mid_block_1/conv1:input"]
    np.testing.assert_allclose(made[1], wanted, rtol=1e-5)


def test_other_roundings_are_refused():
    with pytest.raises(ValueError, match="rounding 'nearest' is unknown"):
        qdiffusion(model(), calibration(), TIMESTEPS, rounding="nearest")
    with pytest.raises(ValueError, match="ptq4dm rounds to the nearest code, not by 'adaround'"):
        ptq4dm(model(), calibration(), rounding="adaround")
