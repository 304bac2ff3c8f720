"""What evaluations are judged by: real images as they were prepared, published moments, captions, partners."""

import dataclasses
import json
import shutil
import types

import numpy as np
import pytest
from PIL import Image

from experiments import evaluate as evaluation
from experiments.evaluate import evaluate
from experiments.evaluate_captions import load_captions, measure_captions
from experiments.evaluate_config import ClipConfig, LpipsConfig, read_config
from experiments.evaluate_paired import Partner, load_perceptual, measure_pairs
from experiments.evaluate_real import write_statistics
from qdiff_jax.eval import backends
from qdiff_jax.eval.backends import CaptionNetwork
from qdiff_jax.eval.described import Described
from qdiff_jax.eval.frechet import moments_distance
from qdiff_jax.eval.moments import moments_of
from qdiff_jax.eval.shards import Shard, read_shards, shard_paths
from qdiff_jax.observe.archive import save_arrays

from .judging import config, install


@pytest.fixture
def stub(monkeypatch):
    return install(monkeypatch)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A finished evaluation of the miniature; copy it before changing anything."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        workdir = tmp_path_factory.mktemp("drawn") / "w"
        evaluate(config(), workdir)
    return workdir


@pytest.fixture
def workdir(drawn, tmp_path):
    return shutil.copytree(drawn, tmp_path / "w")


def features(stub, workdir):
    shards = read_shards(path for path, _ in shard_paths(workdir / "shards", 40, 20))
    images = np.concatenate([shard.images for shard in shards]).astype(np.float32) / 127.5 - 1
    return images.reshape(40, 64) @ stub.maps["pool"]


def test_a_folder_of_pictures_is_prepared_and_cached(stub, workdir, tmp_path):
    rng = np.random.default_rng(0)
    for index in range(50):
        picture = rng.integers(0, 256, (9 + index % 3, 12), np.uint8)
        for split in ("train", "test"):
            (tmp_path / split).mkdir(exist_ok=True)
            Image.fromarray(picture).save(tmp_path / split / f"{index:02d}.png")
    given = config(data__source=f"folder:{tmp_path}", cache=str(tmp_path / "cache"), data__limit=45)
    first = evaluate(given, workdir)
    assert "class_agreement" not in first["metrics"]  # flat folders name no classes
    assert "spatial_frechet" in first["metrics"]
    calls, stub.calls = stub.calls, 0
    assert evaluate(given, workdir)["metrics"] == first["metrics"]
    assert stub.calls < calls
    assert len(list((tmp_path / "cache").glob("real_*.npz"))) == 2


def test_published_statistics_take_the_place_of_the_reference(stub, workdir, tmp_path):
    whole = evaluate(config(), workdir)["metrics"]
    write_statistics(read_config(config()), tmp_path / "statistics.npz")
    published = config(data__published=str(tmp_path / "statistics.npz"))
    result = evaluate(published, workdir)
    for name in ("frechet", "spatial_frechet"):
        for key in ("value", "low", "floor"):
            assert result["metrics"][name][key] == pytest.approx(whole[name][key], rel=1e-6)
    assert len(result["protocol"]["published_sha256"]) == 64
    assert result["metrics"]["kernel"] == whole["kernel"]

    stored = np.load(tmp_path / "statistics.npz")
    mean = stored["mu"] + 1.0
    np.savez(tmp_path / "other.npz", mu=mean, sigma=stored["sigma"])
    overrides = {"data__published": str(tmp_path / "other.npz"), "data__source": ""}
    alone = evaluate(config(**overrides, data__published_count=500, extrapolate=True), workdir)
    assert set(alone["metrics"]) == {"frechet", "frechet_infinity"}
    moments = moments_of(features(stub, workdir))
    expected = moments_distance(moments, moments_of(np.zeros((2, 6)))._replace(
        n=500, mean=mean, scatter=stored["sigma"] * 499))  # fmt: skip
    assert alone["metrics"]["frechet"]["value"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="set config.data.published_count"):
        evaluate(config(**overrides), workdir)
    unlike = config(data__published=str(tmp_path / "statistics.npz"), network="stub")
    with pytest.raises(ValueError, match="different networks: 'stub' and 'classifier_fashion'"):
        evaluate(unlike, workdir)
    np.savez(tmp_path / "wide.npz", mu=np.zeros(9), sigma=np.eye(9))
    overrides["data__published"] = str(tmp_path / "wide.npz")
    with pytest.raises(ValueError, match=r"has 9 features \(pool\) and classifier_fashion gives 6"):
        evaluate(config(**overrides, data__published_count=500), workdir)


