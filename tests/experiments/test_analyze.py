"""The analyses as users run them: numbers and pictures on disk, and what does not apply is said."""

import json

import pytest
from matplotlib.image import imread

from experiments import analyze as analyze_module
from experiments.analyze import analyze, prepare, run
from qdiff_jax.analysis.registry import ANALYSES, names_of
from qdiff_jax.methods.run import Loaded
from qdiff_jax.models import registry

pytestmark = pytest.mark.slow

_PICTURED = ("ranges", "skips", "temporal", "outliers", "noise", "deviation")


@pytest.fixture(scope="module")
def given():
    return prepare("random:miniature", steps=3, samples=4, bits="w8a8,w4a8")


@pytest.mark.parametrize("name", _PICTURED)
def test_numbers_and_pictures_are_written(given, tmp_path, name, capsys):
    verdict = analyze(name, given, tmp_path)
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["verdict"] == verdict
    assert f"{name}: {next(iter(verdict))} = " in capsys.readouterr().out
    assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    pixels = imread(tmp_path / f"{name}.png")[..., :3]
    assert pixels.shape[1] == 990  # 3.3 inches at 300 dpi
    # Ink that would leave the picture touches its outermost pixels.
    assert all((edge == 1).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    assert (pixels != 1).any()


def test_fewer_bits_stray_further(given):
    verdict = ANALYSES["deviation"].run(given, lambda done, total: None).verdict
    assert verdict["w4a8/final"] > verdict["w8a8/final"] > 0


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


def test_a_bundle_brings_its_sampler_and_fits_its_model_only(given, tmp_path, monkeypatch):
    """Reading bundles is tested where they are written; here is what becomes of one that was read."""
    module, plan = given.subject.model.module, given.subject.sampler
    source = registry.load("random:miniature").source
    manifest = {"source": source, "extra": {"method": "tfmq"}}
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


def test_an_unknown_analysis_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError, match=r"'range' is unknown; there are \['ranges', .*'all'\].*'ranges'"
    ):
        names_of("range")
    assert names_of("all") == list(ANALYSES)
