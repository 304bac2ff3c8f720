"""Networks of pipelines from config to bundle: classes and prompts as conditions, latents seen as images."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from experiments.quantize import claim_prompts, quantize
from experiments.quantize_config import read_config
from experiments.quantize_job import prepare
from experiments.quantize_settings import check_sizes
from experiments.sample import asked_for, sample_bundle
from qdiff_jax.config import load_config
from qdiff_jax.eval.report import read_report
from qdiff_jax.eval.samples import Samples
from qdiff_jax.export.bundle import load_bundle
from qdiff_jax.export.qtensor import QTensor
from qdiff_jax.methods.run import load_for_sampling
from qdiff_jax.models.miniature_pipelines import miniature_pipeline
from qdiff_jax.models.pipeline import conditions, decode, null_condition
from qdiff_jax.observe.archive import load_arrays
from qdiff_jax.observe.trajectory import Trajectory
from qdiff_jax.quant.timed import TimeIndexed
from qdiff_jax.sites import flatten_sites

TFMQ = str(pathlib.Path(__file__).parents[2] / "configs" / "methods" / "tfmq.py")
KEYS = "middle_block_1_transformer_blocks_0/attn2_to_k"
PROJECTION = "middle_block_0_emb_layers_1/dense"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ldm", "sd"])
def test_tfmq_of_a_pipeline_runs_from_config_to_bundle(name, tmp_path):
    config = load_config(f"{TFMQ}:w4a8,smoke,model={name}", {"reconstruct.steps": 20})
    assert config.sampler.guidance_scale > 1
    quantize(config, tmp_path)
    pipeline, folder = miniature_pipeline(f"random:{name}"), tmp_path / "variants" / "tfmq_w4a8"

    # Every sample was recorded with its condition and with the null one.
    recorded = load_arrays(tmp_path / "trajectories" / "calibration.npz", Trajectory)
    wanted = np.arange(4) if name == "ldm" else prepare(config).asked.prompts
    np.testing.assert_allclose(recorded.y[::2], conditions(pipeline, wanted), atol=1e-6)
    null = np.broadcast_to(null_condition(pipeline), recorded.y[1::2].shape)
    np.testing.assert_allclose(recorded.y[1::2], null, atol=1e-6)
    assert np.abs(recorded.eps[:, ::2] - recorded.eps[:, 1::2]).max() > 1e-3

    variant = read_report(tmp_path / "report.json")["variants"][1]
    for figure in ("eps_rel_mse", "rollout_mse", "temporal_cosine"):
        assert 0 < variant[figure] < np.inf
    full, drawn = (
        load_arrays(tmp_path / "variants" / v / "samples.npz", Samples).x
        for v in ("fp32", "tfmq_w4a8")
    )
    assert drawn.shape == (4, *pipeline.latent_shape)
    error = np.square(decode(pipeline, full, 4) - decode(pipeline, drawn, 4)).mean()
    assert variant["rollout_mse"] == pytest.approx(error, rel=1e-3)

    held = flatten_sites(load_bundle(folder / "bundle").quant)
    assert isinstance(held[KEYS].rhs, QTensor)
    assert (held[KEYS].rhs.bits, held[PROJECTION].rhs.bits) == (4, 4)
    assert isinstance(held[PROJECTION].lhs, TimeIndexed)
    assert not isinstance(held[KEYS].lhs, TimeIndexed)  # the context does not know the step

    again = sample_bundle(folder / "bundle", tmp_path / "again")
    np.testing.assert_array_equal(again, drawn)
    with Image.open(tmp_path / "again" / "samples.png") as picture:
        assert np.ptp(np.asarray(picture.convert("RGB")).astype(int), axis=-1).max() > 0  # colour


def test_prompts_are_read_before_anything_is_done(tmp_path):
    job = prepare(load_config(f"{TFMQ}:smoke,model=sd"))
    assert len(job.asked.prompts) == 4
    y = job.asked.conditions(range(3, 6))  # in turn, from the fourth on
    rows = conditions(job.asked.pipeline, job.asked.prompts)
    np.testing.assert_allclose(y, rows[[3, 0, 1]], atol=1e-6)
    assert job.guidance.null.shape == (1, *rows.shape[1:])

    claim_prompts(tmp_path, job.asked.prompts)
    claim_prompts(tmp_path, job.asked.prompts)
    with pytest.raises(ValueError, match="was begun with other prompts than config.prompts holds"):
        claim_prompts(tmp_path, ("another",))

    def refused(message, **overrides):
        with pytest.raises(ValueError, match=message):
            quantize(load_config(f"{TFMQ}:smoke,model=sd", overrides), tmp_path / "w")
        assert not (tmp_path / "w").exists()

    refused("random:sd reads prompts and got none", prompts="")
    refused("cannot be read", prompts=str(tmp_path / "none.txt"))
    refused("random:ldm reads no prompts, and got 4", model="random:ldm")


def test_a_published_pipeline_must_say_where_it_is(tmp_path):
    for name, network in (("ldm", "cin256-v2"), ("sd", "sd-v1-4")):
        config = load_config(f"{TFMQ}:w4a8,laptop,model={name}")
        assert (config.model, config.parts.network) == ("", network)
        check_sizes(read_config(config), {"ldm": 20, "sd": 51}[name])  # PLMS calls once more
        with pytest.raises(ValueError, match=f"no place is given for the model {network}"):
            quantize(config, tmp_path)


def test_a_bundle_of_images_has_no_place_for_other_parts(smoke_run):
    loaded = load_for_sampling(smoke_run / "variants" / "rtn_w4a8" / "bundle")
    assert asked_for(loaded, "").pipeline.first_stage is None
    with pytest.raises(ValueError, match="draws images itself"):
        asked_for(loaded, "random:sd")
