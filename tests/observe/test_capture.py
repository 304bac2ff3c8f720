"""The two-stream walk: its values are the network's own, and it holds no more than it said."""

import functools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.models.program import units_with_projections, units_with_time_block
from qdiff_jax.observe import capture
from qdiff_jax.observe.capture import (
    Pool,
    advance,
    allocate,
    batch_bounds,
    estimate_bytes,
    needed_after,
    plan_pool,
    start_stream,
)
from qdiff_jax.quant.timed import select, step_context

from ..tiny_unet import QUICK, SMALL, STEPS, inputs, network, quantized

SIZE, BATCH = 6, 3
MEMORY = Pool(1 << 30, None)


@functools.cache
def setting():
    """Units of the small U-Net, its parameters, a quant tree of step tables, a mixed-step stream."""
    net = network(SMALL)
    x, t = inputs(SMALL, SIZE)
    index = np.arange(SIZE) % len(STEPS)
    stream = start_stream(x, t, index, np.zeros(SIZE), None)
    return units_with_projections(net.program), net.params, quantized(SMALL, tables=True), stream


def walk(units, quant, stream, pool=MEMORY, on_unit=None):
    """Advance over all units, freeing what nobody reads; {name: value} of every output seen."""
    params, seen = setting()[1], {}
    for i, unit in enumerate(units):
        keep = needed_after(units, i) | set(unit.outputs)
        options = {"batch_size": BATCH, "pool": pool, "keep": keep, "unit_count": len(units)}
        stream = advance(stream, unit, params, quant, **options)
        seen.update({name: stream.values[name] for name in unit.outputs})
        if on_unit is not None:
            on_unit(i, stream)
    return stream, seen


@functools.cache
def intermediates():
    """(variables, x, t) -> {block: output}, recorded by Flax itself."""

    def run(params, quant, x, ctx):
        t = jnp.broadcast_to(ctx.t, x.shape[:1])
        variables = {"params": params, "quant": select(quant, ctx)}
        module = network(SMALL).module
        _, state = module.apply(
            variables, x, t, capture_intermediates=True, mutable=["intermediates"]
        )
        blocks = state["intermediates"]
        return {n.name: blocks[n.name]["__call__"][0] for n in network(SMALL).program}

    return jax.jit(run, compiler_options=QUICK)


@functools.cache
def walked(quantized_stream: bool):
    units, _, quant, stream = setting()
    return walk(units, quant if quantized_stream else {}, stream)


def test_the_full_precision_stream_holds_the_models_own_intermediates():
    _, params, _, stream = setting()
    end, seen = walked(False)
    expected = intermediates()(params, {}, stream.values["x"], stream.ctx)
    for name, value in seen.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5)
    assert {"temb", "mid_attn_1", "out"} <= set(seen)
    assert end.passes == pytest.approx(1.0)


def test_every_sample_of_the_quantized_stream_selects_its_own_step():
    _, params, quant, stream = setting()
    end, seen = walked(True)
    run, x = intermediates(), stream.values["x"]
    alone = [
        run(params, quant, x[i : i + 1], step_context(stream.ctx.t[i], stream.ctx.index[i]))
        for i in range(SIZE)
    ]
    first_row = [run(params, quant, x[i : i + 1], step_context(STEPS[0], 0)) for i in range(SIZE)]
    for name, value in seen.items():
        expected = np.concatenate([sample[name] for sample in alone])
        # A sum in another order may move a single code to its neighbour: rare, hence the mean.
        assert np.abs(value - expected).mean() < 1e-3, name
    wrong = np.concatenate([sample["out"] for sample in first_row])
    assert np.abs(seen["out"] - wrong).mean() > 1e-2
    assert end.passes == pytest.approx(1.0)


def test_values_are_freed_after_their_last_reader():
    units, _, _, stream = setting()
    alive = {}
    walk(units, {}, stream, on_unit=lambda i, s: alive.update({units[i].name: set(s.values)}))
    always = {"x", "t", "y"}
    assert alive["down_0_block_0"] == always | {"temb", "conv_in", "down_0_block_0"}
    # The skip of conv_in is read last by up_0_block_1, the embedding by every residual block.
    assert alive["mid_attn_1"] == always | {"temb", "conv_in", "down_0_block_0", "mid_attn_1"}
    assert alive["up_0_block_1"] == always | {"up_0_block_1"}
    assert alive["out"] == always | {"out"}
    assert needed_after(units, len(units) - 1) == set()
    assert needed_after(units, 0, keep=("temb",)) >= {"temb"}


