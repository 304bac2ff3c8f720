"""precision_recall: brute force in float64, both tools' numbers, blocks and devices change nothing."""

import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_jax.eval.precision_recall import (
    precision_recall,
    precision_recall_intervals,
    recall_alone,
)
from qdiff_jax.runtime.mesh import data_mesh

from ..parity import eval_inputs

STORED = pathlib.Path(__file__).parents[1] / "parity" / "cases"
CASES, ADM = np.load(STORED / "eval_tools.npz"), np.load(STORED / "adm.npz")
GENERATED = eval_inputs.features(1, 90)
BLOCK = 32  # one shape of block for all tests: each is compiled once
REAL = eval_inputs.features(2, 110) * np.float32(1.1)


def by_definition(generated, real, k):
    generated, real = generated.astype(np.float64), real.astype(np.float64)

    def distances(a, b):
        return np.sqrt(np.square(a[:, None] - b[None]).sum(axis=-1))

    def inside(points, centres):
        radii = np.sort(distances(centres, centres), axis=1)[:, k]  # place 0 is the vector itself
        return (distances(points, centres) <= radii[None, :]).any(axis=1)

    return inside(generated, real), inside(real, generated)


@given(seed=st.integers(0, 99), counts=st.tuples(*[st.integers(33, 97)] * 2))
@settings(deadline=None, max_examples=12, derandomize=True)
def test_equals_brute_force_for_every_sample(seed, counts):
    generated = eval_inputs.features(seed, counts[0]) + 5
    real = 1.1 * eval_inputs.features(seed + 100, counts[1]) + 5
    expected = by_definition(generated, real, 3)
    found = precision_recall(generated, real, block=BLOCK)
    np.testing.assert_array_equal(found.generated_inside, expected[0])
    np.testing.assert_array_equal(found.real_inside, expected[1])
    assert found.precision == expected[0].mean()
    assert found.recall == expected[1].mean()


