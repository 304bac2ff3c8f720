"""inception_score: the definition, torch-fidelity's and ADM's splits, streaming."""

import pathlib

import numpy as np
import pytest
import scipy.special

from qdiff_jax.eval.inception_score import finish, inception_score, init, split_index, update

from ..parity import eval_inputs

STORED = pathlib.Path(__file__).parents[1] / "parity" / "cases"
CASES, ADM = np.load(STORED / "eval_tools.npz"), np.load(STORED / "adm.npz")
LOGITS = eval_inputs.logits()


def by_definition(logits):
    p = scipy.special.softmax(logits.astype(np.float64), axis=1)
    divergence = scipy.special.rel_entr(p, p.mean(axis=0)[None, :]).sum(axis=1)
    return np.exp(divergence.mean())


def test_one_split_is_the_definition_in_any_batches():
    for batch in (1000, 7):
        found = inception_score(LOGITS, splits=1, batch=batch)
        np.testing.assert_allclose(found.mean, by_definition(LOGITS), rtol=1e-10)


def test_torch_fidelity():
    found = inception_score(LOGITS)
    np.testing.assert_allclose([found.mean, found.std], CASES["is/torch-fidelity"], rtol=1e-6)


def test_adm():
    found = inception_score(LOGITS, splits=None, split_size=40, shuffle=False)
    np.testing.assert_allclose(found.mean, ADM["is/splits_of_40"], rtol=1e-6)
    np.testing.assert_allclose(found.splits[-1], by_definition(LOGITS[80:]), rtol=1e-10)


def test_certain_and_balanced_classes_score_their_number():
    logits = np.tile(np.eye(5), (6, 1)) * 2000.0  # posteriors that underflow to exactly 0
    np.testing.assert_allclose(inception_score(logits, splits=1).mean, 5.0, rtol=1e-12)
    np.testing.assert_allclose(inception_score(logits * 0, splits=2).mean, 1.0, rtol=1e-12)


def test_splits_hold_every_sample_once_with_even_sizes():
    index = split_index(103, splits=10)
    assert set(np.bincount(index)) == {10, 11}
    assert (index != split_index(103, splits=10, shuffle=False)).any()
    np.testing.assert_array_equal(
        split_index(5, splits=None, split_size=2, shuffle=False), [0, 0, 1, 1, 2]
    )


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="either splits or split_size"):
        inception_score(LOGITS, split_size=5)
    with pytest.raises(ValueError, match="do not make 10 splits"):
        inception_score(LOGITS[:3])
    with pytest.raises(ValueError, match="not finite"):
        inception_score(LOGITS * np.nan)
    with pytest.raises(ValueError, match="no samples"):
        finish(init(2, 3))
    with pytest.raises(ValueError, match=r"expected \[B, 3\]"):
        update(init(2, 3), np.zeros((2, 4)), np.zeros(2, int))
