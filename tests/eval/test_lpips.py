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
