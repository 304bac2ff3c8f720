"""Errors of blocks behind a quantized prefix, and the table of what a rounding has learned by heart."""

import jax
import numpy as np
import pytest

from experiments.bench_overfit import size_of, summaries, table
from qdiff_jax.analysis.unit_errors import unit_errors
from qdiff_jax.models import registry
from qdiff_jax.observe.selectors import every_step
from qdiff_jax.quant.timed import step_context
from qdiff_jax.stages.stage import Model


@pytest.fixture(scope="module", params=["unet", "dit"])
def case(request):
    subject = request.getfixturevalue(request.param)
    samples = every_step(jax.random.key(0), subject.calibration)
    return subject.model, samples


def moved(params, scale):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda w: w + scale * np.asarray(rng.standard_normal(w.shape), np.float32), params
    )


def errors(model: Model, params, samples, batch_size=8):
    return unit_errors(model, {"params": params, "quant": {}}, samples, batch_size=batch_size)


def test_the_network_itself_has_none(case):
    model, samples = case
    found = errors(model, model.params, samples)
    assert len({unit.unit for unit in found}) == len(found) > 3
    assert [unit.error for unit in found] == [0.0] * len(found)


def test_the_last_unit_has_the_error_of_the_estimate(case):
    model, samples = case
    params = moved(model.params, 1e-2)
    predict = registry.predictor(model.module)
    ctx = step_context(samples.t, samples.index, samples.branch)
    wanted, got = (
        predict({"params": p, "quant": {}}, samples.x, ctx, samples.y)
        for p in (model.params, params)
    )
    last = errors(model, params, samples)[-1]
    assert last.shape == wanted.shape[1:]
    relative = np.sum(np.square(got - wanted)) / np.sum(np.square(wanted))
    np.testing.assert_allclose(last.error, relative, rtol=1e-4)


def test_a_later_change_leaves_earlier_units_alone_and_batches_change_nothing(case):
    model, samples = case
    last = model.program[-1].name
    params = {**model.params, last: moved(model.params[last], 1e-2)}
    found = errors(model, params, samples)
    assert [unit.error > 0 for unit in found] == [False] * (len(found) - 1) + [True]
    again = errors(model, params, samples, batch_size=4)
    np.testing.assert_allclose(again[-1].error, found[-1].error, rtol=1e-5)


def row(recipe, unit, shape, calibration, held_out, seed=0):
    where = {"model": "m", "bits": "w4a32", "recipe": recipe, "seed": seed}
    return {**where, "unit": unit, "shape": shape, "calibration": calibration, "held_out": held_out}


def test_the_table_divides_by_nearest_with_the_same_seed():
    rows = [
        row("nearest", "a", [4, 4, 8], 1.0, 2.0),
        row("nearest", "b", [64, 8], 1.0, 1.0),
        row("asym2", "a", [4, 4, 8], 0.1, 0.4),
        row("asym2", "b", [64, 8], 0.5, 0.5),
        row("asym2", "a", [4, 4, 8], 7.0, 7.0, seed=1),  # nearest was not run with this seed
    ]
    best, last = summaries(rows)
    assert (best["recipe"], best["seeds"], last["recipe"]) == ("asym2", 1, "nearest")
    np.testing.assert_allclose(best["sizes"]["4x4"], (0.2, 2.0))
    np.testing.assert_allclose(best["sizes"]["64 tokens"], (0.5, 1.0))
    np.testing.assert_allclose(best["sizes"]["all"], (np.sqrt(0.1), np.sqrt(2.0)))
    text = table(rows, "a command")
    assert "| recipe | all (2 blocks) | 4x4 (1 blocks) | 64 tokens (1 blocks) | seeds |" in text
    assert "| asym2 | 0.316 (1.41) | 0.200 (2.00) | 0.500 (1.00) | 1 |" in text


def test_sizes_have_names():
    assert [size_of(s) for s in ([8, 8, 3], [64, 5], [7])] == ["8x8", "64 tokens", "vectors"]
