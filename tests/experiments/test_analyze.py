"""The analyses as users run them: numbers and pictures on disk, and what does not apply is said."""

import json

import jax
import numpy as np
import pytest
from matplotlib.image import imread

from experiments.analyze import analyze, prepare, run
from qdiff_jax.analysis.registry import ANALYSES, names_of
from qdiff_jax.methods.rtn import rtn
from qdiff_jax.methods.run import run_method
from qdiff_jax.models import registry
from qdiff_jax.observe.selectors import every_step
from qdiff_jax.policy import common, make_plan
from qdiff_jax.stages.calibrate import ActivationConfig

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


def test_a_bundle_is_analysed_at_its_own_timesteps(given, tmp_path):
    subject, diffusion = given.subject, registry.load("random:miniature")
    # The time embedding has step tables, which know the sampler's timesteps and no others.
    tables = ActivationConfig(per_step=("temb/*",), batch_size=12)
    run_method(
        rtn(
            subject.model,
            every_step(jax.random.key(0), subject.calibration),
            subject.trajectory.t,
            activations=tables,
        ),
        diffusion,
        make_plan(subject.sites, common(subject.sites, 4, 8)),
        jax.random.key(0),
        tmp_path,
        sampler_config={"name": "ddim", "spacing": "quad", "steps": 3},
        extra={},
    )
    bundle = tmp_path / "bundle"
    given = prepare("random:miniature", bundle=bundle, samples=2)
    result = ANALYSES["temporal"].run(given, lambda done, total: None)
    np.testing.assert_array_equal(result.timesteps, subject.trajectory.t)
    assert list(result.error) == ["rtn"]
    assert np.isfinite(result.error["rtn"]).all()
    with pytest.raises(SystemExit) as ended:
        run(["beneficial"], given, tmp_path, asked=True)
    assert ended.value.code == 2
    with pytest.raises(
        ValueError, match="made from another model than 'random:dit', from 'random:m"
    ):
        prepare("random:dit", bundle=bundle, samples=2)


def test_an_unknown_analysis_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError, match=r"'range' is unknown; there are \['ranges', .*'all'\].*'ranges'"
    ):
        names_of("range")
    assert names_of("all") == list(ANALYSES)
