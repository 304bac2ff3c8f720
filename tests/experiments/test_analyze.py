"""The analyses as users run them: numbers and pictures on disk, and what does not apply is said."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

from experiments import analyze as analyze_module
from experiments.analyze import analyze, prepare, run
from qdiff_jax.analysis.registry import ANALYSES, Analysis, Given, names_of
from qdiff_jax.analysis.subject import NotApplicable
from qdiff_jax.data.images import load_images
from qdiff_jax.methods.run import Loaded
from qdiff_jax.models import registry

from ..analysis import drawn_results
from ..analysis.drawn_results import VARIANTS


@pytest.fixture(scope="module")
def given():
    return prepare("random:miniature", steps=3, samples=4, bits="w8a8,w4a8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ANALYSES)
def test_numbers_and_pictures_are_written(given, tmp_path, name, capsys):
    verdict = analyze(name, given, tmp_path)
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["verdict"] == verdict
    assert record["made_with"]["samples"] == 4
    assert f"{name}: {next(iter(verdict))} = " in capsys.readouterr().out
    assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    pixels = imread(tmp_path / f"{name}.png")[..., :3]
    assert pixels.shape[1] == 990  # 3.3 inches at 300 dpi
    # Ink that would leave the picture touches its outermost pixels.
    assert all((edge == 1).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    assert (pixels != 1).any()


@pytest.mark.slow
def test_fewer_bits_stray_further(given):
    verdict = ANALYSES["deviation"].run(given, lambda done, total: None).verdict
    assert verdict["w4a8/final"] > verdict["w8a8/final"] > 0


@pytest.mark.slow
def test_what_does_not_apply_is_one_sentence_and_code_2(tmp_path, capsys):
    given = prepare("random:dit", steps=2, samples=2)
    with pytest.raises(SystemExit) as ended:
        run(["skips"], given, tmp_path, asked=True)
    assert ended.value.code == 2
    assert "no block of this model concatenates a skip" in capsys.readouterr().err
    run(["skips", "outliers"], given, tmp_path, asked=False)
    assert "skips: skipped, no block" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"outliers.{ending}" for ending in ("json", "pdf", "png")
    ]


@pytest.mark.slow
def test_a_bundle_brings_its_sampler_and_fits_its_model_only(given, tmp_path, monkeypatch):
    """Reading bundles is tested where they are written; here is what becomes of one that was read."""
    module, plan = given.subject.model.module, given.subject.sampler
    source = registry.load("random:miniature").source
    about = {"extra": {"method": "tfmq"}, "sampler": {"name": "ddim"}, "sha256": "f00d"}
    manifest = {"source": source, **about}
    loaded = Loaded(module, given.subject.full, plan, manifest)
    monkeypatch.setattr(analyze_module, "load_for_sampling", lambda path: loaded)
    # As many samples as the fixture's, whose programs are compiled.
    read = prepare("random:miniature", bundle=tmp_path, steps=99, samples=4)
    assert read.subject.sampler is plan
    assert read.variants() == {"tfmq": given.subject.full}
    with pytest.raises(SystemExit) as ended:
        run(["beneficial"], read, tmp_path, asked=True)
    assert ended.value.code == 2
    with pytest.raises(
        ValueError, match="another model than 'random:dit', from 'random:miniature'"
    ):
        prepare("random:dit", bundle=tmp_path, samples=2)


@pytest.mark.slow
def test_both_samplers_have_variants_of_their_own(given):
    samplers = given.samplers()
    assert list(samplers) == ["ode", "sde"]
    ode, sde = (samplers[name][0] for name in ("ode", "sde"))
    assert ode is given.subject
    assert not np.any(ode.sampler.rows["sigma"])
    assert np.all(sde.sampler.rows["sigma"][1:] > 0)
    assert [list(variants) for _, variants in samplers.values()] == [["w8a8", "w4a8"]] * 2
    # The same noise to begin with, on another path.
    np.testing.assert_array_equal(ode.trajectory.x[-1], sde.trajectory.x[-1])
    assert np.abs(ode.trajectory.x[0] - sde.trajectory.x[0]).max() > 1e-3

    def scale(sampler):
        leaf = samplers[sampler][1]["w8a8"]["quant"]["conv_in"]["conv"].lhs.scale
        return float(np.asarray(leaf))

    assert scale("ode") != scale("sde")  # ranges are those of the sampler's own states


def _stub(names=VARIANTS, **settings):
    return Given(None, dict, dict, names, None, settings=settings)


def _analysis(calls, name):
    def result(given, on_step):
        calls.append(name)
        return drawn_results.deviation()._replace(verdict={"w4a8/final": 0.5})

    return Analysis(result, ANALYSES["deviation"].draw)


def test_all_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setitem(ANALYSES, "ranges", _analysis(calls, "ranges"))
    monkeypatch.setitem(ANALYSES, "skips", _analysis(calls, "skips"))
    run(["ranges"], _stub(samples=4), tmp_path, asked=True)
    run(["ranges", "skips"], _stub(samples=4), tmp_path, asked=False)
    assert calls == ["ranges", "skips"]
    assert "ranges.json has it with the same settings" in capsys.readouterr().out
    run(["ranges", "skips"], _stub(samples=5), tmp_path, asked=False)
    run(["skips"], _stub(samples=5), tmp_path, asked=True)
    assert calls == ["ranges", "skips", "ranges", "skips", "skips"]
    record = json.loads((tmp_path / "ranges.json").read_text())
    assert record["verdict"] == {"w4a8/final": 0.5}
    assert record["made_with"] == {"samples": 5}
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png", ".pdf"}


def test_what_does_not_apply_is_said_or_skipped(tmp_path, monkeypatch, capsys):
    def refuse(given, on_step):
        raise NotApplicable("this model has none.")

    monkeypatch.setitem(ANALYSES, "skips", Analysis(refuse, None))
    run(["skips"], _stub(), tmp_path, asked=False)
    assert capsys.readouterr().out == "skips: skipped, this model has none.\n"
    with pytest.raises(SystemExit) as ended:
        run(["skips"], _stub(), tmp_path, asked=True)
    assert ended.value.code == 2
    assert not list(tmp_path.iterdir())


def test_real_images_become_moments_of_features(tmp_path):
    """The eight by eight top left of drawn shapes, by a "classifier" of three features."""
    pictures = load_images("synthetic:40", "test").images[:, :8, :8]
    np.savez(tmp_path / "drawn.npz", images=pictures, labels=np.zeros(40, np.int64))

    def classify(images):
        flat = images.reshape(len(images), -1)
        return flat[:, :10], flat[:, 20:23]

    source, model = f"npz:{tmp_path}/drawn.npz", registry.load("random:miniature")
    real = analyze_module._real(source, model, classify, 4)
    expected = pictures.reshape(40, -1)[:, 20:23] / 127.5 - 1.0
    assert real.n == 40
    np.testing.assert_allclose(real.mean, expected.mean(axis=0), atol=1e-6)
    with pytest.raises(ValueError, match="3 features needs more than 3 pairs.*there are 3 and 40"):
        analyze_module._real(source, model, classify, 3)
    with pytest.raises(ValueError, match="32x32 cannot be padded to 8x8"):
        analyze_module._real("synthetic:40", model, classify, 40)
    # The shipped classifier looks at 32x32, which this model does not draw.
    with pytest.raises(ValueError, match="needs a classifier that takes the model's images"):
        prepare("random:miniature", data=source, samples=2)
    with pytest.raises(ValueError, match="one pair shows no scatter"):
        prepare("random:miniature", pairs=1)


def test_no_result_has_a_field_named_as_what_it_was_made_with():
    results = [getattr(drawn_results, name)() for name in ANALYSES]
    assert not [type(r).__name__ for r in results if {"made_with"} & set(r._fields)]


def test_an_unknown_analysis_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError, match=r"'range' is unknown; there are \['ranges', .*'all'\].*'ranges'"
    ):
        names_of("range")
    with pytest.raises(ValueError, match="'skip' is unknown"):
        names_of("ranges,skip")
    assert names_of("all") == list(ANALYSES)
    assert names_of("taylor,noise") == ["taylor", "noise"]
