"""Every config is documented, and its smoke variant runs: without a network, without files, in seconds."""

import dataclasses
import inspect
import json
import pathlib
import re
import runpy

import jax
import numpy as np
import pytest
from PIL import Image

from experiments.evaluate import evaluate
from experiments.evaluate_config import read_config
from experiments.quantize import quantize
from experiments.train import train
from qdiff_jax.config import flatten, load_config
from qdiff_jax.diffusion.protocols import PROTOCOLS
from qdiff_jax.eval.shards import Shard
from qdiff_jax.export.bundle import save_bundle
from qdiff_jax.models import registry
from qdiff_jax.models.published import PUBLISHED
from qdiff_jax.observe.archive import load_arrays
from qdiff_jax.runtime.weights import load_weights

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("[!_]*.py"))
ROWS = sorted((pathlib.Path(__file__).parents[2] / "configs" / "eval").glob("[!_]*.py"))
# Of rows whose protocol has another name.
NAMED = {
    "beds_200_eta1": "lsun_bedrooms_200_eta1",
    "churches_500_eta0": "lsun_churches_500_eta0",
    "pixart1024_dpm20": "pixart_dpm20_cfg4p5",
}
TRAINED = [path for path in CONFIGS if path.stem.startswith("train_")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_what_to_run_and_what_to_expect(path):
    doc = inspect.cleandoc(runpy.run_path(str(path))["__doc__"])
    assert f"--config=configs/{path.name}" in doc
    assert "python -m experiments." in doc
    assert any(word in doc for word in ("Expected", "Measured", "ends near"))
    assert f"{path.name}:smoke" in doc


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_typo_names_the_nearest_word(path):
    with pytest.raises(ValueError, match="smoke"):
        load_config(f"{path}:smokey")


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_the_smoke_variant_trains(path, tmp_path):
    config = load_config(f"{path}:smoke")
    steps = train(config, tmp_path)
    assert steps == config.optimizer.total_steps
    params, header = load_weights(tmp_path / "weights.safetensors")
    assert header["kind"] == config.kind
    assert params


def test_the_smoke_variant_quantizes(smoke_run):
    # Made once by a fixture; what it leaves is looked at with the main job's own tests.
    assert (smoke_run / "report.html").exists()


def test_the_smoke_variant_shows_the_damage_of_rounding(tmp_path):
    path = CONFIGS[0].with_name("damage.py")
    assert load_config(f"{path}:dit").model == "dit_fashion"
    quantize(load_config(f"{path}:dit,smoke"), tmp_path)
    variants = json.loads((tmp_path / "report.json").read_text())["variants"]
    errors = {v["name"]: v["eps_rel_mse"] for v in variants}
    assert errors["rtn_w8a8"] < errors["rtn_w4a8"] < errors["rtn_w2a8"]


def test_every_published_row_has_its_config():
    assert {path.stem for path in ROWS} == {
        "cifar10_ddim100_quad",
        "beds_200_eta1",
        "churches_500_eta0",
        "celebahq_200_eta0",
        "ffhq_200_eta1",
        "imagenet_20_cfg3",
        "sd14_plms50_cfg7p5",
        "dit256_50_cfg1p5",
        "dit256_100_cfg1p5",
        "dit256_250_cfg1p5",
        "dit512_50_cfg1p5",
        "dit512_100_cfg1p5",
        "pixart1024_dpm20",
    }


# tool, samples, seed, average of the authors' files, images of the published statistics.
SAID = {
    "cifar10_ddim100_quad": ("torch-fidelity", 50_000, 1234, False, 0),
    "beds_200_eta1": ("adm", 50_000, 40, True, 3_033_042),
    "churches_500_eta0": ("adm", 50_000, 40, True, 0),
    "celebahq_200_eta0": ("torch-fidelity", 50_000, 40, True, 0),
    "ffhq_200_eta1": ("torch-fidelity", 50_000, 40, True, 0),
    "imagenet_20_cfg3": ("adm", 50_000, 0, False, 1_281_167),
    "sd14_plms50_cfg7p5": ("adm", 30_000, 42, False, 0),
    "pixart1024_dpm20": ("pytorch-fid", 1024, 42, False, 0),
    "dit": ("adm", 10_000, 0, False, 1_281_167),
}


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)
def test_a_row_is_its_published_protocol(path):
    """Sampler, guidance, schedule and bytes are those of `PROTOCOLS`, and the docstring says what to expect."""
    config = read_config(load_config(str(path)))
    stem = re.sub(r"^dit(256|512)", "dit", path.stem)
    protocol, network = PROTOCOLS[NAMED.get(stem, stem)], PUBLISHED[config.parts.network]
    sampler = config.sampler.as_json()
    scale = sampler.pop("guidance_scale")
    assert sampler.pop("guided_channels", None) == protocol.guided_channels
    assert scale == (-1 if protocol.guidance_scale is None else protocol.guidance_scale)
    eta = {"eta": 0.0} if protocol.sampler["name"] == "ddim" else {}
    options = eta | protocol.sampler["options"]
    assert sampler == {**protocol.sampler, "options": options}
    assert network.schedule == protocol.schedule
    assert config.uint8 == protocol.uint8
    said = SAID["dit" if path.stem.startswith("dit") else path.stem]
    counted = config.data.published_count
    assert (config.tool, config.samples, config.seed, config.parts.average, counted) == said
    if path.stem.startswith("dit"):
        assert config.parts.network.endswith(path.stem[3:6])
    doc = inspect.cleandoc(runpy.run_path(str(path))["__doc__"])
    for said in (f"--config=configs/eval/{path.name}", f"{path.name}:smoke", "Expected", "arXiv"):
        assert said in doc, said
    # The command in the docstring names options that there are.
    known = flatten(load_config(str(path)).to_dict())
    assert set(re.findall(r"--config\.([\w.]+)=", doc)) <= set(known)


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)
def test_the_smoke_variant_of_a_row_is_evaluated(path, tmp_path):
    config = load_config(f"{path}:smoke")
    whole = read_config(load_config(str(path)))
    assert read_config(config).sampler == dataclasses.replace(whole.sampler, steps=2)
    assert config.uint8 == whole.uint8
    result = evaluate(config, tmp_path)
    assert {"frechet", "kernel", "precision", "recall"} <= set(result["metrics"])
    shards = sorted((tmp_path / "shards").glob("*.npz"))
    drawn = np.concatenate([load_arrays(shard, Shard).images for shard in shards])
    assert drawn.shape == ((8, 8, 8, 1) if path.stem.startswith("cifar") else (8, 16, 16, 3))
    assert drawn.std(axis=0).mean() > 10  # of different noise and conditions
    assert (tmp_path / "contact_sheet.png").exists() == bool(config.prompts)


