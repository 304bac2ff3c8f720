"""Evaluations of bundles: a quantized model is judged by its own tables, under the sampler they are for."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluate as evaluation
from experiments.evaluate import evaluate
from experiments.evaluate_config import read_config
from experiments.evaluate_subject import Subject, load_subject, sampler_of, subject_digest
from qdiff_jax.eval.samples import draw_samples
from qdiff_jax.eval.shards import FIRST_INDEX, read_shards, shard_paths
from qdiff_jax.methods.run import load_for_sampling
from qdiff_jax.models.pipeline import Pipeline
from qdiff_jax.quant.timed import TimeIndexed

from .judging import config, install


@pytest.fixture
def bundle(smoke_run):
    return smoke_run / "variants" / "rtn_w8a8" / "bundle"


def of_bundle(bundle, **overrides):
    sampler = {"sampler__spacing": "quad", "sampler__steps": 4}
    return config(bundle=str(bundle), **{**sampler, **overrides})


def test_a_bundle_is_sampled_as_it_samples_by_itself(bundle, tmp_path, monkeypatch):
    install(monkeypatch)
    result = evaluate(of_bundle(bundle), tmp_path / "w")
    assert result["subject"]["bundle"] == str(bundle)
    assert result["subject"]["method"] == "rtn"
    assert result["metrics"]["frechet"]["floor"] < result["metrics"]["frechet"]["value"]
    paths = [path for path, _ in shard_paths(tmp_path / "w" / "shards", 40, 20)]
    first, _ = read_shards(paths)
    loaded = load_for_sampling(bundle)
    x = draw_samples(
        loaded.module,
        loaded.variables,
        loaded.plan,
        seed=0,
        count=20,
        batch_size=20,
        shape=(8, 8, 1),
        classes=10,
        guidance_scale=-1.0,
        first=FIRST_INDEX,
    )
    np.testing.assert_array_equal(first.images, np.clip(np.rint((x + 1) * 127.5), 0, 255))

    # Beside full precision from the same noise: close, and known by what it was paired with.
    full = {"sampler__spacing": "quad", "sampler__steps": 4}
    whole = evaluate(config(**full), tmp_path / "full")
    paired = evaluate(of_bundle(bundle, paired=str(tmp_path / "full")), tmp_path / "w")
    assert paired["protocol"]["paired_sha256"] == whole["subject"]["sha256"]
    theirs, ours = (
        np.concatenate([s.images for s in read_shards(sorted((w / "shards").glob("*.npz")))])
        for w in (tmp_path / "full", tmp_path / "w")
    )
    apart = np.square((theirs.astype(np.float64) - ours) / 127.5).mean()
    assert paired["metrics"]["mse"]["value"] == pytest.approx(apart, rel=1e-4)
    assert apart > 0
    assert len(subject_digest(paired["subject"])) == 64


def test_a_bundle_remade_at_the_same_path_does_not_continue(bundle, tmp_path, monkeypatch):
    install(monkeypatch)
    place = tmp_path / "bundle"
    shutil.copytree(bundle, place)
    evaluate(of_bundle(place), tmp_path / "w")
    shutil.rmtree(place)
    shutil.copytree(bundle.parents[1] / "rtn_w4a8" / "bundle", place)
    with pytest.raises(ValueError, match="a model or bundle was remade at the same path"):
        evaluate(of_bundle(place), tmp_path / "w")


def test_step_tables_of_other_steps_are_refused_before_drawing(tmp_path, monkeypatch):
    install(monkeypatch)
    whole = evaluation.load_subject

    def with_tables(config):
        found, steps = whole(config), jnp.array([999.0, 500.0])
        quant = {"block": TimeIndexed(jnp.zeros((2, 1)), steps, "step")}
        return found._replace(variables={**found.variables, "quant": quant})

    monkeypatch.setattr(evaluation, "load_subject", with_tables)
    with pytest.raises(ValueError, match="calibrated"):
        evaluate(config(sampler__steps=4), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def subject(correction=None, **sampler):
    made_for = {**read_config(config()).sampler.as_json(), **sampler}
    pipeline = Pipeline(None)
    return Subject(None, {}, {}, {}, pipeline, correction=correction, sampler=made_for)


def test_the_sampler_must_be_the_one_that_tables_were_measured_for():
    tensors = {"bits": 8, "ranges": {"x": [0.0, 1.0]}}
    plain = read_config(config())
    assert sampler_of(plain, subject()) == plain.sampler.as_json()
    asked = read_config(config(sampler__tensor_bits=8))
    assert sampler_of(asked, subject(tensors=tensors))["tensors"] == tensors
    # A bundle's tensors are quantized whether or not the config says how many bits they have.
    assert sampler_of(plain, subject(tensors=tensors))["tensors"] == tensors
    for other in (
        subject(),
        subject(tensors={**tensors, "bits": 6}),
        subject()._replace(sampler=None),
    ):
        with pytest.raises(
            ValueError, match="tensor_bits is 8, and what is judged holds no ranges"
        ):
            sampler_of(asked, other)
    with pytest.raises(ValueError, match=r"ranges of another sampler \(steps: 20\)"):
        sampler_of(asked, subject(tensors=tensors, steps=20))
    with pytest.raises(
        ValueError, match=r"corrects estimates at guidance 3.0, and the config samples at -1"
    ):
        sampler_of(plain, subject(correction="a table", guidance_scale=3.0))
    assert sampler_of(plain, subject(correction="a table"))["guidance_scale"] == -1.0


def test_a_bundle_s_digest_is_of_what_decides_its_samples(bundle):
    digest = subject_digest(load_subject(read_config(of_bundle(bundle))).origin)
    manifest = json.loads((pathlib.Path(bundle) / "manifest.json").read_text())
    assert digest not in (manifest["sha256"], manifest["source"]["sha256"])
    other = bundle.parents[1] / "rtn_w4a8" / "bundle"
    assert digest != subject_digest(load_subject(read_config(of_bundle(other))).origin)
    # Results of earlier versions named the model that the bundle was made from.
    assert subject_digest({"bundle": "b", "sha256": "of the model"}) is None
