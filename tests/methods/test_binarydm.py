"""BinaryDM as a method: its config, who may have weights of one bit, and one run from plan to integers."""

import dataclasses
import json
import struct
import types

import jax
import numpy as np
import pytest

from experiments.quantize import quantize
from experiments.quantize_config import read_config
from experiments.quantize_images import TrainingImages, training_images
from experiments.quantize_job import prepare
from experiments.quantize_settings import method_settings
from qdiff_jax.config import load_config
from qdiff_jax.data.images import to_unit_range
from qdiff_jax.export.qtensor import QTensor
from qdiff_jax.methods.registry import BINARY, METHODS
from qdiff_jax.methods.run import load_for_sampling
from qdiff_jax.models.registry import predictor
from qdiff_jax.quant.timed import step_context
from qdiff_jax.sites import flatten_sites
from qdiff_jax.stages.train_binary import BinaryTrainConfig
from qdiff_jax.stages.training_sets import split_images, split_trajectories

from ..main_job import ROOT
from . import cases

CONFIG = f"{ROOT}/configs/methods/binarydm.py"


def settings_of(words):
    return method_settings(read_config(load_config(f"{CONFIG}:{words}"))).binarydm


def test_every_word_of_the_config_is_read():
    assert settings_of("w1a4") == BinaryTrainConfig()  # the paper's sizes
    assert settings_of("laptop,no_ebb").two_bases > 1
    assert settings_of("laptop,no_lrm").lrm == 0
    assert settings_of("w1a8,laptop,no_progressive").interval == 0
    assert settings_of("w1a32,smoke,tau=0").tau == 0
    assert {settings_of(w).gate_samples for w in ("w1a4", "laptop")} == {64}
    sizes = {w: load_config(f"{CONFIG}:{w}").calibration.samples for w in ("w1a4", "laptop")}
    assert sizes == {"w1a4": 1024, "laptop": 64}
    with pytest.raises(ValueError, match="model=dit must be one of unet"):
        load_config(f"{CONFIG}:model=dit")


def test_every_field_is_a_key_of_the_config():
    given = {"remat": True, "ema": 0.5, "two_bases": 0.25, "divisor": 2, "checks": 3}
    config = load_config(f"{CONFIG}:laptop", {f"binarydm.{k}": v for k, v in given.items()})
    made = dataclasses.asdict(method_settings(read_config(config)).binarydm)
    assert {name: made[name] for name in given} == given
    assert set(made) == set(config.binarydm)


def idx_files(folder):
    """Ten images of 8 by 8, one of each class, as MNIST's files."""
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8), np.uint8)
    head = (struct.pack(">HBB3I", 0, 8, 3, 10, 8, 8), struct.pack(">HBBI", 0, 8, 1, 10))
    for stem, start, data in zip(("images-idx3", "labels-idx1"), head, (images, np.arange(10))):
        raw = start + data.astype(np.uint8).tobytes()
        (folder / f"train-{stem}-ubyte").write_bytes(raw)
    return images


def test_images_are_trained_on_where_the_config_names_some(tmp_path):
    images = idx_files(tmp_path)
    source = {"data.source": f"idx:{tmp_path}"}
    job = prepare(load_config(f"{CONFIG}:smoke", source))
    np.testing.assert_allclose(job.images.images, to_unit_range(images)[..., None])
    np.testing.assert_array_equal(job.images.labels, np.arange(10))
    assert job.images.noising.null_class == job.diffusion.null_class == 10
    seen, judged = split_images(job.images, 8)
    assert (len(seen.images), len(judged.images)) == (8, 2)
    assert sorted([*seen.labels, *judged.labels]) == list(range(10))
    for made, kept in zip((seen, judged), (seen.labels, judged.labels)):
        np.testing.assert_array_equal(made.images, job.images.images[kept])
    config = load_config(f"{CONFIG}:smoke", source)
    with config.unlocked():
        config.variants = {"one": dict(method="rtn", w_bits=1, a_bits=4)}
    with pytest.raises(ValueError, match="no variant trains on them"):
        prepare(config)
    latent = types.SimpleNamespace(
        diffusion=job.diffusion, pipeline=types.SimpleNamespace(first_stage="there"), prompts=()
    )
    with pytest.raises(
        ValueError, match="config.data.source names images, and this network denoises"
    ):
        training_images(TrainingImages(f"idx:{tmp_path}"), ("binarydm",), latent)


