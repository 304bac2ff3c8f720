"""From the config's rule for weights of steps to the rows of closed-form rounding."""

import dataclasses

import numpy as np
import pytest

from experiments.quantize_job import prepare
from experiments.quantize_sets import calibration_sets, step_weights, trajectories
from qdiff_jax.config import load_config
from qdiff_jax.methods import closed_form
from qdiff_jax.methods.registry import build
from qdiff_jax.observe.archive import load_record
from qdiff_jax.stages.row_weights import by_step, eps_importance

from ..main_job import SMOKE


def job(rule):
    return prepare(load_config(SMOKE, {"closed_form.step_weights": rule}))


def test_each_rule_gives_a_weight_for_every_step(tmp_path):
    assert step_weights(job("uniform"), tmp_path) is None
    by_formula = job("eps_coefficient")
    np.testing.assert_array_equal(
        step_weights(by_formula, tmp_path), eps_importance(by_formula.sampler)
    )
    measured = step_weights(job("sensitivity"), tmp_path)
    assert measured.shape == (by_formula.sampler.steps,)
    assert (measured > 0).all()
    path = tmp_path / "trajectories" / "sensitivity.json"
    held = load_record(path)
    assert held["cpu_seconds"] > 0
    assert held["commit"]
    made = path.stat().st_mtime_ns
    np.testing.assert_array_equal(step_weights(job("sensitivity"), tmp_path), measured)
    assert path.stat().st_mtime_ns == made


@pytest.mark.parametrize("name", ["closed_form", "brecq", "tfmq", "qdiffusion", "tdq"])
def test_methods_weigh_the_rows_of_their_set(name, tmp_path, monkeypatch):
    given = job("eps_coefficient")
    calibration, _ = trajectories(given, tmp_path)
    sets = calibration_sets(given.config, calibration)._replace(
        step_weights=step_weights(given, tmp_path)
    )
    seen = []
    monkeypatch.setattr(
        closed_form, "closed_form_stage", lambda *_, row_weights, **__: seen.append(row_weights)
    )
    build(
        name,
        given.diffusion.model,
        sets,
        dataclasses.replace(given.settings, rounding="closed_form"),
    )
    (rows,) = seen
    np.testing.assert_allclose(rows, by_step(sets.step_weights, sets.weights.index))
    assert np.ptp(rows) > 0


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="closed_form.step_weights is 'steps'; use one of"):
        job("steps")
