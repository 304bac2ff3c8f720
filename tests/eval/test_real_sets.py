"""real_sets: features, classes and labels of a source in one pass, and from the cache when nothing changed."""

from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from qdiff_jax.data.images import load_images
from qdiff_jax.eval.real_images import labelled_stream
from qdiff_jax.eval.real_sets import real_set
from qdiff_jax.eval.resize import crop_resize


class Network(NamedTuple):
    apply: object
    name: str = "probe"
    fingerprint: str = "w0"


def probe(x):
    flat = np.asarray(x, np.float32).reshape(len(x), -1)
    return {"pool": flat[:, ::7], "logits": flat[:, :10], "spatial": flat[:, 1::9]}


def made(source, cache=None, apply=probe, **options):
    return real_set(Network(apply), lambda x: x, source, cache=cache, batch=8, **options)


@pytest.fixture
def folder(tmp_path):
    """Two classes of pictures of two sizes, and an empty third class between them."""
    rng = np.random.default_rng(0)
    images = {}
    for name, side in (("a/0.png", 20), ("a/1.png", 24), ("c/0.png", 18)):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        images[name] = rng.integers(0, 256, (side, side + 6, 3), np.uint8)
        Image.fromarray(images[name]).save(tmp_path / "set" / name)
    (tmp_path / "set" / "b").mkdir()
    return tmp_path / "set", images


def test_a_folder_is_cropped_and_its_folders_are_the_classes(folder):
    path, images = folder
    found = made(f"folder:{path}", crop="lsun", size=16)
    expected = probe(np.stack([crop_resize(image, 16) for image in images.values()]))
    np.testing.assert_array_equal(found.described.features, expected["pool"])
    np.testing.assert_array_equal(found.described.labels, [0, 0, 2])
    assert found.origin.preparation == "lsun crop to 16"
    assert found.origin.count == 3


def test_padding_and_labels_are_those_of_the_training_data(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "s.npz", images=rng.integers(0, 256, (9, 5, 5, 1), np.uint8), labels=range(9)
    )
    source = f"npz:{tmp_path / 's.npz'}"
    expected = load_images(source, pad_to=8)
    parts = list(labelled_stream(source, crop="pad", size=8, batch=4))
    np.testing.assert_array_equal(np.concatenate([i for i, _ in parts]), expected.images)
    np.testing.assert_array_equal(np.concatenate([k for _, k in parts]), expected.labels)
    np.savez(tmp_path / "adm.npz", arr_0=expected.images)
    assert (made(f"npz:{tmp_path / 'adm.npz'}").described.labels == -1).all()


def test_the_cache_serves_only_the_same_measurement(folder, tmp_path):
    path, _ = folder
    calls = []

    def counted(x):
        calls.append(len(x))
        return probe(x)

    def again(**options):
        calls.clear()
        options = {"crop": "adm", "size": 16, "apply": counted, **options}
        return made(f"folder:{path}", tmp_path / "cache", **options)

    first, second = again(), again()
    assert not calls
    assert (second.origin, second.digest) == (first.origin, first.digest)
    for name in ("features", "predicted", "labels"):
        np.testing.assert_array_equal(
            getattr(second.described, name), getattr(first.described, name)
        )
    old, new = first.described.spatial, second.described.spatial
    np.testing.assert_array_equal(new.kept, old.kept)
    np.testing.assert_array_equal(new.moments.cov, old.moments.cov)
    assert again(crop="lsun").digest != first.digest
    assert calls
    again(limit=2)
    assert calls
    Image.new("RGB", (20, 20)).save(path / "b" / "new.png")
    assert again().origin.count == 4
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"PK")
    with pytest.raises(ValueError, match="delete the file: it will be made anew"):
        again()