def test_a_prompt_becomes_a_picture_in_a_file(tmp_path):
    """Prompt, tokens, text encoder, guided U-Net, decoder, PNG: another prompt, another picture."""
    path = ROWS[0].with_name("sd14_plms50_cfg7p5.py")
    pictures = {}
    for name, lines in (("one", "a red circle\na blue square"), ("other", "a red circle\nsnow")):
        (tmp_path / f"{name}.txt").write_text(f"{lines}\n")
        prompts = {"prompts": str(tmp_path / f"{name}.txt")}
        evaluate(load_config(f"{path}:smoke", prompts), tmp_path / name)
        folder = tmp_path / name / "pictures"
        assert (folder / "prompts.txt").read_text().splitlines() == lines.splitlines()
        assert sorted(p.name for p in folder.glob("*.png")) == ["0000000.png", "0000001.png"]
        with Image.open(tmp_path / name / "contact_sheet.png") as sheet:
            assert (sheet.size, sheet.mode) == ((2 * 18 + 2, 18 + 2), "RGB")
        for picture in folder.glob("*.png"):
            with Image.open(picture) as image:
                assert (image.size, image.mode) == ((16, 16), "RGB")
                pictures[name, picture.stem] = np.asarray(image, np.int32)
    # The same noise in both; the first prompt is the same, the second another one.
    same, changed = (
        np.abs(pictures["one", stem] - pictures["other", stem]) for stem in ("0000000", "0000001")
    )
    assert same.max() == 0
    assert (changed > 0).mean() > 0.2
    shard = load_arrays(tmp_path / "one" / "shards" / "0000000.npz", Shard)
    assert shard.labels.tolist() == [0, 1, 0, 1]  # prompts in turn
    (tmp_path / "one" / "shards" / "0000000.npz").unlink()
    prompts = {"prompts": str(tmp_path / "one.txt")}
    evaluate(load_config(f"{path}:smoke", prompts), tmp_path / "one")
    again = load_arrays(tmp_path / "one" / "shards" / "0000000.npz", Shard)
    np.testing.assert_array_equal(again.images, shard.images)
    # Pairs are of one prompt; the first pair of lines is not that of the other file.
    with pytest.raises(ValueError, match="its prompts_sha256 is .*no two samples belong together"):
        evaluate(
            load_config(f"{path}:smoke", {**prompts, "paired": str(tmp_path / "other")}),
            tmp_path / "one",
        )
    # Other prompts at the same path are other samples.
    (tmp_path / "one.txt").write_text("snow\n")
    with pytest.raises(ValueError, match="holds samples of other weights .* or other prompts were"):
        evaluate(load_config(f"{path}:smoke", prompts), tmp_path / "one")


