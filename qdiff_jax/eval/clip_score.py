"""CLIP score: the mean cosine of image and caption in CLIP's joint space.

    score = w mean_i max(cos(f(image_i), g(caption_i)), floor)

(Hessel et al. 2021, arXiv:2104.08718, eq. 1, with w = 2.5 and floor 0.) The quantization papers print
the plain mean cosine (w = 1, about 0.31), torchmetrics 100 times it; say which, and which CLIP.
"""

import numpy as np

from qdiff_jax.eval.intervals import Interval, mean_interval


def cosines(image_features, text_features) -> np.ndarray:
    """[N] float64: the cosine of each pair of features [N, D] (floating, not normalized before).

    Raises ValueError when the shapes differ or a feature vector is zero or not finite.
    """
    image, text = (np.asarray(x, np.float64) for x in (image_features, text_features))
    if image.shape != text.shape or image.ndim != 2 or len(image) == 0:
        raise ValueError(
            f"clip score pairs features [N, D] with [N, D]: the images have {image.shape} and the "
            f"captions {text.shape}."
        )
    norms = np.linalg.norm(image, axis=1) * np.linalg.norm(text, axis=1)
    if not (np.isfinite(norms).all() and (norms > 0).all()):
        raise ValueError("clip score: a feature vector is zero or not finite; check the images.")
    return np.einsum("nd,nd->n", image, text) / norms


def clip_score(
    image_features, text_features, *, scale: float = 1.0, floor: float | None = None
) -> float:
    """The mean cosine of pairs of features [N, D], times `scale`.

    Args:
      image_features, text_features: [N, D] floating, projected to the joint space.
      scale: 1 as in the quantization papers, 100 as torchmetrics, 2.5 as Hessel et al.
      floor: None, or the value under which a pair's cosine counts as this (0 in Hessel et al.).

    Raises ValueError as `cosines` does.
    """
    return float(np.mean(_scores(image_features, text_features, scale, floor)))


def clip_score_interval(
    image_features,
    text_features,
    *,
    scale: float = 1.0,
    floor: float | None = None,
    level: float = 0.95,
) -> Interval:
    """`clip_score` as the mean of independent pairs, with its interval.

    Arguments as there; level: the coverage aimed at. Raises ValueError as `cosines` does, and for a
    single pair.
    """
    values = _scores(image_features, text_features, scale, floor)
    return mean_interval(values, level=level)


def _scores(image_features, text_features, scale, floor) -> np.ndarray:
    values = cosines(image_features, text_features)
    return scale * (values if floor is None else np.maximum(values, floor))
