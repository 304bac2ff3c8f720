"""The parameters of an ONNX file under the names that they had in PyTorch (`pip install -e '.[parity]'`).

Exporters of PyTorch keep the names of convolutions and dense layers but fold the affine part of a group
norm, which ONNX has not got, into constants without a name behind an InstanceNormalization. Those are
named here after the convolution that reads the norm's output.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

# Operators that stand between a norm's output and the convolution it was made for.
_BETWEEN = ("Mul", "Add", "Sigmoid", "Resize", "AveragePool")


def load_onnx(
    file, norms: Mapping[str, str], prefix: str = "", source: object = None
) -> dict[str, np.ndarray]:
    """{name: array} of the parameters in an ONNX file, without `prefix`, group norms among them.

    Args:
      file: a path, or an open binary file.
      norms: {end of a convolution's module name: end of the name of the norm before it}, such as
        {"in_layers.2": "in_layers.0"}.
      prefix: what the names of parameters begin with; a group norm is named like its convolution.
      source: where the file is from, for messages; None for `file` itself.

    Numbers that are no parameters are left out: scalars, integers, the scales of a Resize, the ones and
    zeros of an InstanceNormalization. All else without the prefix is kept under its own name, so that a
    strict table refuses what it does not know.

    Raises ValueError: no such file, no ONNX file, a norm with an affine part of its own or whose
    convolution `norms` does not name, or the package onnx is not installed.
    """
    path = file if source is None else source
    graph = _graph(file, path)
    values = {tensor.name: _array(tensor) for tensor in graph.initializer}
    readers = collections.defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    found, used = {}, set()
    for node in graph.node:
        if node.op_type == "Resize":
            used.update(node.input[1:])
        if node.op_type != "InstanceNormalization":
            continue
        _, scale, bias = node.input
        if not np.all(values[scale] == 1) or np.any(values[bias]):
            raise ValueError(f"{path}: {node.name} is no group norm: it has weights of its own.")
        used.update((scale, bias))
        output, (weight, shift) = _affine(node, readers, values, path)
        module = _convolution(output, readers).removeprefix(prefix)
        ours = next((theirs for theirs in norms if module.endswith(theirs)), None)
        if ours is None:
            raise ValueError(f"{path}: the group norm before {module!r} is not named in norms.")
        module = module.removesuffix(ours) + norms[ours]
        for leaf, name in (("weight", weight), ("bias", shift)):
            used.add(name)
            found[f"{module}.{leaf}"] = values[name].ravel()
    for name, value in values.items():
        if name not in used and value.ndim and value.dtype.kind == "f":
            found[name.removeprefix(prefix)] = value
    return found


def _graph(file, path) -> Any:
    try:
        import onnx  # an extra, needed nowhere else
    except ImportError as error:
        raise ValueError(
            f"{path} is read by the package onnx, which is not installed; pip install -e '.[parity]'."
        ) from error
    try:
        return onnx.load(file).graph
    except FileNotFoundError as error:
        raise ValueError(f"there is no ONNX file {path}; check the path.") from error
    except Exception as error:  # protobuf's own DecodeError, whatever its package calls it
        raise ValueError(f"{path} is damaged or no ONNX file ({error}).") from error


def _array(tensor) -> np.ndarray:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)


def _affine(norm, readers, values, path):
    """(name of the output, (name of the scale, of the shift)) of the Mul and Add behind a norm."""
    name, constants = norm.output[0], []
    for kind in ("Mul", "Add"):
        node = next((n for n in readers[name] if n.op_type in (kind, "Reshape")), None)
        while node is not None and node.op_type == "Reshape":
            name = node.output[0]
            node = next((n for n in readers[name] if n.op_type == kind), None)
        constant = None if node is None else next((i for i in node.input if i in values), None)
        if constant is None:
            raise ValueError(f"{path}: {norm.name} has no {kind} by a constant behind it.")
        constants.append(constant)
        name = node.output[0]
    return name, constants


def _convolution(output: str, readers) -> str:
    """The module name of the first convolution that reads `output`, "" if there is none."""
    queue, seen = collections.deque([output]), set()
    while queue:
        for node in readers[queue.popleft()]:
            if node.op_type == "Conv":
                return node.input[1].rpartition(".")[0]
            if node.op_type in _BETWEEN and node.output[0] not in seen:
                seen.add(node.output[0])
                queue.append(node.output[0])
    return ""