def test_a_bundle_is_sampled_with_the_rest_of_its_pipeline(tmp_path):
    """A bundle holds a network alone: prompts and pictures go through the parts of the config's model."""
    smoke = f"{ROWS[0].with_name('sd14_plms50_cfg7p5.py')}:smoke"
    model = registry.load("random:sd")
    params = {
        **model.model.params,
        "out": jax.tree.map(lambda x: 2.0 * x, model.model.params["out"]),
    }
    save_bundle(
        tmp_path / "bundle",
        params=params,
        quant={},
        plan_json=[],
        model_config=model.config,
        schedule_config=model.source["schedule"],
        sampler_config=read_config(load_config(smoke)).sampler.as_json(),
        source={"sha256": model.source["sha256"], "name": "random:sd"},
        extra={"pipeline": {"model": "random:sd", "parts": {}, "prompts": ["a"]}},
    )
    for name, bundle in (("w", ""), ("b", str(tmp_path / "bundle"))):
        evaluate(load_config(smoke, {"bundle": bundle}), tmp_path / name)
    one, other = (load_arrays(tmp_path / w / "shards" / "0000000.npz", Shard).images for w in "wb")
    assert one.shape == other.shape
    assert np.abs(one.astype(int) - other.astype(int)).mean() > 5  # of the bundle's own weights
    subject = json.loads((tmp_path / "b" / "metrics.json").read_text())["subject"]
    assert "pipeline" not in subject  # thousands of prompts, of which the digest is kept
    with pytest.raises(ValueError, match="draws latents, and config.parts names no network"):
        evaluate(
            load_config(smoke, {"bundle": str(tmp_path / "bundle"), "model": "unet_fashion"}),
            tmp_path / "none",
        )
    evaluate(load_config(smoke, {"paired": str(tmp_path / "w")}), tmp_path / "w")
    metrics = json.loads((tmp_path / "w" / "metrics.json").read_text())["metrics"]
    assert metrics["mse"]["value"] == 0


def test_every_config_is_run_here():
    # Their smokes are subjects of tests/experiments: test_evaluate.py and so on.
    elsewhere = {"quickstart", "damage", "evaluate", "bench_rounding", "claims", "terrain"}
    assert {path.stem for path in CONFIGS} == elsewhere | {path.stem for path in TRAINED}
