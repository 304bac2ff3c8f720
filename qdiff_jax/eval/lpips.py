"""LPIPS: distance of image pairs in the layers of a classifier, weighted as people judge it.

    d(x, y) = sum_l mean_{h,w} sum_c w_{l,c} (f_l(x) - f_l(y))_{h,w,c}^2,   f_l of unit length over c

(Zhang et al. 2018, arXiv:1801.03924, eq. 1.) The trunks are torchvision's AlexNet, all of its five ReLUs,
and VGG16, its last ReLU at each of five sizes; the weights w are those of version 0.1. No weights are shipped:
the paths are yours, torch or safetensors files in the names of torchvision (`features.0.weight`) and of lpips
(`lin0.model.1.weight`).
"""

import pathlib
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from qdiff_jax.runtime.torch_files import load_torch

# The two constants of its input layer turn [-1, 1] into ImageNet's normalisation of [0, 1].
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)


class _Conv(NamedTuple):
    index: int  # in torchvision's `features`
    stride: int = 1
    padding: int = 1
    tap: bool = False  # compare after this ReLU


class _Pool(NamedTuple):
    window: int
    stride: int = 2


_TRUNKS = {
    "alex": (
        _Conv(0, 4, 2, True),
        _Pool(3),
        _Conv(3, 1, 2, True),
        _Pool(3),
        _Conv(6, tap=True),
        _Conv(8, tap=True),
        _Conv(10, tap=True),
    ),
    "vgg": (
        *(_Conv(0), _Conv(2, tap=True), _Pool(2)),
        *(_Conv(5), _Conv(7, tap=True), _Pool(2)),
        *(_Conv(10), _Conv(12), _Conv(14, tap=True), _Pool(2)),
        *(_Conv(17), _Conv(19), _Conv(21, tap=True), _Pool(2)),
        *(_Conv(24), _Conv(26), _Conv(28, tap=True)),
    ),
}


class LpipsWeights(NamedTuple):
    """kernels HWIO and biases of the trunk in order, and the five weight vectors."""

    kernels: tuple
    biases: tuple
    linear: tuple


def load_lpips(net: str, trunk_path, linear_path) -> LpipsWeights:
    """Reads the weights of LPIPS.

    Args:
      net: "alex" or "vgg".
      trunk_path: torchvision's alexnet or vgg16 state dict, .pth or .safetensors.
      linear_path: lpips' weights/v0.1/alex.pth or vgg.pth, or the same in safetensors.

    Raises ValueError for an unknown net, and for files that are missing or damaged or hold other
    names or shapes.
    """
    if net not in _TRUNKS:
        raise ValueError(f"LPIPS with the trunk {net!r} is not known; use one of {tuple(_TRUNKS)}.")
    trunk, linear = _state(trunk_path), _state(linear_path)
    convs = [layer for layer in _TRUNKS[net] if isinstance(layer, _Conv)]
    kernels, biases, weights = [], [], []
    for conv in convs:
        weight = _entry(trunk, f"features.{conv.index}.weight", 4, trunk_path)
        kernels.append(np.transpose(weight, (2, 3, 1, 0)))
        biases.append(_entry(trunk, f"features.{conv.index}.bias", 1, trunk_path))
    channels = [k.shape[-1] for k, conv in zip(kernels, convs) if conv.tap]
    for level, count in enumerate(channels):
        weight = _entry(linear, f"lin{level}.model.1.weight", 4, linear_path)
        if weight.shape != (1, count, 1, 1):
            raise ValueError(
                f"{linear_path}: lin{level} has shape {weight.shape} where the {net} trunk gives "
                f"{count} channels; take the linear weights of the same net."
            )
        weights.append(weight.reshape(-1))
    return LpipsWeights(tuple(kernels), tuple(biases), tuple(weights))


@partial(jax.jit, static_argnums=0)
def lpips(net: str, weights: LpipsWeights, x: jax.Array, y: jax.Array) -> jax.Array:
    """[B] float32: the distance of each pair of images [B, H, W, 3] in [-1, 1]; 0 for equal ones.

    Args:
      net: "alex" or "vgg", as the weights were loaded for.
      weights: from `load_lpips`.
      x, y: images of one shape, at least 32 by 32.

    Raises ValueError when the shapes differ or are no colour images of that size.
    """
    if x.shape != y.shape or x.ndim != 4 or x.shape[-1] != 3 or min(x.shape[1:3]) < 32:
        raise ValueError(
            f"lpips compares colour images [B, H, W, 3] of at least 32 by 32: got {x.shape} and "
            f"{y.shape}."
        )
    shift, scale = (jnp.asarray(v)[None, None, None, :] for v in (_SHIFT, _SCALE))
    # Both at once: the trunk then runs as one program on a batch twice as large.
    h = (jnp.concatenate([x, y]).astype(jnp.float32) - shift) / scale
    total = jnp.zeros((x.shape[0],), jnp.float32)
    convs, levels = iter(zip(weights.kernels, weights.biases)), iter(weights.linear)
    for layer in _TRUNKS[net]:
        if isinstance(layer, _Pool):
            window, stride = (1, layer.window, layer.window, 1), (1, layer.stride, layer.stride, 1)
            h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, window, stride, "VALID")
            continue
        kernel, bias = next(convs)
        h = jax.lax.conv_general_dilated(
            h,
            jnp.asarray(kernel),
            (layer.stride, layer.stride),
            [(layer.padding, layer.padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        h = jax.nn.relu(h + jnp.asarray(bias)[None, None, None, :])
        if layer.tap:
            unit = h / (jnp.sqrt(jnp.sum(jnp.square(h), axis=-1, keepdims=True)) + 1e-10)
            gap = jnp.mean(jnp.square(unit[: len(x)] - unit[len(x) :]), axis=(1, 2))
            total = total + jnp.sum(gap * jnp.asarray(next(levels))[None, :], axis=-1)
    return total


def _state(path) -> dict:
    path = pathlib.Path(path)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise ValueError(f"there is no weights file {path}; check the path.")
        try:
            return safetensors.numpy.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error}).") from error
    state = load_torch(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}; LPIPS needs a state dict.")
    return state


def _entry(state: dict, name: str, rank: int, path) -> np.ndarray:
    value = state.get(name)
    if not isinstance(value, np.ndarray) or value.ndim != rank:
        raise ValueError(
            f"{path} has no array {name!r} of rank {rank} (it starts with {sorted(map(str, state))[:3]}); "
            "give torchvision's state dict for the trunk and lpips' own file for the linear weights."
        )
    return np.asarray(value, np.float32)
