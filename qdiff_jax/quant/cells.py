"""Cells: the values of a tensor that share one scale, side by side as a column each."""

import numpy as np

from qdiff_jax.quant.qparams import split_sizes
from qdiff_jax.quant.spec import QuantSpec


def cells(spec: QuantSpec, x) -> np.ndarray:
    """x as [K, C]: K values for each of the C cells that own a scale, in the order of
    `QParams.scale`.

    Raises:
      ValueError: the spec is dynamic, its group does not divide the axis, or x is not finite.
    """
    x = np.asarray(x, np.float32)
    if spec.dynamic or spec.granularity == "cell":
        raise ValueError("a dynamic quantizer measures its range at run time; nothing to estimate.")
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError(
            f"a range was asked of a tensor of shape {x.shape} that is empty or holds NaN or "
            "infinity; look for the layer that produced it."
        )
    if spec.granularity == "tensor":
        return x.reshape(-1, 1)
    if spec.granularity == "channel":
        return np.moveaxis(x, spec.axis, -1).reshape(-1, x.shape[spec.axis])
    if spec.granularity == "split":
        return _split_cells(spec, x)
    groups, rest = divmod(x.shape[spec.axis], spec.group)
    if rest:
        raise ValueError(f"groups of {spec.group} do not divide axis {spec.axis} of {x.shape}.")
    if spec.axis == -1:
        x = x.reshape(-1, groups, spec.group)
        return x.swapaxes(1, 2).reshape(-1, groups)
    x = np.moveaxis(x, spec.axis, -2).reshape(-1, groups, spec.group, x.shape[-1])
    return x.swapaxes(1, 2).reshape(-1, groups * x.shape[-1])


def _split_cells(spec, x) -> np.ndarray:
    """The two parts as cells, part by part; the shorter is filled up with zeros, which every range
    contains and every affine grid holds."""
    split_sizes(spec, x.shape[spec.axis])
    width = 1 if spec.axis == -1 else x.shape[-1]
    parts = [p.reshape(-1, width) for p in np.split(x, [spec.boundary], axis=spec.axis)]
    columns = np.zeros((max(map(len, parts)), 2, width), np.float32)
    for i, part in enumerate(parts):
        columns[: len(part), i] = part
    return columns.reshape(len(columns), 2 * width)


def scale_shape(spec: QuantSpec, shape) -> tuple[int, ...]:
    """The shape of `QParams.scale` for a static spec and a tensor of `shape`."""
    if spec.granularity == "tensor":
        return ()
    if spec.granularity == "split":
        return (2,) if spec.axis == -1 else (2, shape[-1])
    if spec.granularity == "channel":
        return (shape[spec.axis],)
    groups = shape[spec.axis] // spec.group
    return (groups,) if spec.axis == -1 else (groups, shape[-1])