def test_a_mean_far_from_zero_costs_no_digits():
    """|u|^2 - 2 u.v + |v|^2 of these in float32 without the common shift is all rounding."""
    expected = by_definition(GENERATED + 4000, REAL + 4000, 3)
    found = precision_recall(GENERATED + 4000, REAL + 4000, block=BLOCK)
    np.testing.assert_array_equal(found.generated_inside, expected[0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_torch_fidelity(dtype):
    found = precision_recall(GENERATED, REAL, dtype=dtype, block=BLOCK)
    np.testing.assert_allclose(found[:2], CASES["pr/torch-fidelity"], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pr", lambda x: x),
        ("pr/coarse", lambda x: x + 8),
        ("pr/overflow", lambda x: x * 100),
    ],
)
def test_adm_in_half_precision(name, change):
    found = precision_recall(change(GENERATED), change(REAL), dtype="float16", block=BLOCK)
    np.testing.assert_allclose(found[:2], ADM[name], rtol=1e-6)


def test_half_precision_is_not_harmless():
    exact = precision_recall(GENERATED + 8, REAL + 8, block=BLOCK)
    assert exact.precision != ADM["pr/coarse"][0]


def test_same_values_on_eight_devices():
    mesh = data_mesh()
    alone = precision_recall(GENERATED, REAL, block=BLOCK)
    split = precision_recall(GENERATED, REAL, block=BLOCK, mesh=mesh)
    np.testing.assert_array_equal(alone.generated_inside, split.generated_inside)
    np.testing.assert_array_equal(alone.real_inside, split.real_inside)


def test_the_manifolds_of_halves_are_those_of_the_vectors_in_them():
    """Every half of the interval against precision and recall computed anew."""
    cuts, k = 3, 3
    values, precision, recall = precision_recall_intervals(
        GENERATED, REAL, k=k, cuts=cuts, seed=1, block=BLOCK
    )
    alone = precision_recall(GENERATED, REAL, k=k, block=BLOCK)
    assert values[:2] == alone[:2]
    np.testing.assert_array_equal(values.real_inside, alone.real_inside)
    for place, (interval, made, counted) in enumerate(
        ((recall, GENERATED, alone.real_inside), (precision, REAL, alone.generated_inside))
    ):
        rng, apart = np.random.default_rng((1, place)), []
        for _ in range(cuts):
            side = rng.permutation(len(made)) % 2
            halves = [made[side == 0], made[side == 1]]
            sets = [(half, REAL) if place == 0 else (GENERATED, half) for half in halves]
            one, two = (by_definition(*pair, k)[1 - place].mean() for pair in sets)
            apart.append((one - two) ** 2 / 4)
        mean = counted.var(ddof=1) / len(counted)
        assert interval.estimate == counted.mean()
        np.testing.assert_allclose(interval.standard_error**2, np.mean(apart) + mean, rtol=1e-6)


def test_intervals_cover_over_both_sets():
    """Fresh draws of both sets: few generated samples, whose manifold moves more than the counting does."""
    rng = np.random.default_rng(0)
    found, errors, counting = [], [], []
    for _ in range(100):
        generated, real = 0.8 * rng.normal(size=(60, 3)), rng.normal(size=(240, 3))
        values, *intervals = precision_recall_intervals(generated, real, block=256)
        found.append([(i.low, i.estimate, i.high) for i in intervals])
        errors.append([i.standard_error for i in intervals])
        counting.append(values.real_inside.std(ddof=1) / np.sqrt(240))
    low, value, high = np.moveaxis(np.array(found), 2, 0)
    truth = value.mean(axis=0)
    hits = ((low <= truth) & (truth <= high)).mean(axis=0)
    assert (hits >= 0.88).all(), hits
    # Somewhat wide, never narrow: the halves' nearest neighbours overstate what little the manifold moves.
    ratio = np.mean(errors, axis=0) / value.std(axis=0, ddof=1)
    assert (0.85 < ratio).all(), ratio
    assert (ratio < 1.8).all(), ratio
    assert np.mean(counting) < 0.75 * value[:, 1].std(ddof=1)  # what the mean alone would say


def test_duplicates_and_containment():
    doubled = np.repeat(GENERATED[:20], 4, axis=0)  # every radius of k = 3 is zero
    found = precision_recall(GENERATED[:40], doubled, block=BLOCK)
    np.testing.assert_array_equal(found.generated_inside, np.arange(40) < 20)
    same = precision_recall(REAL, REAL, block=BLOCK)
    assert same[:2] == (1.0, 1.0)


def test_the_first_neighbour_alone():
    expected = by_definition(GENERATED, REAL, 1)
    found = precision_recall(GENERATED, REAL, k=1, block=BLOCK)
    np.testing.assert_array_equal(found.generated_inside, expected[0])


def test_misuse_is_explained():
    with pytest.raises(
        ValueError, match="more than 3 vectors in half of each set: there are 7 and 110"
    ):
        precision_recall_intervals(GENERATED[:7], REAL)
    with pytest.raises(ValueError, match="more than 3 vectors"):
        precision_recall(GENERATED[:3], REAL)
    with pytest.raises(ValueError, match=r"features \[N, D\]"):
        precision_recall(GENERATED, REAL[:, :2])
    with pytest.raises(ValueError, match="'bfloat16' are not known"):
        precision_recall(GENERATED, REAL, dtype="bfloat16")
    with pytest.raises(ValueError, match="not finite"):
        precision_recall(GENERATED * np.nan, REAL)


def test_recall_alone_is_the_recall():
    rng = np.random.default_rng(5)
    real, generated = rng.standard_normal((300, 8)), 0.7 * rng.standard_normal((90, 8)) + 0.2
    whole = precision_recall(generated, real)
    assert 0.0 < whole.recall < 1.0
    assert recall_alone(generated, real) == whole.recall
    assert recall_alone(generated, real, block=64) == whole.recall
    with pytest.raises(ValueError, match="more than 3 vectors"):
        recall_alone(generated[:3], real)
