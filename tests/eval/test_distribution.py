"""Distribution metrics together: intervals that cover, floors, labels."""

import numpy as np
import pytest

from qdiff_jax.eval.distribution import Described, class_agreement, describe, measure
from qdiff_jax.eval.kid import kernel_influence, mmd2

DIM = 5


def described(n, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    features = (rng.standard_normal((n, DIM)) + shift).astype(np.float32)
    labels = rng.integers(0, 3, n).astype(np.int32)
    logits = np.eye(3, dtype=np.float32)[(labels + (np.arange(n) % 4 == 0)) % 3]
    return Described({"pool": features, "logits": logits}, labels)


def test_equal_distributions_reach_the_floor_and_shifted_ones_do_not():
    reference, floor = described(600, 0), described(600, 1)
    near = measure(described(400, 2), reference, floor)
    far = measure(described(400, 3, shift=1.0), reference, floor)
    for name in ("frechet", "kernel"):
        assert near[name]["floor_n"] == 400
        assert near[name]["low"] < near[name]["floor"] < near[name]["high"]
        assert far[name]["low"] > far[name]["floor"]
    assert far["frechet"]["value"] == pytest.approx(DIM, rel=0.15)
    assert far["precision"]["value"] < near["precision"]["value"]
    assert near["class_agreement"]["value"] == 0.75
    assert near["class_agreement"]["real"] == 0.75
    assert measure(described(400, 2), reference, None)["frechet"].keys() == {"value", "low", "high"}


def test_a_tools_conventions_replace_ours():
    found = measure(described(300, 0), described(300, 1), None, tool="adm")
    assert "score" in found  # of the logits, by ADM's splits
    assert "class_agreement" not in found
    with pytest.raises(ValueError, match="evaluation tool 'amd' is not known"):
        measure(described(300, 0), described(300, 1), None, tool="amd")


def test_the_kernel_influence_is_the_derivative_and_its_spread_the_error():
    x, y = described(40, 0, 0.5).features, described(50, 1).features
    influence = kernel_influence(x, y)
    # Leaving one out moves the estimate by -I / (n - 1) to first order (the U-statistic's own order).
    without = np.array([mmd2(np.delete(x, i, axis=0), y) for i in range(40)])
    slope = np.polyfit(influence, without, 1)[0]
    assert slope == pytest.approx(-1 / 39, rel=0.1)
    # Over fresh draws the error is what the influence says.
    values = [mmd2(described(40, seed, 0.5).features, y) for seed in range(60)]
    assert np.std(values) == pytest.approx(influence.std() / np.sqrt(40), rel=0.35)


def test_description_keeps_order_and_labels_over_shards():
    images = np.arange(7 * 4, dtype=np.uint8).reshape(7, 2, 2, 1)
    shards = [(images[:3], [0, 1, 2]), (images[3:], [3, 4, 5, 6])]
    found = describe(
        lambda x: {"pool": x.reshape(len(x), -1)}, lambda x: x.astype(np.float32), iter(shards), 4
    )
    np.testing.assert_array_equal(found.features, images.reshape(7, 4))
    assert found.labels.tolist() == list(range(7))
    with pytest.raises(ValueError, match="needs a network with logits"):
        class_agreement(found)
