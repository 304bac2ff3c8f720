"""clip_score: cosines of pairs, the conventions of scale and floor, misuse."""

import numpy as np
import pytest

from qdiff_jax.eval.clip_score import clip_score, clip_score_interval, cosines
from qdiff_jax.eval.intervals import mean_interval


def test_mean_cosine_of_pairs_whatever_their_length():
    image = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    text = np.array([[5.0, 0.0], [0.0, -1.0], [7.0, 0.0]])
    np.testing.assert_allclose(cosines(image, text), [1.0, -1.0, 0.5**0.5], rtol=1e-15)
    np.testing.assert_allclose(clip_score(image, text), 0.5**0.5 / 3, rtol=1e-14)
    np.testing.assert_allclose(
        clip_score(image, text, scale=2.5, floor=0.0), 2.5 * (1 + 0.5**0.5) / 3, rtol=1e-14
    )


def test_the_interval_is_that_of_the_mean_of_pairs():
    image, text = np.random.default_rng(0).normal(size=(2, 30, 8))
    for options in ({}, {"scale": 2.5, "floor": 0.0}):
        found = clip_score_interval(image, text, level=0.9, **options)
        assert found.estimate == pytest.approx(clip_score(image, text, **options), rel=1e-12)
        values = [clip_score(i[None], t[None], **options) for i, t in zip(image, text)]
        np.testing.assert_allclose(found[:4], mean_interval(values, level=0.9)[:4], rtol=1e-9)
    with pytest.raises(ValueError, match="at least two values"):
        clip_score_interval(image[:1], text[:1])


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="pairs features"):
        clip_score(np.ones((2, 3)), np.ones((3, 3)))
    with pytest.raises(ValueError, match="zero or not finite"):
        clip_score(np.zeros((2, 3)), np.ones((2, 3)))
