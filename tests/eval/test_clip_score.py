"""clip_score: cosines of pairs, the conventions of scale and floor, misuse."""

import numpy as np
import pytest

from qdiff_jax.eval.clip_score import clip_score, cosines


def test_mean_cosine_of_pairs_whatever_their_length():
    image = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    text = np.array([[5.0, 0.0], [0.0, -1.0], [7.0, 0.0]])
    np.testing.assert_allclose(cosines(image, text), [1.0, -1.0, 0.5**0.5], rtol=1e-15)
    np.testing.assert_allclose(clip_score(image, text), 0.5**0.5 / 3, rtol=1e-14)
    np.testing.assert_allclose(
        clip_score(image, text, scale=2.5, floor=0.0), 2.5 * (1 + 0.5**0.5) / 3, rtol=1e-14
    )


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="pairs features"):
        clip_score(np.ones((2, 3)), np.ones((3, 3)))
    with pytest.raises(ValueError, match="zero or not finite"):
        clip_score(np.zeros((2, 3)), np.ones((2, 3)))
