"""reference: cached by what it was made of, published layouts, mismatches refused, floors."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.eval import backends, frechet, moments
from qdiff_jax.eval.networks import clip_images
from qdiff_jax.eval.real_images import image_stream
from qdiff_jax.eval.reference import (
    Origin,
    Reference,
    check_comparable,
    distance,
    gather,
    load_published,
    load_reference,
    real_floor,
    reference_statistics,
    save_reference,
)
from qdiff_jax.eval.tools import preprocess

ORIGIN = Origin("folder:a", "inception", "w0", "adm", 10)


class Network(NamedTuple):
    apply: object
    name: str = "inception-fid"  # whose preparation it then has
    fingerprint: str = "w0"
    size: int = 9


def probe(x):
    flat = jnp.reshape(x, (x.shape[0], -1))
    return {"pool": flat[:, ::40], "spatial": flat[:, 3::60], "logits": flat[:, :2]}


def made(network, cache, **options):
    return reference_statistics(network, "synthetic:30", batch=8, cache=cache, **options)


def test_statistics_of_a_source_as_the_tool_prepares_it(tmp_path):
    found = made(Network(probe), tmp_path, keep=11, crop="lsun", size=16)
    images = np.concatenate(list(image_stream("synthetic:30", crop="lsun", size=16)))
    expected = probe(preprocess(images, "adm", size=9))
    for name in ("pool", "spatial"):
        x = np.asarray(expected[name], np.float64)
        np.testing.assert_allclose(found.moments[name].cov, np.cov(x.T), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(found.features, expected["pool"][:11], rtol=1e-5, atol=1e-6)
    assert set(found.moments) == {"pool", "spatial"}
    assert found.origin.count == 30
    assert found.origin.preparation == "lsun crop to 16"


def test_each_network_gets_its_own_preparation():
    """CLIP's images are not Inception's: without `prepare` the network's published way is taken."""
    seen = []

    def kept(x):
        seen.append(np.asarray(x))
        return probe(x)

    images = np.concatenate(list(image_stream("synthetic:30")))
    for name in ("clip-vit-b32", "efficientnet-lite0", "inception-fid"):
        seen.clear()
        network = Network(kept, name=name)
        reference_statistics(network, "synthetic:30", batch=30)
        expected = backends.preparation(network, "adm")(images)
        np.testing.assert_array_equal(seen[0], expected)
    clip = clip_images.preprocess(images, 9)
    reference_statistics(Network(kept, name="clip-vit-b32"), "synthetic:30", batch=30)
    np.testing.assert_array_equal(seen[1], clip)
    assert np.abs(clip - preprocess(images, "adm", size=9)).max() > 0.1
    with pytest.raises(ValueError, match="for the network 'mine' is not known.*as `prepare`"):
        reference_statistics(Network(probe, name="mine"), "synthetic:30")
    own = reference_statistics(
        Network(probe, name="mine"), "synthetic:30", prepare=lambda x: x / np.float32(2)
    )
    np.testing.assert_allclose(own.features, probe(images / np.float32(2))["pool"], rtol=1e-6)


def test_the_cache_serves_only_the_same_measurement(tmp_path):
    calls = []

    def counted(x):
        calls.append(len(x))
        return probe(x)

    first = made(Network(counted), tmp_path)
    assert calls
    calls.clear()
    again = made(Network(counted), tmp_path)
    assert not calls
    assert again.origin == first.origin
    np.testing.assert_allclose(again.moments["pool"].cov, first.moments["pool"].cov, rtol=1e-12)
    np.testing.assert_array_equal(again.features, first.features)
    for network, options in (
        (Network(counted, fingerprint="w1"), {}),
        (Network(counted), {"tool": "clean-fid"}),
        (Network(counted), {"limit": 20}),
        (Network(counted), {"split": "test"}),
    ):
        calls.clear()
        other = made(network, tmp_path, **options)
        assert calls
        assert (other.moments["pool"].mean != first.moments["pool"].mean).any() or network[
            2
        ] == "w1"