def test_the_command_prints_distances_by_their_network(
    stub, workdir, tmp_path, monkeypatch, capsys
):
    def run(**given):
        args = {"compare": None, "statistics": False, "compile_cache": None, "config": config()}
        given = types.SimpleNamespace(**{**args, **given})
        monkeypatch.setattr(evaluation.flags, "FLAGS", given)
        evaluation.main(["evaluate"])
        return capsys.readouterr().out

    monkeypatch.setattr(evaluation, "log_progress", lambda: None)
    monkeypatch.setattr(evaluation, "enable_compile_cache", lambda directory: None)
    printed = run(workdir=str(workdir))
    assert "Frechet distance (classifier_fashion)" in printed
    assert "  floor " in printed
    assert "FID" not in printed
    inception = run(workdir=str(workdir), config=config(network="inception-fid", tool="adm"))
    assert inception.startswith("FID ")
    assert "Inception" in (workdir / "report.html").read_text()
    assert "64 images of synthetic:64 test" in run(workdir=str(tmp_path / "s"), statistics=True)
    assert (tmp_path / "s" / "statistics.npz").exists()
    shutil.copytree(workdir, tmp_path / "other")
    both = f"{workdir},{tmp_path / 'other'}".split(",")
    assert "| evaluation | FID | sFID |" in run(workdir=str(tmp_path / "out"), compare=both)


def test_the_floor_may_be_between_halves(stub, workdir):
    metrics = evaluate(config(data__floor="halves"), workdir)["metrics"]
    for name in ("frechet", "spatial_frechet", "kernel"):
        assert (metrics[name]["floor_n"], metrics[name]["floor_between"]) == (32, "halves")
    assert metrics["frechet"]["floor"] < metrics["frechet"]["value"]
    assert "floor" not in evaluate(config(data__floor=""), workdir)["metrics"]["frechet"]


