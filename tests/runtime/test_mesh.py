"""Batches are split over the data axis, parameters are whole on every device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from qdiff_jax.runtime import mesh


def test_axes_are_auto_and_cover_all_devices():
    whole = mesh.data_mesh()
    assert whole.size == jax.device_count()
    assert whole.axis_types == (AxisType.Auto,)
    # What Explicit axes refuse: a table indexed by a sharded index.
    index = mesh.shard_batch(np.arange(whole.size), whole)
    table = mesh.replicate(np.arange(20.0, dtype=np.float32), whole)
    gathered = jax.jit(lambda table, index: table[index])(table, index)
    np.testing.assert_array_equal(gathered, np.arange(whole.size))


def test_a_batch_is_split_along_its_axis():
    devices = mesh.data_mesh()
    n = devices.size
    batch = mesh.shard_batch({"x": np.zeros((3, 2 * n, 5), np.float32)}, devices, axis=1)
    assert {s.data.shape for s in batch["x"].addressable_shards} == {(3, 2, 5)}
    assert mesh.replicate(jnp.zeros(3), devices).is_fully_replicated
    with pytest.raises(ValueError, match=f"batch of {n + 1} cannot be split over {n}"):
        mesh.shard_batch(np.zeros(n + 1), devices)
