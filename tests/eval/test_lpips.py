"""lpips: the package's own numbers on both trunks, from torch and safetensors files."""

import functools
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from qdiff_jax.eval.lpips import load_lpips, lpips

from ..parity import eval_inputs

CASES = np.load(pathlib.Path(__file__).parents[1] / "parity" / "cases" / "eval_tools.npz")


@functools.cache
def weights(net):
    return eval_inputs.lpips_weights(net)


@pytest.fixture
def files(tmp_path):
    def write(net):
        paths = tmp_path / f"{net}_trunk.safetensors", tmp_path / f"{net}_lin.safetensors"
        for path, state in zip(paths, weights(net)):
            safetensors.numpy.save_file(state, path)
        return paths

    return write


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_the_package_s_numbers(net, files):
    loaded = load_lpips(net, *files(net))
    first, second = eval_inputs.lpips_pair()
    found = lpips(net, loaded, first, second)
    np.testing.assert_allclose(found, CASES[f"lpips/{net}"], rtol=1e-4)
    if net == "alex":
        assert np.all(np.asarray(lpips(net, loaded, first, first)) == 0.0)
        np.testing.assert_allclose(lpips(net, loaded, second, first), found, rtol=1e-6)


def in_float64(net, first, second):
    """The definition in numpy: every convolution as a product with the image's windows."""
    trunk, lin = weights(net)
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    h = (np.concatenate([first, second]).astype(np.float64) - shift) / scale

    def windows(x, size, stride):
        view = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
        return view[:, ::stride, ::stride]  # [B, H, W, C, size, size]

    # Before which convolutions each net pools, and after which ReLUs it compares.
    pools = {"alex": (3, 6), "vgg": (5, 10, 17, 24)}[net]
    taps = {"alex": (0, 3, 6, 8, 10), "vgg": (2, 7, 14, 21, 28)}[net]
    total = 0.0
    for index in eval_inputs.TRUNKS[net]:
        kernel = trunk[f"features.{index}.weight"].astype(np.float64)
        stride, pad = (4, 2) if kernel.shape[2] == 11 else (1, kernel.shape[2] // 2)
        if index in pools:
            h = windows(h, 3 if net == "alex" else 2, 2).max(axis=(4, 5))
        h = np.pad(h, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        h = np.tensordot(windows(h, kernel.shape[2], stride), kernel, ((3, 4, 5), (1, 2, 3)))
        h = np.maximum(h + trunk[f"features.{index}.bias"], 0.0)
        if index in taps:
            unit = h / (np.sqrt(np.square(h).sum(axis=-1, keepdims=True)) + 1e-10)
            gap = np.square(unit[: len(first)] - unit[len(first) :]).mean(axis=(1, 2))
            level = taps.index(index)
            total = total + gap @ lin[f"lin{level}.model.1.weight"].astype(np.float64).reshape(-1)
    return total


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_float64_to_six_digits(net, files):
    first, second = (x[:, :32, :32] for x in eval_inputs.lpips_pair())
    found = lpips(net, load_lpips(net, *files(net)), first, second)
    np.testing.assert_allclose(found, in_float64(net, first, second), rtol=1e-6)


def test_misuse_is_explained(files, tmp_path):
    trunk, lin = files("alex")
    with pytest.raises(ValueError, match="'squeeze' is not known"):
        load_lpips("squeeze", trunk, lin)
    with pytest.raises(ValueError, match="has no array 'lin0.model.1.weight'"):
        load_lpips("alex", trunk, trunk)
    with pytest.raises(ValueError, match="there is no weights file"):
        load_lpips("alex", trunk, tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="there is no checkpoint file"):
        load_lpips("alex", tmp_path / "absent.pth", lin)
    other = {name: value[:, :5] for name, value in weights("alex")[1].items()}
    safetensors.numpy.save_file({k: v.copy() for k, v in other.items()}, lin)
    with pytest.raises(ValueError, match="gives 64 channels"):
        load_lpips("alex", trunk, lin)
    grey = np.zeros((2, 64, 64, 1), np.float32)
    with pytest.raises(ValueError, match="colour images"):
        lpips("alex", None, grey, grey)
