"""The main job: what it leaves behind, and that doing it again does nothing again."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from experiments.quantize import quantize
from experiments.quantize_config import read_config
from qdiff_jax.config import fingerprint, load_config
from qdiff_jax.eval.report import PROVENANCE_KEYS, VARIANT_KEYS, read_report
from qdiff_jax.export.bundle import load_bundle
from qdiff_jax.export.qtensor import QTensor
from qdiff_jax.models import registry
from qdiff_jax.observe.archive import load_record, save_record
from qdiff_jax.runtime.cache import compile_account
from qdiff_jax.sites import flatten_sites

from .. import main_job
from ..main_job import SMOKE, VARIANTS, digests


@pytest.fixture(scope="module")
def document(smoke_run):
    return read_report(smoke_run / "report.json")


def test_the_report_holds_every_variant_in_order_with_every_figure(document):
    assert [v["name"] for v in document["variants"]] == ["fp32", *VARIANTS]
    for v in document["variants"]:
        assert set(VARIANT_KEYS) <= set(v)
    for v in document["variants"][1:]:
        assert v["timesteps"] == sorted(set(v["timesteps"]))
        for key in ("eps_rel_mse", "temporal_cosine"):
            rows = v[f"{key}_by_step"]
            assert len(rows) == 4
            assert min(rows) <= v[key] <= max(rows)
        assert v["rollout_mse"] > 0
        assert v["feature_distance"] is None  # the smoke config has no classifier
        assert v["reconstruct_s"] > 0 or v["name"].startswith("rtn")
    error = {v["name"]: v["eps_rel_mse"] for v in document["variants"]}
    assert error["fp32"] == 0 < error["rtn_w8a8"] < error["rtn_w4a8"]
    assert error["brecq_w4a8"] < error["rtn_w4a8"]


def test_the_report_says_where_it_comes_from(document, smoke_run):
    origin = document["provenance"]
    assert set(PROVENANCE_KEYS) <= set(origin)
    assert origin["command"].startswith("python -m experiments.quantize --")
    assert str(smoke_run) in origin["command"]
    assert origin["config_fingerprint"] == fingerprint(read_config(load_config(SMOKE)))
    assert origin["source_checkpoint_hash"] == registry.load("random:miniature").source["sha256"]
    assert origin["commits_of_variants"] == dict.fromkeys(VARIANTS, origin["commit"])


def test_stored_bytes_are_those_of_the_tensors(document, smoke_run):
    stored = {v["name"]: v["stored_bytes"] for v in document["variants"]}
    params = registry.load("random:miniature").model.params
    assert stored["fp32"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    for name in VARIANTS:
        tensors = load_file(smoke_run / "variants" / name / "bundle" / "weights.safetensors")
        assert stored[name] == sum(array.nbytes for array in tensors.values())
    assert stored["rtn_w4a8"] == stored["brecq_w4a8"] < stored["tfmq_w4a8"] < stored["rtn_w8a8"]
    assert stored["rtn_w8a8"] < stored["fp32"] / 2


def test_every_bundle_holds_the_codes_of_its_plan(smoke_run):
    for name in VARIANTS:
        bundle = load_bundle(smoke_run / "variants" / name / "bundle")
        assert bundle.manifest["extra"]["method"] == name.rsplit("_", 1)[0]
        assert bundle.manifest["source"]["name"] == "random:miniature"
        held = {
            site: entry.rhs.bits
            for site, entry in flatten_sites(bundle.quant).items()
            if isinstance(entry.rhs, QTensor)
        }
        planned = {
            e["site"]: e["bits"] for e in bundle.manifest["plan"] if e["operand"] == "weight"
        }
        assert held == planned
        assert set(held.values()) == ({8} if "w8" in name else {4, 8})  # the ends keep 8 bits


def test_pictures_and_pages_show_every_variant(document, smoke_run):
    assert len(document["pictures"]) == 4
    for link in document["pictures"].values():
        assert np.asarray(Image.open(smoke_run / link)).std() > 10
    for page in ("report.md", "report.html"):
        text = (smoke_run / page).read_text()
        assert all(name in text for name in VARIANTS)


def test_the_same_command_again_changes_and_compiles_nothing(smoke_run, tmp_path):
    workdir = shutil.copytree(smoke_run, tmp_path / "w")

    def state():
        files = digests(workdir / "variants") | digests(workdir / "trajectories")
        kept = [p for p in workdir.glob("*/**/*.*") if p.suffix not in (".png", ".pdf")]
        times = {p: p.stat().st_mtime_ns for p in kept}
        return files, times

    older, oldest = (workdir / "variants" / name / "quantize.json" for name in VARIANTS[:2])
    save_record(older, {**load_record(older), "commit": "1234567"})
    kept = load_record(oldest)
    del kept["commit"]
    save_record(oldest, kept)
    before = state()
    with compile_account() as account:
        quantize(load_config(SMOKE), workdir)
    assert state() == before
    assert account.cache_hits == account.backend_compiles
    again, first = (json.loads((w / "report.json").read_text()) for w in (workdir, smoke_run))
    assert again["variants"] == first["variants"]
    made, measured = again["provenance"]["commits_of_variants"], first["provenance"]["commit"]
    assert [made[name] for name in VARIANTS[:3]] == [
        f"quantized at 1234567, measured at {measured}",
        f"quantized at a commit not recorded, measured at {measured}",
        measured,
    ]


def test_a_second_run_in_a_new_process_compiles_nothing_and_comes_to_the_same_bits(
    smoke_run, tmp_path
):
    log = main_job.run("quantize", config=SMOKE, workdir=tmp_path / "w")
    asked, found = main_job.compiled(log)
    assert asked == found > 100
    assert digests(tmp_path / "w", "**/bundle/*") == digests(smoke_run, "**/bundle/*")
    for name in VARIANTS:
        first, again = (
            load_record(w / "variants" / name / "metrics.json") for w in (smoke_run, tmp_path / "w")
        )
        seconds = {key for key in first if key.endswith("_s")}
        assert {k: v for k, v in first.items() if k not in seconds} == {
            k: v for k, v in again.items() if k not in seconds
        }
