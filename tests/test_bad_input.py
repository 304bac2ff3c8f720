"""Bad input gets one clear sentence: what, where, what to do; and nothing that was there is lost."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.config import claim_workdir, load_config
from qdiff_jax.diffusion.sample import sample
from qdiff_jax.methods.registry import METHODS, build
from qdiff_jax.methods.run import make_sampler
from qdiff_jax.models import registry
from qdiff_jax.named_policies import policy
from qdiff_jax.observe.archive import load_arrays, save_arrays
from qdiff_jax.policy import Rule, make_plan
from qdiff_jax.quant.qparams import from_range
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.quant.timed import TimeIndexed
from qdiff_jax.runtime.weights import load_weights, save_weights
from qdiff_jax.sites import SiteQuant, list_sites

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A good weights file of the miniature network, as experiments.train writes it."""
    model = registry.miniature()
    header = {k: v for k, v in model.config.items() if k != "family"}
    path = tmp_path_factory.mktemp("weights") / "good.safetensors"
    save_weights(
        path,
        jax.device_get(model.model.params),
        {"kind": "diffusion", "model": header, "schedule": model.source["schedule"], "step": 1},
    )
    return path


def altered(checkpoint, tmp_path, change):
    params, header = load_weights(checkpoint)
    change(params)
    path = tmp_path / "altered.safetensors"
    save_weights(path, params, header)
    return str(path)


def test_the_good_checkpoint_loads(checkpoint):
    loaded = registry.load(str(checkpoint))
    assert jax.tree.all(
        jax.tree.map(np.array_equal, loaded.model.params, registry.miniature().model.params)
    )


def test_missing_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"no weights file .*absent\.safetensors"):
        registry.load(str(tmp_path / "absent.safetensors"))


@pytest.mark.parametrize("kept", [4, 500, 0.5, 0.99])
def test_truncated_checkpoint(checkpoint, tmp_path, kept):
    content = checkpoint.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(ValueError, match=r"cut\.safetensors is damaged"):
        registry.load(str(path))


def test_wrong_shape(checkpoint, tmp_path):
    def change(params):
        params["conv_in"]["conv"]["bias"] = np.zeros(3, np.float32)

    with pytest.raises(ValueError, match=r"conv_in/conv/bias: \(3,\), wanted \(8,\)"):
        registry.load(altered(checkpoint, tmp_path, change))


def test_unmapped_and_unfilled_parameters_are_both_named(checkpoint, tmp_path):
    def change(params):
        params["conv_in"]["conv"]["weight"] = params["conv_in"]["conv"].pop("kernel")

    with pytest.raises(ValueError, match="2 parameters.*kernel: absent.*weight") as caught:
        registry.load(altered(checkpoint, tmp_path, change))
    assert "wanted none" in str(caught.value)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match="'unet_fashion'"):
        registry.load("unet_fashon")
    with pytest.raises(ValueError, match="'tfmq'"):
        build("tfqm", None, None, None)
    assert {"brecq", "rtn", "tfmq"} <= set(METHODS)


def sites():
    model = registry.miniature()
    x = np.zeros((1, *model.image_shape), np.float32)
    return list_sites(model.model.module, x, np.zeros(1, np.float32), np.zeros(1, np.int32))


def test_a_rule_that_matches_no_site():
    rules = policy("common", sites(), 4, 8)
    misspelt = Rule("shortcuts", "*/nin_shortcuts", ("weight",), None, None)
    with pytest.raises(ValueError, match="'shortcuts'.*matches no site.*nearest.*nin_shortcut'"):
        make_plan(sites(), (misspelt, *rules))


def test_an_unknown_policy():
    with pytest.raises(ValueError, match="Did you mean 'official:tfmq'"):
        policy("official:tfmk", sites(), 4, 8)


def test_a_timestep_never_calibrated():
    model = registry.miniature()
    rows = from_range(QuantSpec(), -jnp.ones(4), jnp.ones(4), jnp.zeros(4), jnp.full(4, 255.0))
    table = TimeIndexed(rows, jnp.array([0.0, 250.0, 500.0, 750.0]), "step")
    quant = {"conv_in": {"conv": SiteQuant(lhs=table)}}
    other = make_sampler(
        model.source["schedule"], {"name": "ddim", "spacing": "uniform", "steps": 5}
    )
    with pytest.raises(ValueError, match=r"conv_in/conv.*timestep 200 .*never calibrated.*nearest"):
        sample(
            registry.predictor(model.model.module),
            {"params": model.model.params, "quant": quant},
            other,
            jax.random.key(0),
            [0],
            shape=model.image_shape,
            y=np.zeros(1, np.int32),
        )


@dataclasses.dataclass(frozen=True)
class Record:
    x: np.ndarray
    y: np.ndarray | None


def test_a_damaged_archive_says_to_delete_it(tmp_path):
    path = tmp_path / "calibration.npz"
    save_arrays(path, Record(np.arange(6.0), None))
    assert load_arrays(path, Record, optional=("y",)).y is None
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="calibration.npz is damaged.*delete it and run again"):
        load_arrays(path, Record, optional=("y",))


def test_a_full_disk_keeps_the_archive_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "calibration.npz"
    save_arrays(path, Record(np.arange(6.0), None))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="could not be written.*free some space.*same command"):
        save_arrays(path, Record(np.zeros(6), None))
    monkeypatch.undo()
    kept = load_arrays(path, Record, optional=("y",))
    np.testing.assert_array_equal(kept.x, np.arange(6.0))
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.npz"]


def test_another_config_may_not_use_the_workdir(tmp_path):
    config = load_config(str(ROOT / "configs" / "quickstart.py:smoke"))
    claim_workdir(tmp_path, config)
    before = json.loads((tmp_path / "config.json").read_text())
    with config.unlocked():
        config.seed = 1
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        claim_workdir(tmp_path, config)
    assert json.loads((tmp_path / "config.json").read_text()) == before


@pytest.mark.parametrize(
    ("arg", "overrides", "message"),
    [
        ("smoke", {"reconstruct.step": 5}, "steps"),
        ("smok", {}, "'smoke'"),
    ],
)
def test_a_misspelt_config_key_suggests_the_nearest(arg, overrides, message):
    with pytest.raises((ValueError, AttributeError, KeyError), match=message):
        load_config(str(ROOT / "configs" / f"quickstart.py:{arg}"), overrides)
