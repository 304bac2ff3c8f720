"""What Q-Diffusion and PTQ4DM do beside the common suite: two ranges where maps meet, ranges averaged over
batches; split sites simulated and in integers."""

import functools

import jax
import numpy as np
import pytest

from qdiff_jax.export.qtensor import codes
from qdiff_jax.methods.qdiffusion import qdiffusion
from qdiff_jax.observe.capture import batch_bounds
from qdiff_jax.quant.quantizer import codes as nearest_codes
from qdiff_jax.quant.ranges import weight_qparams
from qdiff_jax.sites import flatten_sites
from qdiff_jax.stages.batch_ranges import BatchRangeConfig, calibrate_by_batch
from qdiff_jax.stages.calibrate import ActivationConfig
from qdiff_jax.stages.layer_rounding import ClosedFormConfig
from qdiff_jax.stages.stage import kernel_at, run_stage

from .cases import (
    CASES,
    CONFIG,
    NETWORKS,
    STEPS,
    TIMESTEPS,
    begin,
    calibration,
    finish,
    model,
    outcome,
    plan,
)
from .contracts import simulated_and_executed

SPLIT = {f"up_0_block_{i}/{op}" for i in (0, 1) for op in ("conv1", "nin_shortcut")}


def test_two_ranges_where_maps_meet_and_one_elsewhere():
    made = outcome("qdiffusion")
    for site, held in flatten_sites(made.state.quant).items():
        if site in SPLIT:
            assert held.rhs.qparams.scale.shape == (2, CONFIG.channels)
            if site != NETWORKS["unet"].kept_input:
                assert held.lhs.scale.shape == (2,)
                assert held.lhs.scale[0] != held.lhs.scale[1]
        elif held.lhs is not None:
            assert held.lhs.scale.shape == ()
    assert set(made.reports["split_skips"]["split"]) == SPLIT
    assert not flatten_sites(outcome("ptq4dm").state.quant)["up_0_block_0/conv1"].lhs.scale.shape


def test_weights_of_ptq4dm_are_symmetric():
    weights = outcome("ptq4dm").state.plan.quantized("weight")
    assert all(entry.spec.symmetric and entry.spec.signed for entry in weights)
    before = plan(CASES["ptq4dm"].policy).quantized("weight")
    assert not any(entry.spec.symmetric for entry in before)


@pytest.mark.slow
def test_split_weights_are_rounded_in_closed_form_too():
    made = finish(
        qdiffusion(
            model(),
            calibration(),
            TIMESTEPS,
            activations=ActivationConfig(batch_size=6),
            activation_steps=None,
            rounding="closed_form",
            closed_form=ClosedFormConfig(walk_batch=12),
        ),
        begin(plan("official:qdiffusion")),
    )
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qdiffusion", "ptq4dm"])
def test_packed_weights_and_split_sites_execute_in_integers(name):
    state = outcome(name, STEPS).state
    simulated, integers = simulated_and_executed(state)
    # Codes next to a rounding tie may fall either way; a wrong scale would be far off.
    assert np.abs(integers - simulated).max() < 0.05 * np.abs(simulated).max()
    assert np.square(integers - simulated).mean() < 1e-4 * np.square(simulated).mean()


def test_ranges_averaged_over_batches_follow_their_momentum():
    """0.9 of the old and 0.1 of the new, the first batch as it is: recomputed batch by batch."""

    state, made = outcome("ptq4dm")
    config = BatchRangeConfig(batch_size=6, bins=256, candidates=10)
    ranges = []
    for start, stop in batch_bounds(24, 6):
        part = jax.tree.map(lambda leaf, a=start, b=stop: leaf[a:b], calibration())
        _, report = run_stage(calibrate_by_batch(model(), part, config), state)
        ranges.append(report["ranges"]["mid_block_1/conv1:input"][1])
    wanted = functools.reduce(lambda old, new: 0.9 * old + 0.1 * new, ranges)
    seen = made["calibrate_activations"]["ranges"]["mid_block_1/conv1:input"]
    np.testing.assert_allclose(seen[1], wanted, rtol=1e-5)