def test_classes_of_another_network_are_not_compared(monkeypatch, workdir):
    install(monkeypatch, classes=10)
    assert "class_agreement" in evaluate(config(), workdir)["metrics"]
    install(monkeypatch, classes=1000)
    assert "class_agreement" not in evaluate(config(), workdir)["metrics"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"seed": 1}, "its seed is 0 and here it is 1, so that no two samples belong together"),
        ({"sampler__steps": 4}, r"its sampler is .*'steps': 2.* and here it is .*'steps': 4"),
        ({"samples": 60}, "has 40 samples and 60 are asked for"),
        ({"shard": 40}, "has other labels or another number of samples than are drawn here"),
        (
            {"shard": 8},
            "another number of samples than are drawn here; evaluate that model with shard=8",
        ),
    ],
)
def test_a_partner_of_other_noise_is_refused_before_drawing(
    stub, drawn, tmp_path, overrides, message
):
    with pytest.raises(ValueError, match=message):
        evaluate(config(paired=str(drawn), **overrides), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_partner_that_lacks_shards_is_refused_before_drawing(stub, workdir, tmp_path):
    (workdir / "shards" / "0000020.npz").unlink()
    with pytest.raises(
        ValueError, match="0000020.npz is missing; evaluate that model with samples=40"
    ):
        evaluate(config(paired=str(workdir)), tmp_path / "new")
    with pytest.raises(ValueError, match="there is no evaluation"):
        evaluate(config(paired=str(tmp_path / "absent")), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_weights_remade_at_the_same_path_do_not_continue(stub, workdir):
    note = workdir / "shards" / "subject.json"
    digest = json.loads((workdir / "metrics.json").read_text())["subject"]["sha256"]
    assert json.loads(note.read_text()) == {"sha256": digest}
    note.write_text(json.dumps({"sha256": "f" * 64}))
    with pytest.raises(ValueError, match=r"holds samples of other weights \(ffffffffffff\.\.\."):
        evaluate(config(), workdir)
    note.unlink()
    evaluate(config(), workdir)  # as earlier versions left it: adopted
    assert json.loads(note.read_text()) == {"sha256": digest}
    note.unlink()
    record = json.loads((workdir / "metrics.json").read_text())
    record["subject"]["sha256"] = "e" * 64
    (workdir / "metrics.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="was finished with other weights"):
        evaluate(config(), workdir)


def test_lpips_of_grey_pairs(tmp_path):
    import safetensors.numpy

    from qdiff_jax.eval.lpips import load_lpips, lpips

    from ..parity import eval_inputs

    files = [str(tmp_path / name) for name in ("trunk.safetensors", "linear.safetensors")]
    for file, state in zip(files, eval_inputs.lpips_weights("alex")):
        safetensors.numpy.save_file(state, file)
    settings = LpipsConfig("alex", *files)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 4, 32, 32, 1), np.uint8)
    paths = [[tmp_path / name] for name in ("a.npz", "b.npz")]
    for (path,), shard in zip(paths, images):
        save_arrays(path, Shard(shard, np.zeros(4, np.int32), np.zeros(())))
    found = measure_pairs(Partner(paths[0], None), paths[1], load_perceptual(settings, (32, 32, 1)))
    one, two = (np.repeat(x.astype(np.float32) / 127.5 - 1, 3, axis=-1) for x in images)
    expected = lpips("alex", load_lpips(*("alex", *files)), one, two)
    assert found["lpips"]["value"] == pytest.approx(float(np.mean(expected)), rel=1e-4)
    assert found["lpips"]["low"] < found["lpips"]["value"] < found["lpips"]["high"]
    with pytest.raises(ValueError, match="at least 32 by 32 and the model draws"):
        load_perceptual(settings, (8, 8, 1))


def test_clip_score_of_captions_by_class(stub, monkeypatch, tmp_path, workdir):
    texts = np.random.default_rng(0).normal(size=(10, 6)).astype(np.float32)
    asked = []

    def captions(name, weights, vocabulary):
        asked.append((name, weights, vocabulary))
        return CaptionNetwork(name, "t", lambda lines: {"embedding": texts[: len(lines)]})

    def embedding(name, weights):
        network = stub.network(name, weights)
        return network._replace(apply=lambda x: {"embedding": network.apply(x)["pool"]})

    file = tmp_path / "captions.txt"
    file.write_text("\n".join(f"a photo of a {k}" for k in range(10)) + "\n")
    settings = ClipConfig(str(file), "stub-clip", "weights")
    monkeypatch.setattr(backends, "caption_network", captions)
    with monkeypatch.context() as inner:
        inner.setattr(backends, "feature_network", embedding)
        loaded = load_captions(settings, 10, (8, 8, 1), "drawn")
        (tmp_path / "model.bin").write_text("")
        for weights in (str(tmp_path / "model.bin"), "hub:owner/repo@v1/model.bin"):
            load_captions(dataclasses.replace(settings, weights=weights), 10, (8, 8, 1), "drawn")
    assert [vocabulary for *_, vocabulary in asked] == [
        "weights",
        str(tmp_path),
        "hub:owner/repo@v1",
    ]
    seen, labels = features(stub, workdir), np.arange(40) % 10
    entry = measure_captions(loaded, Described(seen, labels), None)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (seen, texts[labels])]
    assert entry["value"] == pytest.approx(float((unit[0] * unit[1]).sum(1).mean()), rel=1e-5)
    assert entry["low"] < entry["value"] < entry["high"]
    real = Described(texts, np.arange(10))
    assert measure_captions(loaded, real, real)["real"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="has 10 lines and the model 9 classes"):
        load_captions(settings, 9, (8, 8, 1), "drawn")
    with pytest.raises(ValueError, match="the model draws no classes"):
        load_captions(settings, None, (8, 8, 1), "drawn")
    file.write_text("a\n\nb")
    with pytest.raises(ValueError, match="line 2 of the captions"):
        load_captions(settings, 3, (8, 8, 1), "drawn")

    file.write_text("\n".join(map(str, range(10))))
    monkeypatch.setattr(
        backends,
        "feature_network",
        lambda name, weights=None: (embedding if name == "stub-clip" else stub.network)(
            name, weights
        ),
    )
    clip = {"clip__captions": str(file), "clip__network": "stub-clip", "clip__weights": "weights"}
    result = evaluate(config(**clip), workdir)
    assert result["metrics"]["clip_score"]["value"] == pytest.approx(entry["value"], rel=1e-5)
    assert result["metrics"]["clip_score"]["name"] == "CLIP score (stub-clip)"
    assert result["protocol"]["clip"]["text_sha256"] == "t"
    assert "CLIP score (stub-clip)" in (workdir / "report.html").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__crop": ""}, "config.data.crop and config.data.size go together: got '' and 8"),
        ({"data__crop": "centre"}, r"config.data.crop='centre' is not known; use one of \('lsun'"),
        ({"data__pad_to": 32}, "both pad_to and crop"),
        ({"data__source": ""}, "config.data.source is empty"),
        ({"data__published_count": 5}, "counts the images of config.data.published"),
        ({"data__limit": -1}, "config.data.limit is -1"),
        ({"lpips__net": "alex"}, "needs the files config.lpips.trunk"),
        ({"lpips__trunk": "x.pth"}, "has weights and no net"),
        ({"lpips__net": "alex", "lpips__trunk": "a", "lpips__linear": "b"}, "set config.paired"),
        ({"clip__captions": "c.txt"}, "needs config.clip.weights"),
        ({"clip__weights": "c.bin"}, "would measure nothing"),
        ({"tool": "amd"}, "evaluation tool 'amd' is not known"),
        ({"data__crop": "", "data__size": 0}, r"images of synthetic:64 are \(32, 32, 1\) and the"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_does_not_fit_is_refused_before_drawing(stub, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        evaluate(config(**overrides), tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("lines", "overrides", "message"),
    [
        (None, {}, "config.prompts is '', and random:sd reads prompts: name a text file"),
        (None, {"model": "x.ckpt", "parts__network": "sd-v1-4"}, "and x.ckpt reads prompts"),
        ("", {}, r"the prompts .*prompts\.txt are an empty file; write one prompt a line"),
        ("a\n\nb\n", {}, r"line 2 of the prompts .*prompts\.txt is empty"),
        (b"\xff\xfe", {}, r"prompts\.txt cannot be read"),
        ("a\n", {"model": "random:miniature"}, "random:miniature reads none; leave it empty"),
        ("a\n", {"clip__captions": "c"}, "config.clip.captions is for classes"),
        ("a\n", {"model": "sd-v1-4.ckpt", "parts__network": "sd-v1-4"}, "nothing at sd-v1-4.ckpt"),
        ("a\n", {"pictures": 41}, "config.pictures is 41; it counts some of the 40 samples"),
        ("a\n", {"network": ""}, "config.data names real images and config.network is empty"),
    ],
)
def test_prompts_that_ask_for_nothing_are_refused_before_sampling(
    stub, tmp_path, lines, overrides, message
):
    given = {"model": "random:sd", **overrides}
    if lines is not None:
        path = tmp_path / "prompts.txt"
        path.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
        given["prompts"] = str(path)
    with pytest.raises(ValueError, match=message) as error:
        evaluate(config(**given), tmp_path / "w")
    assert str(error.value).count(". ") == 0
    assert not (tmp_path / "w").exists()


def test_samples_alone_need_no_network_and_no_real_images(tmp_path):
    alone = {"network": "", "data__source": "", "data__crop": "", "data__size": 0}
    result = evaluate(config(**alone, samples=20, pictures=9), tmp_path)
    assert result["metrics"] == {}
    singles = sorted((tmp_path / "pictures").glob("*"))
    assert [path.name for path in singles] == [f"{n:07d}.png" for n in range(9)]
    shard = next(read_shards([tmp_path / "shards" / "0000000.npz"]))
    with Image.open(singles[3]) as image:
        np.testing.assert_array_equal(np.asarray(image), shard.images[3, ..., 0])
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (2 * 10 + 2, 8 * 10 + 2)  # eight in a row, two pixels apart
    np.testing.assert_array_equal(pixels[2:10, 32:40], shard.images[3, ..., 0])
    np.testing.assert_array_equal(pixels[12:20, 2:10], shard.images[8, ..., 0])
    assert (pixels[12:20, 12:] == 255).all()


def test_the_captions_of_prompts_are_the_prompts(monkeypatch):
    install(monkeypatch)
    asked = []

    def apply(captions):
        asked.extend(captions)
        return {"embedding": np.eye(3, 6, dtype=np.float32)[: len(captions)]}

    tower = CaptionNetwork("clip", "t", apply)
    monkeypatch.setattr(backends, "caption_network", lambda *_: tower)
    stub = backends.feature_network("stub")
    embed = stub._replace(apply=lambda x: {"embedding": stub.apply(x)["pool"]})
    monkeypatch.setattr(backends, "feature_network", lambda *_: embed)
    given = ClipConfig(weights="w")
    captions = load_captions(given, None, (8, 8, 1), "", ("a", "b", "c"))
    assert asked == ["a", "b", "c"]
    assert not captions.real  # labels of real images are no prompts
    features = np.eye(3, 6, dtype=np.float32)
    samples = Described(features, np.array([0, 2, 2], np.int32), None, None)
    assert measure_captions(captions, samples, None)["value"] == pytest.approx(2 / 3)
