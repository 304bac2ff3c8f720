"""Sampling a bundle by itself gives the samples of the run that wrote it."""

import numpy as np
from PIL import Image

from experiments.sample import sample_bundle

from .. import main_job


def _samples(folder):
    with np.load(folder / "samples.npz") as stored:
        return stored["x"]


def _bundle(workdir, name):
    return workdir / "variants" / name / "bundle"


def test_a_new_process_samples_the_same_bits(smoke_run, tmp_path):
    main_job.run("sample", bundle=_bundle(smoke_run, "tfmq_w4a8"), out=tmp_path)
    expected = _samples(smoke_run / "variants" / "tfmq_w4a8")
    np.testing.assert_array_equal(_samples(tmp_path), expected)
    with Image.open(tmp_path / "samples.png") as picture:
        assert np.asarray(picture).std() > 10


def test_integers_executed_agree_with_integers_simulated(smoke_run, tmp_path):
    simulated = _samples(smoke_run / "variants" / "tfmq_w4a8")
    executed = sample_bundle(_bundle(smoke_run, "tfmq_w4a8"), tmp_path, execute=True)
    assert not np.array_equal(executed, simulated)  # it did take another path
    sizes, errors = (
        np.linalg.norm(v.reshape(4, -1), axis=1) for v in (simulated, executed - simulated)
    )
    # The median: where a value lies on the border of two codes, float rounding may decide it the other
    # way, and sampling amplifies the difference in that one sample.
    assert np.median(errors / sizes) < 1e-5
    assert errors.max() < 1e-2 * sizes.max()


def test_the_seed_and_the_number_can_be_chosen(smoke_run, tmp_path):
    bundle = _bundle(smoke_run, "rtn_w4a8")
    other = sample_bundle(bundle, tmp_path, seed=1, count=8)
    assert np.array_equal(_samples(tmp_path), other)
    assert other.shape[0] == 8
    first = _samples(smoke_run / "variants" / "rtn_w4a8")
    assert np.abs(other[:4] - first).max(axis=(1, 2, 3)).min() > 0
    np.testing.assert_array_equal(sample_bundle(bundle, tmp_path, count=8)[:4], first)
