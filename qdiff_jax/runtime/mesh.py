"""One mesh axis, `data`, over all devices: parameters replicated, batches split.

The models here fit on one chip, so data parallelism is all that is needed; every function takes
the mesh, so that another layout can come later. Axes are Auto: `jax.make_mesh` is Explicit by
default, and indexing a table with a sharded index is then an error.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def data_mesh(devices: list | None = None) -> Mesh:
    """A one-axis mesh over the given devices (all of them by default)."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding under which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree, mesh: Mesh):
    """Puts every leaf whole on every device of the mesh."""
    return _put(tree, replicated(mesh))


def shard_batch(tree, mesh: Mesh, axis: int = 0):
    """Splits every leaf along `axis` over the devices; `axis=1` for [steps, batch, ...].

    With several processes every process passes the same global batch and keeps its part.

    Raises:
      ValueError: the axis is not divisible by the number of devices.
    """
    sharding = NamedSharding(mesh, PartitionSpec(*([None] * axis), AXIS))
    for leaf in jax.tree.leaves(tree):
        if np.shape(leaf)[axis] % mesh.size:
            raise ValueError(
                f"a batch of {np.shape(leaf)[axis]} cannot be split over {mesh.size} devices; "
                "choose a multiple."
            )
    return _put(tree, sharding)


def _put(tree, sharding: NamedSharding):
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: from_host(leaf, sharding), tree)


def from_host(leaf, sharding) -> jax.Array:
    """An array with any sharding from a value that every process holds whole.

    For what `device_put` refuses: PRNG keys, and devices of other processes.
    """
    if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = from_host(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
