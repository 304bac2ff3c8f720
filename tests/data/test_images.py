"""Image sources read back what was written, refuse what is broken, and batch by (seed, step)."""

import gzip
import io
import struct

import numpy as np
import pytest
import tensorflow_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qdiff_jax.data import images
from qdiff_jax.eval.real_images import image_stream


def _write_idx(folder, stem, pixels, labels, compress):
    write = gzip.compress if compress else bytes
    suffix = ".gz" if compress else ""
    head = struct.pack(">4B3I", 0, 0, 8, 3, *pixels.shape)
    name = f"{stem}-images-idx3-ubyte{suffix}"
    (folder / name).write_bytes(write(head + pixels.tobytes()))
    head = struct.pack(">4BI", 0, 0, 8, 1, len(labels))
    (folder / f"{stem}-labels-idx1-ubyte{suffix}").write_bytes(write(head + labels.tobytes()))
    return folder / name


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8)


LABELS = np.array([3, 0, 1, 2, 3, 1], np.uint8)


@pytest.mark.parametrize("compress", [False, True])
def test_idx_round_trip(tmp_path, pixels, compress):
    _write_idx(tmp_path, "train", pixels, LABELS, compress)
    _write_idx(tmp_path, "t10k", pixels[:2], LABELS[:2], compress)
    train = images.load_images(f"idx:{tmp_path}", "train")
    test = images.load_images(f"idx:{tmp_path}", "test", num_classes=4)
    np.testing.assert_array_equal(train.images, pixels[..., None])
    np.testing.assert_array_equal(train.labels, LABELS)
    assert (train.labels.dtype, train.num_classes, test.num_classes) == (np.int32, 4, 4)
    assert len(test.images) == 2


def test_padding_centres_in_zeros(tmp_path, pixels):
    _write_idx(tmp_path, "train", pixels, LABELS, True)
    padded = images.load_images(f"idx:{tmp_path}", pad_to=32, limit=3).images
    assert padded.shape == (3, 32, 32, 1)
    np.testing.assert_array_equal(padded[:, 2:30, 2:30, 0], pixels[:3])
    assert padded.sum() == pixels[:3].sum()
    with pytest.raises(ValueError, match="28x28 cannot be padded to 16x16"):
        images.load_images(f"idx:{tmp_path}", pad_to=16)


def test_broken_idx_files_are_named(tmp_path, pixels):
    path = _write_idx(tmp_path, "train", pixels, LABELS, False)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="announces .* but holds"):
        images.load_images(f"idx:{tmp_path}")
    path.write_bytes(b"\x00\x00\x0d\x03" + whole[4:])
    with pytest.raises(ValueError, match="not an IDX file"):
        images.load_images(f"idx:{tmp_path}")
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(whole)[:-200])
    path.unlink()
    with pytest.raises(ValueError, match="truncated or no gzip"):
        images.load_images(f"idx:{tmp_path}")
    with pytest.raises(ValueError, match="holds neither t10k-images"):
        images.load_images(f"idx:{tmp_path}", "test")


