"""Features of a stream of images: one compiled program, split over the devices, one batch in memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from qdiff_jax.runtime.mesh import shard_batch

Features = dict[str, np.ndarray]


def feature_batches(
    apply: Callable[[jax.Array], Mapping[str, jax.Array]],
    prepare: Callable[[np.ndarray], jax.Array],
    images: Iterable[np.ndarray],
    *,
    batch: int = 64,
    mesh: Mesh | None = None,
) -> Iterator[Features]:
    """Yields {layer: float32 [b, D]} in the order of the images, b = `batch` but for the last.

    Args:
      apply: prepared images [batch, ...] -> {layer: [batch, D]}; jit it outside.
      prepare: uint8 [batch, H, W, C] -> what the network takes; see `tools.preprocess`.
      images: arrays uint8 [n, H, W, C] of any n, of one H, W and C.
      batch: images a step; the last batch is filled up, so that the network compiles once.
      mesh: split every batch over its devices; `batch` must be a multiple of their number.

    Raises ValueError for an empty stream or images that change their shape.
    """
    seen = 0
    for part in _rebatched(images, batch):
        count = len(part)
        seen += count
        full = np.concatenate([part, np.repeat(part[-1:], batch - count, axis=0)])
        inputs = prepare(full if mesh is None else shard_batch(full, mesh))
        if mesh is not None and not _spread(inputs, mesh):
            inputs = shard_batch(inputs, mesh)  # prepared on the host, as CLIP's images are
        found = jax.device_get(dict(apply(inputs)))
        yield {name: np.asarray(value[:count], np.float32) for name, value in found.items()}
    if not seen:
        raise ValueError("there are no images to take features of; check the source.")


def all_features(batches: Iterable[Features], layers: tuple[str, ...] | None = None) -> Features:
    """The stream held whole, {layer: [N, D]}, of the named layers or of all."""
    parts: dict[str, list[np.ndarray]] = {}
    for features in batches:
        for name in features if layers is None else layers:
            parts.setdefault(name, []).append(features[name])
    return {name: np.concatenate(values) for name, values in parts.items()}


def _spread(inputs, mesh: Mesh) -> bool:
    return isinstance(inputs, jax.Array) and inputs.sharding.device_set == set(mesh.devices.flat)


def _rebatched(images: Iterable[np.ndarray], batch: int) -> Iterator[np.ndarray]:
    held, shape = [], None
    for part in images:
        shape = part.shape[1:] if shape is None else shape
        if part.shape[1:] != shape:
            raise ValueError(
                f"images change from {shape} to {part.shape[1:]} within the stream; crop and resize "
                "them to one size first."
            )
        held.append(part)
        while sum(map(len, held)) >= batch:
            whole = np.concatenate(held)
            yield whole[:batch]
            held = [whole[batch:]]
    rest = np.concatenate(held) if held else []
    if len(rest):
        yield rest