def test_files_are_read_as_published_ones_and_back(tmp_path):
    rng = np.random.default_rng(0)
    batches = [{"pool": rng.normal(size=(6, 4)), "spatial": rng.normal(size=(6, 3))}] * 2
    reference = gather(ORIGIN, batches, keep=5)
    path = tmp_path / "reference.npz"
    save_reference(path, reference)
    stored = np.load(path)
    np.testing.assert_allclose(stored["sigma"], reference.moments["pool"].cov)
    assert load_reference(path).origin == reference.origin == ORIGIN._replace(count=12)

    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), **{
        name: stored[name] for name in ("mu", "sigma", "mu_s", "sigma_s")
    })  # fmt: skip
    np.savez(tmp_path / "pytorch.npz", mu=stored["mu"], sigma=stored["sigma"].astype(np.float32))
    for name, layers in (("adm", {"pool", "spatial"}), ("pytorch", {"pool"})):
        found = load_published(
            tmp_path / f"{name}.npz", network=Network(probe), tool="adm", count=50
        )
        assert set(found.moments) == layers
        assert found.origin.count == found.moments["pool"].n == 50
        np.testing.assert_allclose(found.moments["pool"].cov, stored["sigma"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("network", "dino", "different networks: 'inception' and 'dino'"),
        ("weights", "w1", "different weights"),
        ("tool", "clean-fid", "different resizing rules"),
        ("preparation", "adm crop to 256", "different preparations: 'none' and 'adm crop to 256'"),
        ("count", 9, "has 10 samples and 'folder:a' has 9"),
    ],
)
def test_what_does_not_compare_is_refused(field, value, message):
    check_comparable(ORIGIN, ORIGIN._replace(source="b"))
    other = ORIGIN._replace(**{field: value})
    assert other.fingerprint != ORIGIN.fingerprint
    layers = {"pool": moments.moments_of(np.random.default_rng(0).normal(size=(9, 3)))}
    sets = [Reference(origin, layers, None) for origin in (ORIGIN, other)]
    with pytest.raises(ValueError, match=message):
        check_comparable(ORIGIN, other)
    with pytest.raises(ValueError, match=message):
        distance(*sets)
    waived = {"count": {"sizes": False}, "preparation": {"preparations": False}}.get(field)
    if waived:
        check_comparable(ORIGIN, other, **waived)
        assert distance(*sets, **waived) == pytest.approx(0.0, abs=1e-9)


def test_the_distance_of_two_references():
    rng = np.random.default_rng(0)
    sets = [
        gather(
            ORIGIN, [{"pool": rng.normal(size=(50, 4)) + i, "spatial": rng.normal(size=(50, 3))}]
        )
        for i in (0, 1)
    ]
    for layer in ("pool", "spatial"):
        expected = frechet.moments_distance(*(one.moments[layer] for one in sets))
        assert distance(*sets, layer=layer) == expected
    pool_only = sets[1]._replace(moments={"pool": sets[1].moments["pool"]})
    with pytest.raises(ValueError, match=r"no moments of 'spatial', only of \['pool'\]"):
        distance(sets[0], pool_only, layer="spatial")


def test_floors():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(2, 400, 3))

    def distance(x, y):
        return frechet.moments_distance(moments.moments_of(x), moments.moments_of(y))

    halves = real_floor(distance, train, seed=1)
    assert halves.counts == (200, 200)
    assert 0 < halves.value < distance(train + 1, test)
    whole = real_floor(distance, train, test)
    assert whole.value == distance(test, train)
    few = real_floor(distance, train, test, count=50)
    assert few.counts == (50, 400)
    assert few.value > whole.value  # fewer samples, higher floor
    with pytest.raises(ValueError, match="a floor of 300"):
        real_floor(distance, train, count=300)


def test_misuse_is_explained(tmp_path):
    with pytest.raises(ValueError, match="no statistics file"):
        load_reference(tmp_path / "absent.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ValueError, match="damaged or no npz"):
        load_reference(tmp_path / "broken.npz")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="read published statistics with load_published"):
        load_reference(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="no mu and sigma"):
        load_published(tmp_path / "other.npz", network=Network(probe), tool="adm", count=5)
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.eye(2))
    with pytest.raises(ValueError, match="do not fit"):
        load_published(tmp_path / "odd.npz", network=Network(probe), tool="adm", count=5)
    with pytest.raises(ValueError, match="gave no images"):
        gather(ORIGIN, [])