@pytest.mark.parametrize("grouping", [units_with_projections, units_with_time_block])
def test_the_estimate_is_what_two_streams_really_hold(grouping, monkeypatch):
    _, params, quant, stream = setting()
    units = grouping(network(SMALL).program)
    references, peak = [], 0

    def counting(*args):
        nonlocal peak
        array = allocate(*args)
        references.append(weakref.ref(array))
        alive = (reference() for reference in references)
        peak = max(peak, sum(a.nbytes for a in alive if a is not None))
        return array

    def shapes_only(signature, params, quant, inputs, ctx):  # takes no compile
        run = functools.partial(capture.apply_unit, signature)
        shapes = jax.eval_shape(run, params, select(quant, ctx), inputs)
        return tuple(np.zeros(s.shape, s.dtype) for s in shapes)

    monkeypatch.setattr(capture, "allocate", counting)
    monkeypatch.setattr(capture, "run_unit", shapes_only)
    full = quantized_stream = stream
    for i, unit in enumerate(units):
        after = needed_after(units, i)
        options = {"batch_size": SIZE, "pool": MEMORY}
        keep = after | set(unit.inputs) | set(unit.outputs)
        full = advance(full, unit, params, {}, keep=keep, **options)
        quantized_stream = advance(quantized_stream, unit, params, quant, keep=after, **options)
        values = {n: v for n, v in full.values.items() if n in after or n in ("x", "t", "y")}
        full = full._replace(values=values)
    monkeypatch.undo()
    held = peak + sum(v.nbytes for v in stream.values.values() if v is not None)
    estimate = estimate_bytes(units, params, stream)
    assert held <= estimate <= 1.01 * held


def test_values_in_files_are_the_same_bits(tmp_path):
    units, _, quant, stream = setting()
    end, seen = walk(units, quant, stream, Pool(0, tmp_path / "spill"))
    for name, value in walked(True)[1].items():
        assert isinstance(seen[name], np.memmap)
        np.testing.assert_array_equal(seen[name], value)
    # The files are unlinked at once: nothing is left behind, even by a killed run.
    assert list((tmp_path / "spill").iterdir()) == []
    half = allocate(Pool(0, tmp_path), (2, 3), jnp.dtype("bfloat16"), "half")
    half[:] = 1.5
    assert (half.dtype, float(half.sum())) == (jnp.bfloat16, 9.0)


def test_small_values_stay_in_memory(tmp_path):
    pool = Pool(100, tmp_path)
    assert not isinstance(allocate(pool, (25,), np.float32, "small"), np.memmap)
    assert isinstance(allocate(pool, (26,), np.float32, "large"), np.memmap)


def test_the_pool_is_decided_before_anything_runs(tmp_path):
    units, params, _, stream = setting()
    need = estimate_bytes(units, params, stream)
    plan = functools.partial(plan_pool, units, params, stream)
    assert plan(limit_bytes=need, spill=tmp_path) == Pool(need, None)
    assert plan(limit_bytes=need - 1, spill=tmp_path) == Pool(0, tmp_path)
    with pytest.raises(MemoryError, match="for 6 samples, more than the limit of 0 MiB; use fewer"):
        plan(limit_bytes=need - 1, spill=None)
    x, t = inputs(SMALL, 2 * SIZE)
    double = start_stream(x, t, np.zeros(2 * SIZE), np.zeros(2 * SIZE), None)
    assert estimate_bytes(units, params, double) == 2 * need


def test_a_full_disk_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(
        capture.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 20})()
    )
    with pytest.raises(
        OSError, match="'mid_attn_1' needs 4 MiB under .* 1 MiB are free; free some"
    ):
        allocate(Pool(0, tmp_path), (1 << 20,), np.float32, "mid_attn_1")
    assert list(tmp_path.iterdir()) == []


def test_batches_must_divide_the_set():
    assert batch_bounds(6, 3) == [(0, 3), (3, 6)]
    with pytest.raises(ValueError, match="batch size 4 must divide the 6 samples"):
        batch_bounds(6, 4)
