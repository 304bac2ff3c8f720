"""Learned step tables: what training sees of them, and the schedules they serve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.quant.qparams import from_range
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.quant.step_tables import kept_among_codes, on_schedule, repeated, trained_rows
from qdiff_jax.quant.timed import check_schedule

TRAINED = np.float32([0.0, 100.0, 200.0, 300.0, 400.0, 500.0])


def table(spec=QuantSpec(), rows=6):
    made = repeated(from_range(spec, -1.0, 2.0, 0, 15), rows)
    steps = jnp.arange(rows, dtype=jnp.float32)
    zero = 0.0 if spec.symmetric else steps
    return made.replace(scale=0.1 + steps, zero_point=made.zero_point + zero)


def test_all_rows_start_from_the_one_calibrated_range():
    start = from_range(QuantSpec(), -1.0, 2.0, 0, 15)
    rows = repeated(start, 4)
    for leaf, one in zip(jax.tree.leaves(rows), jax.tree.leaves(start)):
        np.testing.assert_array_equal(leaf, np.full(4, one))


def test_zero_points_are_codes_in_training_or_floats_as_published():
    drifted = table().replace(zero_point=jnp.float32([0.2, 4.6, 3.5, 9.1, 15.4, 2.0]))
    np.testing.assert_array_equal(trained_rows(drifted).zero_point, [0, 5, 4, 9, 15, 2])
    np.testing.assert_array_equal(trained_rows(drifted, False).zero_point, drifted.zero_point)
    for zp_ste in (True, False):
        slope = jax.grad(
            lambda z: jnp.sum(trained_rows(drifted.replace(zero_point=z), zp_ste).zero_point)  # noqa: B023
        )(drifted.zero_point)
        np.testing.assert_array_equal(slope, np.ones(6))
    outside = drifted.replace(zero_point=jnp.float32([-3.0, 17.0, 3.0, 3.0, 3.0, 3.0]))
    np.testing.assert_array_equal(kept_among_codes(outside).zero_point, [0, 15, 3, 3, 3, 3])


def test_a_symmetric_grid_has_no_zero_point_to_learn():
    made = table(QuantSpec(symmetric=True))
    slope = jax.grad(lambda z: jnp.sum(trained_rows(made.replace(zero_point=z)).zero_point))
    np.testing.assert_array_equal(slope(made.zero_point), np.zeros(6))


def test_the_trained_schedule_keeps_its_rows():
    made = on_schedule(table(), TRAINED, TRAINED)
    np.testing.assert_array_equal(made.table.scale, table().scale)
    assert made.rule == "step"
    check_schedule(made, TRAINED)


@pytest.mark.parametrize("how", ["every", "interpolate"])
def test_every_other_step_of_a_nested_schedule(how):
    made = on_schedule(table(), TRAINED, TRAINED[::2], how)
    np.testing.assert_array_equal(made.table.scale, table().scale[::2])
    np.testing.assert_array_equal(made.table.zero_point, table().zero_point[::2])
    np.testing.assert_array_equal(made.timesteps, TRAINED[::2])


def test_between_trained_timesteps_rows_are_interpolated_and_zero_points_stay_codes():
    made = on_schedule(table(), TRAINED, np.float32([50.0, 225.0, 500.0]))
    np.testing.assert_allclose(made.table.scale, [0.6, 2.35, 5.1], rtol=1e-6)
    zero = np.asarray(made.table.zero_point)
    np.testing.assert_array_equal(zero, np.round(zero))
    repeats = on_schedule(table(), np.float32([0, 0, 100, 200, 300, 400]), np.float32([0, 150]))
    np.testing.assert_allclose(repeats.table.scale, [0.1, 2.6], rtol=1e-6)


def test_schedules_that_a_table_cannot_serve():
    with pytest.raises(ValueError, match="multiple of the sampler's steps"):
        on_schedule(table(), TRAINED, TRAINED[:4], "every")
    with pytest.raises(ValueError, match="a grid that covers it"):
        on_schedule(table(), TRAINED, np.float32([100.0, 600.0]))
    with pytest.raises(ValueError, match="'nearest' is unknown"):
        on_schedule(table(), TRAINED, TRAINED[::2], "nearest")
