"""described: order, labels, sums as of the whole set, memory that does not grow, devices."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.eval import described
from qdiff_jax.eval.described import GROUPS, class_agreement, describe, gather
from qdiff_jax.eval.frechet import moments_distance
from qdiff_jax.eval.inception_score import inception_score
from qdiff_jax.eval.intervals import distance_interval, score_interval, score_jackknife
from qdiff_jax.eval.moments import moments_of
from qdiff_jax.eval.tools import TOOLS
from qdiff_jax.runtime.mesh import data_mesh

IMAGES = np.random.default_rng(0).integers(0, 256, (21, 4, 4, 3), dtype=np.uint8)


def stream(count, batch=16, dim=3, spatial=6, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    for start in range(0, count, batch):
        n = min(batch, count - start)
        yield {
            "pool": rng.normal(size=(n, dim)).astype(np.float32),
            "spatial": rng.normal(size=(n, spatial)).astype(np.float32),
            "logits": rng.normal(size=(n, classes)).astype(np.float32),
            "logits_unbiased": 2 * rng.normal(size=(n, classes)).astype(np.float32),
        }


def whole(count, **options):
    parts = list(stream(count, **options))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_description_keeps_order_and_labels_over_shards():
    images = np.arange(7 * 4, dtype=np.uint8).reshape(7, 2, 2, 1)
    shards = [(images[:3], [0, 1, 2]), (images[3:], [3, 4, 5, 6])]
    found = describe(
        lambda x: {"pool": x.reshape(len(x), -1)}, lambda x: x.astype(np.float32), iter(shards), 4
    )
    np.testing.assert_array_equal(found.features, images.reshape(7, 4))
    assert found.labels.tolist() == list(range(7))
    assert found.predicted is None
    with pytest.raises(ValueError, match="needs a network with logits"):
        class_agreement(found)


@pytest.mark.parametrize("tool", ["adm", "torch-fidelity"])
def test_sums_are_those_of_the_whole_set(tool):
    held = whole(150)
    found = gather(stream(150), tool=tool, count=150)
    np.testing.assert_array_equal(found.features, held["pool"])
    np.testing.assert_array_equal(found.predicted, held["logits"].argmax(axis=1))
    np.testing.assert_allclose(
        found.spatial.moments.cov, np.cov(held["spatial"].T, dtype=np.float64), rtol=1e-12
    )
    np.testing.assert_array_equal(found.spatial.kept, held["spatial"])
    rule = TOOLS[tool].score
    interval = score_jackknife(found.score, GROUPS)
    score = inception_score(held["logits_unbiased"], **rule).mean
    assert interval.estimate == pytest.approx(score, rel=1e-12)
    expected = score_interval(held["logits_unbiased"], groups=GROUPS, **rule)
    np.testing.assert_allclose(interval[:5], expected[:5], rtol=1e-9)


def test_a_random_part_gives_the_spread_of_the_whole(monkeypatch):
    monkeypatch.setattr(described, "SPATIAL_KEPT", 700)
    held, found = whole(3000)["spatial"], gather(stream(3000)).spatial
    assert found.kept.shape == (700, 6)
    reference = moments_of(np.random.default_rng(9).normal(size=(4000, 6)) + 0.2)
    exact = distance_interval(held, reference)
    part = distance_interval(found.kept, reference, own=found.moments)
    assert part.estimate == pytest.approx(exact.estimate, rel=1e-9)
    assert part.estimate == pytest.approx(moments_distance(moments_of(held), reference), rel=1e-6)
    assert part.standard_error == pytest.approx(exact.standard_error, rel=0.1)
    # Each vector is kept as likely as any other: the mean place is the middle.
    rows = {row.tobytes(): place for place, row in enumerate(held)}
    places = np.array([rows[row.tobytes()] for row in found.kept])
    assert len(set(places)) == 700
    assert abs(places.mean() - 1500) < 4 * 866 / np.sqrt(700)


def test_memory_beyond_the_pooled_features_does_not_grow(monkeypatch):
    monkeypatch.setattr(described, "SPATIAL_KEPT", 500)

    def peak(count):
        tracemalloc.start()
        gather(stream(count, batch=500, dim=1, spatial=40, classes=30), tool="adm", count=count)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    # Of the 400 more bytes of features and logits that an image has, some dozens stay for its pool, its
    # class and its split.
    assert peak(24_000) - peak(12_000) < 12_000 * 120


@jax.jit
def apply(x):
    flat = jnp.reshape(x, (len(x), -1))
    return {"pool": flat[:, ::5], "spatial": flat[:, 3::7], "logits": flat[:, :4]}


def test_the_network_runs_on_every_device():
    seen = []

    def spread(x):
        seen.append(len(x.sharding.device_set))
        return apply(x)

    def prepare(images):
        return jnp.asarray(images).astype(jnp.float32) / 255.0

    def on_host(images):
        return jnp.asarray(np.asarray(images).astype(np.float32) / 255)  # as CLIP's are

    shards = [(IMAGES, np.zeros(21))]
    alone = describe(apply, prepare, shards, 8, tool="adm", count=21)
    for preparation in (prepare, on_host):
        seen.clear()
        split = describe(spread, preparation, shards, 8, tool="adm", count=21, mesh=data_mesh())
        assert seen == [8, 8, 8]
        np.testing.assert_allclose(split.features, alone.features, rtol=1e-6)
        np.testing.assert_array_equal(split.predicted, alone.predicted)
        np.testing.assert_allclose(split.score.posteriors, alone.score.posteriors, rtol=1e-6)


def test_misuse_is_explained():
    for count in (20, 22):
        with pytest.raises(ValueError, match=f"not the {count} images that were announced"):
            gather(stream(21), tool="adm", count=count)
    with pytest.raises(ValueError, match="no images to describe"):
        gather([])