def _encode(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def test_npz_raw_and_encoded(tmp_path):
    colour = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), np.uint8)
    labels = np.array([1, 0, 1, 1], np.int64)
    np.savez(tmp_path / "raw_train.npz", images=colour, labels=labels)
    encoded = [_encode(image) for image in colour]  # lossless, so that equality can be asked for
    offsets = np.cumsum([0, *map(len, encoded)])
    parts = dict(jpeg=np.frombuffer(b"".join(encoded), np.uint8), labels=labels)
    np.savez(tmp_path / "coded.npz", offsets=offsets, **parts)
    raw = images.load_images(f"npz:{tmp_path}/raw_{{split}}.npz", "train")
    coded = images.load_images(f"npz:{tmp_path}/coded.npz", "train")
    np.testing.assert_array_equal(raw.images, colour)
    np.testing.assert_array_equal(coded.images, colour)
    with pytest.raises(ValueError, match="no image file .*raw_test.npz"):
        images.load_images(f"npz:{tmp_path}/raw_{{split}}.npz", "test")
    np.savez(tmp_path / "coded.npz", offsets=offsets[:-1], **parts)
    with pytest.raises(ValueError, match="offsets must rise"):
        images.load_images(f"npz:{tmp_path}/coded.npz")
    whole = (tmp_path / "raw_train.npz").read_bytes()
    (tmp_path / "raw_train.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or no npz"):
        images.load_images(f"npz:{tmp_path}/raw_{{split}}.npz", "train")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(images=np.zeros((2, 8, 8, 3), np.float32), labels=np.zeros(2)), "must be uint8"),
        (dict(images=np.zeros((2, 8, 8, 4), np.uint8), labels=np.zeros(2)), "must be uint8"),
        (dict(images=np.zeros((2, 8, 8), np.uint8), labels=np.zeros(3)), "2 images but labels"),
        (dict(images=np.zeros((2, 8, 8), np.uint8), labels=np.array([-1, 0])), "labels of"),
        (dict(images=np.zeros((2, 8, 8), np.uint8), labels=np.array([0, 7])), r"outside \[0, 5\)"),
        (dict(pictures=np.zeros(2)), "it needs images and labels"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        images.load_images(f"npz:{tmp_path}/x.npz", num_classes=5)


def test_folders_are_classes(tmp_path):
    for i, name in enumerate(["boot", "coat", "boot"]):
        (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
        picture = np.full((8, 8, 3), 10 * i, np.uint8)
        (tmp_path / "train" / name / f"{i}.png").write_bytes(_encode(picture))
    nested = images.load_images(f"folder:{tmp_path}", "train")
    flat = images.load_images(f"folder:{tmp_path}/train/boot", "train")
    assert nested.labels.tolist() == [0, 0, 1]
    assert nested.images[:, 0, 0, 0].tolist() == [0, 20, 10]
    assert flat.labels.tolist() == [0, 0]
    (tmp_path / "train" / "coat" / "odd.png").write_bytes(_encode(np.zeros((9, 8, 3), np.uint8)))
    with pytest.raises(ValueError, match=r"odd.png is \(9, 8, 3\), the first image is \(8, 8, 3\)"):
        images.load_images(f"folder:{tmp_path}", "train")
    (tmp_path / "train" / "coat" / "odd.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="odd.png cannot be decoded"):
        images.load_images(f"folder:{tmp_path}", "train")
    with pytest.raises(ValueError, match="no image folder"):
        images.load_images(f"folder:{tmp_path}/none", "train")


def test_tfds_source_says_how_to_prepare():
    with pytest.raises(ValueError, match="file_format='array_record'"):
        images.load_images("tfds:a_set_that_nobody_made")


class _Prepared:
    """A TFDS builder that holds one split."""

    def __init__(self, records):
        self.records = records

    def as_data_source(self, split):
        return self.records[split]


def test_a_prepared_tfds_set_is_read_without_tensorflow(monkeypatch, pixels):
    asked = []
    records = [{"image": x[..., None], "label": int(y)} for x, y in zip(pixels, LABELS)]

    def builder(name, file_format):
        asked.append((name, file_format))
        return _Prepared({"train": records})

    monkeypatch.setattr(tensorflow_datasets, "builder", builder)
    found = images.load_images("tfds:fashion_mnist", "train", pad_to=32, limit=5)
    np.testing.assert_array_equal(found.images[:, 2:30, 2:30, 0], pixels[:5])
    np.testing.assert_array_equal(found.labels, LABELS[:5])
    stream = np.concatenate(list(image_stream("tfds:fashion_mnist", "train", batch=4)))
    np.testing.assert_array_equal(stream, pixels[..., None])
    assert asked == [("fashion_mnist", "array_record")] * 2
    # A split that was not prepared is the same mistake as a set that was not.
    with pytest.raises(ValueError, match="'fashion_mnist' is not prepared as array_record"):
        images.load_images("tfds:fashion_mnist", "test")
    with pytest.raises(ValueError, match="'fashion_mnist' is not prepared as array_record"):
        list(image_stream("tfds:fashion_mnist", "test"))


@pytest.mark.parametrize("source", ["idx", "zip:file", "synthetic:0", "synthetic:many"])
def test_unknown_sources(source):
    with pytest.raises(ValueError, match=source.split(":")[0]):
        images.load_images(source)


def test_synthetic_shapes_in_colour_are_the_grey_ones_tinted():
    grey, colour = (images.load_images(f"{kind}:20") for kind in ("synthetic", "synthetic_rgb"))
    assert colour.images.shape == (20, 32, 32, 3)
    np.testing.assert_array_equal(colour.labels, grey.labels)
    assert (colour.images <= grey.images).all()
    assert ((colour.images > 0) == (grey.images > 0)).all()
    peaks = colour.images.max(axis=(1, 2))
    assert (peaks.max(axis=1) - peaks.min(axis=1) > 10).mean() > 0.5


def test_synthetic_is_deterministic_and_separable():
    first, second = (images.load_images("synthetic:200", "train") for _ in range(2))
    np.testing.assert_array_equal(first.images, second.images)
    assert first.num_classes == 10
    test = images.load_images("synthetic:200", "test")
    assert (test.images != first.images).any()
    # Filled shapes (0-4) cover more than their hollow twins (5-9).
    area = (first.images > 0).mean(axis=(1, 2, 3))
    for shape in range(5):
        assert area[first.labels == shape].mean() > area[first.labels == shape + 5].mean()


def test_unit_range_inverts():
    every = np.arange(256, dtype=np.uint8)
    scaled = images.to_unit_range(every)
    assert scaled.dtype == np.float32
    assert (scaled[0], scaled[-1]) == (-1.0, 1.0)
    np.testing.assert_array_equal(images.to_uint8(scaled), every)
    assert images.to_uint8(np.array([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # Grey levels 10.3, 10.6, 254.9 on the scale 127.5 (x + 1).
        ("round", [10, 11, 255]),
        ("trunc_127.5", [10, 10, 254]),
        ("trunc_255", [10, 10, 254]),
        ("dit", [10, 11, 255]),
    ],
)
def test_published_rules_to_bytes(rule, expected):
    grey = np.array([10.3, 10.6, 254.9])
    assert images.to_uint8(grey / 127.5 - 1.0, rule).tolist() == expected
    assert images.to_uint8(np.array([-1.0, 1.0, -9.0, 9.0]), rule).tolist() == [0, 255, 0, 255]


def test_an_unknown_rule_to_bytes_is_refused():
    with pytest.raises(ValueError, match="unknown rule to uint8 'floor'.*trunc_255.*dit"):
        images.to_uint8(np.zeros(1), "floor")


@given(seed=st.integers(0, 9), batch=st.integers(1, 7), size=st.integers(7, 30))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_an_epoch_visits_images_once(seed, batch, size):
    steps = size // batch
    for epoch in (0, 1):
        visited = np.concatenate(
            [images.batch_indices(seed, epoch * steps + i, batch, size) for i in range(steps)]
        )
        assert len(set(visited.tolist())) == steps * batch
        assert set(visited.tolist()) <= set(range(size))


def test_batches_depend_on_seed_and_step_only():
    data = images.load_images("synthetic:50")
    together = images.batches(data, 3, 0, 8, 8)
    apart = images.batches(data, 3, 5, 2, 8)
    np.testing.assert_array_equal(apart["image"], together["image"][5:7])
    np.testing.assert_array_equal(apart["label"], together["label"][5:7])
    assert (images.batches(data, 4, 5, 2, 8)["label"] != apart["label"]).any()
    assert together["image"].dtype == np.uint8
    with pytest.raises(ValueError, match="larger than the set"):
        images.batches(data, 0, 0, 1, 51)
