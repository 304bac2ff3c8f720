"""real_images: every kind of source, cropped as its loader does, and known by its content."""

import os

import numpy as np
import pytest
from PIL import Image

from qdiff_jax.eval.real_images import image_stream, source_fingerprint
from qdiff_jax.eval.resize import crop_resize

RNG = np.random.default_rng(0)


def drawn(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def test_a_folder_of_any_sizes_is_cropped_in_the_order_of_its_names(tmp_path):
    images = {"b.png": drawn(20, 30, 3), "a/c.png": drawn(40, 25, 3), "d.png": drawn(18, 18, 3)}
    for name, image in images.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    found = list(image_stream(f"folder:{tmp_path}", crop="lsun", size=16, batch=2))
    assert [len(part) for part in found] == [2, 1]
    expected = [crop_resize(images[name], 16) for name in ("a/c.png", "b.png", "d.png")]
    np.testing.assert_array_equal(np.concatenate(found), expected)
    with pytest.raises(ValueError, match="give a crop and a size"):
        list(image_stream(f"folder:{tmp_path}"))


def test_adm_s_archive_and_the_sources_of_the_training_data(tmp_path):
    images = drawn(5, 8, 8, 3)
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=np.zeros(3))
    np.savez(tmp_path / "own.npz", images=images, labels=np.zeros(5, np.int32))
    for name in ("adm", "own"):
        found = np.concatenate(list(image_stream(f"npz:{tmp_path / name}.npz", limit=4)))
        np.testing.assert_array_equal(found, images[:4])
    synthetic = np.concatenate(list(image_stream("synthetic:7", "test", crop="adm", size=16)))
    assert synthetic.shape == (7, 16, 16, 1)


def test_fingerprints_follow_the_content(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, arr_0=drawn(2, 4, 4, 3))
    first = source_fingerprint(f"npz:{path}")
    assert first == source_fingerprint(f"npz:{path}")
    assert first != source_fingerprint(f"npz:{path}", "test")
    np.savez(path, arr_0=drawn(2, 4, 4, 3))  # as many bytes
    assert first != source_fingerprint(f"npz:{path}")
    Image.fromarray(drawn(4, 4)).save(tmp_path / "a.png")
    before = source_fingerprint(f"folder:{tmp_path}")
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert before != source_fingerprint(f"folder:{tmp_path}")


def test_misuse_is_explained(tmp_path):
    with pytest.raises(ValueError, match="go together"):
        next(image_stream("synthetic:4", crop="lsun"))
    with pytest.raises(ValueError, match="'middle' is not known"):
        next(image_stream("synthetic:4", crop="middle", size=4))
    with pytest.raises(ValueError, match="holds no image"):
        next(image_stream(f"folder:{tmp_path}"))
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="is damaged"):
        next(image_stream(f"folder:{tmp_path}"))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match="must be uint8"):
        next(image_stream(f"npz:{tmp_path / 'float.npz'}"))
    with pytest.raises(ValueError, match="there is no image file"):
        next(image_stream(f"npz:{tmp_path / 'absent.npz'}"))
