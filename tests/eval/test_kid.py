"""kid: float64 numpy by the definition, the tools' own numbers, unbiasedness."""

import pathlib

import numpy as np
import pytest

from qdiff_jax.eval import kid
from qdiff_jax.runtime.mesh import data_mesh

from ..parity import eval_inputs

CASES = np.load(pathlib.Path(__file__).parents[1] / "parity" / "cases" / "eval_tools.npz")
GENERATED = eval_inputs.features(1, 90)
REAL = eval_inputs.features(2, 110) * np.float32(1.1)


def by_definition(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        values = kernel(a, a)
        return values[~np.eye(len(a), dtype=bool)].mean()

    return within(x) + within(y) - 2 * kernel(x, y).mean()


@pytest.mark.parametrize("block", [1000, 32])
def test_all_pairs_equal_the_definition_in_any_blocks(block):
    found = kid.mmd2(GENERATED, REAL, block=block)
    np.testing.assert_allclose(found, by_definition(GENERATED, REAL), rtol=1e-9)


def test_torch_fidelity():
    found = kid.kernel_inception_distance(GENERATED, REAL, subsets=8, subset_size=40)
    expected = CASES["kid/torch-fidelity"]
    # The tool sums in float32, whose rounding of values near 3 is what is left here.
    np.testing.assert_allclose([found.mean, found.std], expected, rtol=1e-4)
    assert found.values.shape == (8,)


def test_clean_fid():
    found = kid.kernel_inception_distance(
        GENERATED, REAL, subsets=8, subset_size=40, seed=11, tool="clean-fid"
    )
    np.testing.assert_allclose(found.mean, CASES["kid/clean-fid"], rtol=1e-4)
    small = kid.kernel_inception_distance(GENERATED[:7], REAL, subsets=2, tool="clean-fid")
    assert np.isfinite(small.mean)


def test_unbiased_for_equal_distributions():
    rng = np.random.default_rng(0)
    values = [kid.mmd2(*rng.normal(size=(2, 20, 3))) for _ in range(60)]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_same_values_on_eight_devices():
    mesh = data_mesh()
    found = kid.mmd2(GENERATED, REAL, block=32, mesh=mesh)
    np.testing.assert_allclose(found, kid.mmd2(GENERATED, REAL, block=32), rtol=1e-9)
    pulls = kid.kernel_influence(GENERATED, REAL, block=32)
    split = kid.kernel_influence(GENERATED, REAL, block=32, mesh=mesh)
    np.testing.assert_allclose(split, pulls, rtol=1e-9, atol=1e-12)


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="lower subset_size"):
        kid.kernel_inception_distance(GENERATED, REAL, subset_size=100)
    with pytest.raises(ValueError, match="'adm' is not known"):
        kid.kernel_inception_distance(GENERATED, REAL, tool="adm")
    with pytest.raises(ValueError, match=r"features \[N, D\]"):
        kid.mmd2(GENERATED, REAL[:, :3])
    with pytest.raises(ValueError, match="two vectors"):
        kid.mmd2(GENERATED[:1], REAL)
