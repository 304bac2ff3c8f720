"""What goes wrong in the main job is said in one sentence, and costs nothing that was done before."""

import os
import shutil

import numpy as np
import pytest

from experiments.quantize import quantize
from experiments.quantize_job import prepare
from experiments.quantize_sets import trajectories
from experiments.sample import sample_bundle
from qdiff_jax.config import load_config
from qdiff_jax.eval.samples import draw_samples
from qdiff_jax.export.manifest import BundleError
from qdiff_jax.methods.run import load_for_sampling, make_sampler

from ..main_job import SMOKE, digests

pytestmark = pytest.mark.slow


@pytest.fixture
def workdir(smoke_run, tmp_path):
    return shutil.copytree(smoke_run, tmp_path / "w")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model": "random:minature"}, "Did you mean 'random:miniature'"),
        ({"model": "absent.safetensors"}, "no weights file absent.safetensors; check the path"),
        ({"classifier": "classifier_fasion"}, "Did you mean 'classifier_fashion'"),
        ({"policy": "comon"}, "Did you mean 'common'"),
        (
            {"variants.brecq_w4a8.method": "breqc"},
            r"config.variants.brecq_w4a8.method: Method 'breqc' is unknown.*Did you mean 'brecq'",
        ),
        ({"variants.rtn_w8a8.w_bits": 16}, r"rtn_w8a8.w_bits is 16; choose 2 to 8, or 32"),
        ({"tfmq_variant": "fix"}, "config.tfmq_variant 'fix' is unknown; use one of"),
        ({"activations.observer": "median"}, "Observer 'median' is unknown; use"),
        ({"reconstruct.schedule": "linear"}, "schedule='linear': use one of"),
        ({"reconstruct.walk_batch": 3}, "config.reconstruct.walk_batch: The batch size 3 must"),
        ({"calibration.weight_steps": 9}, "weight_steps is 9; choose 1 to 4"),
        ({"sampler.spacing": "even"}, "unknown timestep spacing 'even'; the names are"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_config_that_cannot_run_is_refused_before_anything_is_written(
    tmp_path, overrides, message
):
    with pytest.raises(ValueError, match=message):
        quantize(load_config(SMOKE, overrides), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_another_config_may_not_continue_a_workdir(workdir):
    before = digests(workdir)
    other = load_config(SMOKE, {"seed": 1, "variants.rtn_w8a8.a_bits": 6})
    with pytest.raises(ValueError, match="seed: 0 there, 1 now; variants.rtn_w8a8.a_bits: 8 there"):
        quantize(other, workdir)
    assert digests(workdir) == before


def test_a_full_disk_costs_only_what_could_not_be_written(workdir, smoke_run, monkeypatch):
    variant = workdir / "variants" / "brecq_w4a8"
    shutil.rmtree(variant / "bundle")
    (variant / "quantize.json").unlink()
    config = load_config(SMOKE)
    units = digests(variant / "stages", "*/unit_*")  # beside them their seconds, which go on
    usage = shutil.disk_usage(workdir)._replace(free=10)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(BundleError, match=r"brecq_w4a8/bundle needs .* the disk has 10 free"):
            quantize(config, workdir)
    assert not (variant / "bundle").exists()
    assert digests(variant / "stages", "*/unit_*") == units

    replace = os.replace
    old = (workdir / "report.json").read_text()

    def full(source, target):
        if str(target).endswith("report.json"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(OSError, match=r"report.json could not be written.*free some space"):
            quantize(config, workdir)
    assert (workdir / "report.json").read_text() == old
    # The units were read back, and made the same bundle.
    assert digests(variant / "stages", "*/unit_*") == units
    assert digests(variant / "bundle") == digests(smoke_run / "variants" / "brecq_w4a8" / "bundle")


def test_a_diverging_unit_is_named_and_the_units_before_it_are_kept(workdir):
    (workdir / "config.json").unlink()  # as if the rate had been too high from the start
    variant = workdir / "variants" / "brecq_w4a8"
    shutil.rmtree(variant / "bundle")
    finished = sorted((variant / "stages").glob("*/unit_*"))
    for path in finished[3:]:
        path.unlink()
    kept = digests(variant / "stages", "*/unit_*")
    name = finished[3].stem.split("_", 2)[2]
    with pytest.raises(
        FloatingPointError,
        match=rf"unit '{name}'.*lower the learning rate.*before it are saved",
    ):
        quantize(load_config(SMOKE, {"reconstruct.lr": 3e38}), workdir)
    assert digests(variant / "stages", "*/unit_*") == kept
    assert len(kept) == 3


def test_a_damaged_trajectory_is_named_and_can_be_recorded_anew(workdir, smoke_run):
    path = workdir / "trajectories" / "calibration.npz"
    path.write_bytes(path.read_bytes()[:-100])
    job = prepare(load_config(SMOKE))
    with pytest.raises(ValueError, match=r"calibration.npz is damaged.*delete it and run again"):
        trajectories(job, workdir)
    path.unlink()
    trajectories(job, workdir)
    for name in ("x", "eps", "t", "y"):
        with np.load(path) as new, np.load(smoke_run / "trajectories" / path.name) as old:
            np.testing.assert_array_equal(new[name], old[name])


def test_samples_that_were_deleted_are_drawn_again(workdir, smoke_run):
    path = workdir / "variants" / "rtn_w8a8" / "samples.npz"
    path.unlink()
    quantize(load_config(SMOKE), workdir)
    assert digests(path.parent, path.name) == digests(
        smoke_run / "variants" / "rtn_w8a8", path.name
    )


def test_a_damaged_bundle_is_not_sampled(workdir, tmp_path):
    bundle = workdir / "variants" / "brecq_w4a8" / "bundle"
    weights = bundle / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(BundleError, match=r"is not the bundle that was saved; .*\n.*other values"):
        sample_bundle(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bundle_is_not_sampled_at_a_timestep_it_never_saw(smoke_run):
    loaded = load_for_sampling(smoke_run / "variants" / "tfmq_w4a8" / "bundle")
    manifest = loaded.manifest
    other = make_sampler(manifest["schedule"], {**manifest["sampler"], "steps": 5})
    with pytest.raises(
        ValueError, match=r"/lhs: timestep \d+ \(step \d of 5\) was never calibrated"
    ):
        draw_samples(
            loaded.module,
            loaded.variables,
            other,
            seed=0,
            count=1,
            batch_size=1,
            shape=(8, 8, 1),
            classes=10,
            guidance_scale=-1.0,
        )
