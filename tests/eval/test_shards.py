"""Shards: a model that diverged is no black image, and a folder belongs to one set of weights."""

import jax
import pytest

from qdiff_jax.eval.shards import claim_shards, sample_shards
from qdiff_jax.methods.run import make_sampler
from qdiff_jax.models import registry

SAMPLER = {"name": "ddim", "spacing": "uniform", "steps": 2, "options": {"eta": 0.0}}


def test_samples_that_are_not_finite_are_refused(tmp_path):
    model = registry.miniature()
    params = jax.tree.map(lambda leaf: leaf * float("nan"), model.model.params)
    with pytest.raises(
        ValueError, match=r"4 of 4 samples of .*0000000.npz are not finite: the model"
    ):
        sample_shards(
            model.model.module,
            {"params": params, "quant": {}},
            make_sampler(model.source["schedule"], SAMPLER),
            tmp_path,
            seed=0,
            count=8,
            size=4,
            batch_size=4,
            shape=model.image_shape,
            classes=10,
            guidance_scale=-1.0,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_belongs_to_one_set_of_weights(tmp_path):
    claim_shards(tmp_path, "a" * 64, write=False)
    assert list(tmp_path.iterdir()) == []
    claim_shards(tmp_path, "a" * 64)
    claim_shards(tmp_path, "a" * 64)
    with pytest.raises(ValueError, match=r"other weights \(aaaaaaaaaaaa\.\.\., and these are bbbb"):
        claim_shards(tmp_path, "b" * 64, write=False)
