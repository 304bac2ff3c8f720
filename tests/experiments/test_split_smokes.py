"""The configs of Q-Diffusion and PTQ4DM, whole: to the report, and from the bundle to the same samples."""

import inspect
import pathlib
import runpy

import numpy as np
import pytest

from experiments.quantize import quantize
from experiments.quantize_job import prepare
from experiments.sample import sample_bundle
from qdiff_jax.config import load_config
from qdiff_jax.eval.report import read_report
from qdiff_jax.eval.samples import Samples
from qdiff_jax.export.bundle import load_bundle
from qdiff_jax.observe.archive import load_arrays
from qdiff_jax.sites import flatten_sites

METHODS = pathlib.Path(__file__).parents[2] / "configs" / "methods"
NAMES = ("qdiffusion", "ptq4dm")


def split_sites(bundle):
    flat = flatten_sites(bundle.quant)
    return {n for n, s in flat.items() if s.lhs is not None and s.lhs.spec.granularity == "split"}


def run(arg, workdir):
    name = arg.split(".")[0]
    quantize(load_config(str(METHODS / arg)), workdir)
    folder = workdir / "variants" / f"{name}_w4a8"
    variant = read_report(workdir / "report.json")["variants"][1]
    assert np.isfinite(variant["eps_rel_mse"])
    bundle = load_bundle(folder / "bundle")
    drawn = load_arrays(folder / "samples.npz", Samples).x
    np.testing.assert_array_equal(sample_bundle(folder / "bundle", workdir / "again"), drawn)
    executed = sample_bundle(folder / "bundle", workdir / "executed", execute=True)
    assert np.square(executed - drawn).mean() < 0.05 * np.square(drawn).mean()
    return bundle


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_smoke_run_and_its_bundle_in_integers(name, tmp_path):
    bundle = run(f"{name}.py:smoke", tmp_path)
    assert bundle.manifest["extra"]["method"] == name
    planned = {e["site"] for e in bundle.manifest["plan"] if e["spec"]["granularity"] == "split"}
    assert split_sites(bundle) == planned
    assert bool(planned) == (name == "qdiffusion")
    tensors = bundle.manifest["sampler"].get("tensors")
    assert (tensors is not None) == (name == "ptq4dm")
    if tensors:
        assert tensors["bits"] == 8
        assert set(tensors["ranges"]) == {"mean", "sigma", "state"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_transformer_has_no_skips_and_goes_on_without_the_split(name, tmp_path):
    assert not split_sites(run(f"{name}.py:smoke,model=dit", tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_a_config_says_what_to_run_and_what_to_expect(name):
    doc = inspect.cleandoc(runpy.run_path(str(METHODS / f"{name}.py"))["__doc__"])
    assert f"python -m experiments.quantize --config=configs/methods/{name}.py:w4a8" in doc
    assert "Expected" in doc
    assert f"{name}.py:smoke" in doc
    for word in ("w8a8", "w4a4", "w4a32", "laptop", "model=dit"):
        config = load_config(str(METHODS / f"{name}.py:{word}"))
        assert list(config.variants) == [f"{name}_{word if word[0] == 'w' else 'w4a8'}"]


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("ptq4dm", {"calibration.selector": "ntdc"}, "selector is 'ntdc'; use one of"),
        ("ptq4dm", {"sampler.tensor_bits": 16}, "tensor_bits is 16; use one of"),
        ("ptq4dm", {"calibration.count": 12}, "batch size 8 must divide the 12 samples"),
        (
            "ptq4dm",
            {"calibration.selector": "one_step", "calibration.position": 4},
            "choose 0 to 3",
        ),
        ("qdiffusion", {"qdiffusion_split": "conv1"}, "qdiffusion_split is 'conv1'; use one of"),
    ],
)
def test_a_config_that_cannot_run_is_refused_before_any_work(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        prepare(load_config(str(METHODS / f"{name}.py:smoke"), overrides))
