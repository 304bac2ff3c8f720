"""Fifty thousand images become statistics in one pass, in memory that does not depend on their number."""

import tracemalloc

import numpy as np

from qdiff_jax.eval.extract import feature_batches
from qdiff_jax.eval.reference import Origin, gather

SIZE, FEATURES = (32, 32, 3), 64
PROJECTION = np.random.default_rng(0).normal(size=(3072, FEATURES)).astype(np.float32) / 3072


def images(count, part=500):
    rng = np.random.default_rng(1)
    for _ in range(0, count, part):
        yield np.frombuffer(rng.bytes(part * 3072), np.uint8).reshape(part, *SIZE)


def statistics(count):
    """The reference of `count` images and the most bytes that were held for it."""

    def apply(x):
        return {"pool": x.reshape(len(x), -1) @ PROJECTION}

    tracemalloc.start()
    try:
        batches = feature_batches(apply, lambda x: x.astype(np.float32), images(count), batch=250)
        found = gather(Origin("drawn", "stub", "w", "", 0), batches)
        return found, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_images():
    few, little = statistics(5_000)
    many, much = statistics(50_000)
    assert (few.origin.count, many.origin.count) == (5_000, 50_000)
    assert much < 16e6  # the images alone are 154 MB
    assert much < 1.1 * little
    # The pixels are independent and uniform: the covariance is known.
    expected = PROJECTION.T.astype(np.float64) @ PROJECTION * (256**2 - 1) / 12
    spread = np.sqrt(np.outer(np.diag(expected), np.diag(expected)) / 50_000)
    assert (np.abs(many.moments["pool"].cov - expected) < 6 * spread).all()