def test_whole_trajectories_are_held_out():
    trajectory = cases.pairs().trajectory
    seen, judged = split_trajectories(jax.random.key(0), trajectory, 8)
    assert (len(seen), len(judged)) == (9, 3)  # three steps of three samples, and of one
    for made, samples in ((seen, (0, 1, 2)), (judged, (3,))):
        expected = {trajectory.x[s, n].tobytes() for s in range(3) for n in samples}
        assert {row.tobytes() for row in made.x} == expected
    one = jax.tree.map(np.asarray, trajectory).replace(sample=np.zeros(4, int))
    with pytest.raises(ValueError, match="1 trajectory is recorded"):
        split_trajectories(jax.random.key(0), one, 8)


@pytest.mark.slow
def test_the_smoke_run_on_images(tmp_path):
    idx_files(tmp_path)
    config = load_config(f"{CONFIG}:smoke", {"data.source": f"idx:{tmp_path}"})
    with config.unlocked():
        del config.variants["rtn_w1a4"]
    quantize(config, tmp_path / "w")
    (_, shown) = json.loads((tmp_path / "w" / "report.json").read_text())["variants"]
    assert np.isfinite(shown["eps_rel_mse"])


@pytest.mark.parametrize(("bits", "a_bits"), [("w1a4", 4), ("w1a8", 8), ("w1a32", None)])
def test_plans_of_one_bit_weights(bits, a_bits):
    job = prepare(load_config(f"{CONFIG}:{bits},smoke"))
    assert list(job.plans) == [f"rtn_{bits}", f"binarydm_{bits}"]
    for plan in job.plans.values():
        weights = plan.quantized("weight")
        assert {(e.bits, e.spec.grid) for e in weights} == {(1, "binary")}
        assert {e.bits for e in plan.quantized()} == {1, a_bits} - {None}
        kept = {e.site for e in plan.entries} - {e.site for e in plan.quantized()}
        assert {"temb/dense_0", "temb/dense_1", "conv_in/conv", "out/conv_out"} <= kept


def test_other_methods_refuse_one_bit():
    config = load_config(f"{CONFIG}:smoke")
    for name in METHODS:
        with config.unlocked():
            config.variants = {"one": dict(method=name, w_bits=1, a_bits=8)}
        if name in BINARY:
            assert read_config(config).variants["one"].w_bits == 1
            continue
        with pytest.raises(ValueError, match=rf"one.w_bits is 1, and {name} rounds on uniform"):
            read_config(config)
    with config.unlocked():
        config.variants = {"one": dict(method="binarydm", w_bits=1, a_bits=1)}
    with pytest.raises(ValueError, match="one.a_bits is 1; choose 2 to 8"):
        read_config(config)


@pytest.mark.slow
def test_the_smoke_run_ends_in_bits_that_integers_execute(tmp_path):
    """Packed codes multiplied as integers give the simulation, at sites of four-bit activations too."""
    quantize(load_config(f"{CONFIG}:w1a4,smoke"), tmp_path)
    shown = json.loads((tmp_path / "report.json").read_text())["variants"]
    errors = {v["name"]: v["eps_rel_mse"] for v in shown}
    assert np.isfinite(list(errors.values())[1:]).all()
    folder = tmp_path / "variants" / "binarydm_w1a4"
    record = json.loads((folder / "quantize.json").read_text())["stages"]["2_train_binary"]
    assert record["transition"]["step"] in (6, 7)
    simulated, executed = (load_for_sampling(folder / "bundle", execute=e) for e in (False, True))
    flat = flatten_sites(executed.variables["quant"])
    packed = [site.rhs for site in flat.values() if isinstance(site.rhs, QTensor)]
    assert packed and {t.bits for t in packed} == {1}  # noqa: PT018
    assert all(site.execute for site in flat.values())
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32)
    ctx, y = step_context(500.0, 1), np.zeros(2, np.int32)
    predict = jax.jit(predictor(simulated.module))
    made = [np.asarray(predict(loaded.variables, x, ctx, y)) for loaded in (simulated, executed)]
    np.testing.assert_allclose(made[1], made[0], rtol=1e-3, atol=1e-3)
