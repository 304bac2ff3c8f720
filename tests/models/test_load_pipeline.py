"""Published pipelines from files: one native checkpoint, a folder of diffusers, a cache folder, the hub."""

import dataclasses
import json
import sys
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from qdiff_jax.diffusion.guidance import classifier_free, null_labels
from qdiff_jax.models import load_pipeline as loading
from qdiff_jax.models.clip import TextConfig, TowerConfig
from qdiff_jax.models.clip_tokenizer import END, START, byte_symbols
from qdiff_jax.models.load_pipeline import Parts, load_pipeline
from qdiff_jax.models.pipeline import conditions, null_condition
from qdiff_jax.models.places import beside, find_place, part_of
from qdiff_jax.models.port.first_stage import diffusers_config
from qdiff_jax.models.port.t5 import t5_config
from qdiff_jax.models.port.unet_ldm import BUFFERS
from qdiff_jax.models.port.unet_ldm_diffusers import block_names, native_key
from qdiff_jax.models.published import PUBLISHED, T5, Published
from qdiff_jax.models.registry import load, miniature
from qdiff_jax.runtime.state_dicts import load_state_dict

from ..parity.networks import seeded
from ..runtime.torch_zips import archive
from . import test_first_stage as stages
from . import test_pixart as pixart
from .ldm_cases import CONFIGS, state_dict
from .port import test_dit_port as dit

LINEAR = {"schedule": "linear", "timesteps": 1000}
KL = diffusers_config(stages.stored("kl")[1]["config"])
CLIP = TextConfig(TowerConfig(24, 1, 3), vocabulary=514, positions=7)
T5_FIELDS = {
    "model_type": "t5",
    "feed_forward_proj": "gated-gelu",
    "d_model": 20,
    "num_layers": 1,
    "num_heads": 2,
    "d_ff": 16,
    "d_kv": 4,
    "vocab_size": 64,
    "relative_attention_num_buckets": 8,
}
TINY = {
    "tiny-sd": Published(CONFIGS["text"], LINEAR, "nowhere", KL, CLIP),
    "tiny-kl": Published(CONFIGS["text"], LINEAR, "nowhere", KL, scale_in_file=True),
    "tiny-ldm": Published(CONFIGS["classes"], LINEAR, "nowhere", KL),
    "tiny-dit": Published(dit.CONFIG, LINEAR, "nowhere", KL),
    "tiny-pixart": Published(
        pixart.CONFIGS["alpha"], LINEAR, "nowhere", KL, T5, null_caption="learned"
    ),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(loading, "PUBLISHED", types.MappingProxyType({**PUBLISHED, **TINY}))


def clip_tensors():
    width, tower = CLIP.tower.width, "text_model.encoder.layers.0"
    shapes = {
        "text_model.embeddings.token_embedding.weight": (CLIP.vocabulary, width),
        "text_model.embeddings.position_embedding.weight": (CLIP.positions, width),
        f"{tower}.mlp.fc1.weight": (4 * width, width),
        f"{tower}.mlp.fc1.bias": (4 * width,),
        f"{tower}.mlp.fc2.weight": (width, 4 * width),
        f"{tower}.mlp.fc2.bias": (width,),
    }
    for name in ("q", "k", "v", "out"):
        shapes |= {f"{tower}.self_attn.{name}_proj.weight": (width, width)}
        shapes |= {f"{tower}.self_attn.{name}_proj.bias": (width,)}
    for name in (f"{tower}.layer_norm1", f"{tower}.layer_norm2", "text_model.final_layer_norm"):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return seeded.state_dict(shapes)


def t5_tensors():
    width, inner, block = 20, 8, "encoder.block.0.layer"
    shapes = {
        "shared.weight": (64, width),
        f"{block}.0.SelfAttention.relative_attention_bias.weight": (8, 2),
        f"{block}.0.SelfAttention.o.weight": (width, inner),
        f"{block}.1.DenseReluDense.wi_0.weight": (16, width),
        f"{block}.1.DenseReluDense.wi_1.weight": (16, width),
        f"{block}.1.DenseReluDense.wo.weight": (width, 16),
        f"{block}.0.layer_norm.weight": (width,),
        f"{block}.1.layer_norm.weight": (width,),
        "encoder.final_layer_norm.weight": (width,),
    }
    shapes |= {f"{block}.0.SelfAttention.{name}.weight": (inner, width) for name in "qkv"}
    return seeded.state_dict(shapes)


def save(tensors, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {key: np.asarray(value, order="C") for key, value in tensors.items()}
    safetensors.numpy.save_file(whole, path)


def save_vocabulary(folder):
    folder.mkdir(parents=True, exist_ok=True)
    symbols = [*byte_symbols(), START, END]
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def native_sd(config="text"):
    """A whole checkpoint in CompVis's names."""
    names = block_names(CONFIGS[config])
    file = {
        f"model.diffusion_model.{native_key(key, names, transformer=True)}": value
        for key, value in state_dict(config).items()
        if not key.startswith("cond_stage_model.")
    }
    file |= {f"first_stage_model.{k}": v for k, v in stages.tensors("kl", "compvis").items()}
    file |= {"first_stage_model.loss.logvar": np.zeros((), np.float32)}
    file |= {name: np.zeros(3, np.float32) for name in BUFFERS}
    if config == "text":
        file |= {f"cond_stage_model.transformer.{k}": v for k, v in clip_tensors().items()}
    else:
        key = "cond_stage_model.embedding.weight"
        file[key] = state_dict(config)[key]
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """native/sd.ckpt with a vocabulary beside it, and the same pipeline as a folder of diffusers."""
    root = tmp_path_factory.mktemp("files")
    save(native_sd(), root / "native" / "sd.ckpt")
    save_vocabulary(root / "native" / "tokenizer")
    folder = root / "diffusers"
    save(state_dict("text"), folder / "unet" / "diffusion_pytorch_model.safetensors")
    save(stages.tensors("kl", "diffusers"), folder / "vae" / "diffusion_pytorch_model.safetensors")
    save(clip_tensors(), folder / "text_encoder" / "model.safetensors")
    for part in ("unet", "vae", "text_encoder"):
        (folder / part / "config.json").write_text("{}")
    (folder / "model_index.json").write_text("{}")
    save_vocabulary(folder / "tokenizer")
    return root


@pytest.fixture
def hub(files, monkeypatch):
    """huggingface_hub with `files` as its server: `owner/diffusers`."""
    asked = []

    def hf_hub_download(repo_id, filename, *, revision=None):
        path = files / repo_id.removeprefix("owner/") / filename
        if not path.is_file():
            raise KeyError(f"404 {filename}")
        asked.append(filename)
        return str(path)

    def file_exists(repo_id, filename, *, revision=None):
        return (files / repo_id.removeprefix("owner/") / filename).is_file()

    module = types.SimpleNamespace(hf_hub_download=hf_hub_download, file_exists=file_exists)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return asked


def assert_equal(one, other):
    for part in ("diffusion", "first_stage", "text"):
        a, b = getattr(one, part), getattr(other, part)
        params = [(x.model if part == "diffusion" else x).params for x in (a, b)]
        jax.tree.map(np.testing.assert_array_equal, *params)
    assert (one.first_stage.config, one.text.config) == (
        other.first_stage.config,
        other.text.config,
    )
    assert one.diffusion.source == other.diffusion.source
    assert one.source == other.source


def test_one_native_file_and_a_folder_of_diffusers_are_the_same_pipeline(files, hub):
    parts = Parts(network="tiny-sd")
    native = load_pipeline(str(files / "native" / "sd.ckpt"), parts)
    assert native.text.length == 7
    assert native.first_stage.config == KL
    assert native.diffusion.source["schedule"] == LINEAR
    assert native.diffusion.source["name"] == "tiny-sd"
    assert set(native.source) == {"first_stage_sha256", "text_sha256"}
    assert conditions(native, ["a"]).shape == (1, 7, 24)
    for place in ("diffusers", "hub:owner/diffusers"):  # of a cache folder, and of the hub
        assert_equal(native, load_pipeline(place, dataclasses.replace(parts, folder=str(files))))
    assert "vae/diffusion_pytorch_model.safetensors" in hub
    assert "tokenizer/merges.txt" in hub


def test_parts_may_be_given_apart(files, tmp_path):
    whole = native_sd()
    alone = {k: v for k, v in whole.items() if k.startswith("model.diffusion_model.")}
    save(alone, tmp_path / "unet.ckpt")
    save(stages.tensors("kl", "compvis"), tmp_path / "kl" / "model.ckpt")
    parts = Parts(
        network="tiny-sd",
        first_stage="kl/model.ckpt",
        text=str(files / "diffusers" / "text_encoder"),
        folder=str(tmp_path),
    )
    one = load_pipeline("unet.ckpt", parts)
    assert_equal(one, load_pipeline(str(files / "diffusers"), Parts(network="tiny-sd")))
    for lacking, message in (
        ({"first_stage": ""}, "has no first stage, and tiny-sd draws latents"),
        (
            {"text": ""},
            "has no text encoder, and tiny-sd reads prompts; give the place of its CLIP",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load_pipeline("unet.ckpt", dataclasses.replace(parts, **lacking))


def test_the_file_s_own_scale_and_averages_are_taken(tmp_path):
    file = {**native_sd("classes"), "scale_factor": np.float32(0.25)}
    unet = [key for key in file if key.startswith("model.diffusion_model.")]
    file |= {f"model_ema.{k.removeprefix('model.').replace('.', '')}": 2 * file[k] for k in unet}
    file |= {"model_ema.decay": np.float32(0.9), "model_ema.num_updates": np.float32(7)}
    save(file, tmp_path / "model.ckpt")
    raw, average = (
        load_pipeline(str(tmp_path / "model.ckpt"), Parts(network="tiny-ldm", average=average))
        for average in (False, True)
    )
    assert raw.first_stage.config.scale_factor == 0.25
    assert raw.text is None
    assert raw.diffusion.null_class == 5
    kernels = [p.diffusion.model.params["out"]["out_2"]["kernel"] for p in (raw, average)]
    np.testing.assert_array_equal(2 * kernels[0], kernels[1])
    assert raw.diffusion.source["sha256"] != average.diffusion.source["sha256"]


def test_diffusion_transformers_with_a_first_stage_apart(tmp_path):
    save(dit.official(), tmp_path / "dit.pt")
    save(
        stages.tensors("kl", "diffusers"), tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    )
    parts = Parts(network="tiny-dit", first_stage="vae", folder=str(tmp_path))
    pipeline = load_pipeline("dit.pt", parts)
    assert pipeline.image_shape == (32, 32, 3)
    jax.tree.map(np.testing.assert_array_equal, pipeline.diffusion.model.params, dit.parameters())
    with pytest.raises(ValueError, match="holds one set of weights and no moving averages"):
        load_pipeline("dit.pt", dataclasses.replace(parts, average=True))


def test_weights_and_averages_of_a_training_file(tmp_path):
    """{"model", "ema", "opt", "args"}, as DiT's training saves; the names of two other projects."""
    save(stages.tensors("kl", "compvis"), tmp_path / "kl.ckpt")
    parts = Parts(network="tiny-dit", first_stage="kl.ckpt", folder=str(tmp_path))

    def state(factor, tensors):
        return {
            key: ("FloatStorage", np.float32(factor) * np.asarray(value, np.float32))
            for key, value in tensors.items()
        }

    weights, average = state(1, dit.official()), state(2, dit.official())
    other = {key: value for key, value in dit.official().items() if "final_layer" not in key}
    stage = state(1, load_state_dict(tmp_path / "kl.ckpt"))
    counter, nothing = b"I3\n", b"}"

    def outcome(entries, **changes):
        archive(tmp_path / "dit.pt", entries)
        pipeline = load_pipeline("dit.pt", dataclasses.replace(parts, **changes))
        kernels = [
            params["final_layer"]["linear"]["kernel"]
            for params in (pipeline.diffusion.model.params, dit.parameters())
        ]
        return float((kernels[0] / kernels[1]).mean())

    for names in (("model", "ema"), ("state_dict", "state_dict_ema")):
        both = {**dict(zip(names, (weights, average))), "opt": nothing, "steps": counter}
        assert outcome(both) == 1
        assert outcome(both, average=True) == 2
    assert outcome({"net": weights}) == 1
    # What nobody asks for may be anything.
    assert outcome({"state_dict": weights, "ema": nothing}) == 1
    assert outcome({"model": b"(cnets\nNet\no", "ema": average}, average=True) == 2
    for entries, changes, message in (
        ({"ema": average}, {}, r"holds moving averages \('ema'\) and no .*: set average=True\."),
        ({"net": weights, "ema": average}, {}, r"holds moving averages \('ema'\) and no weights"),
        ({"model": weights}, {"average": True}, "one set of weights .* set average=False if"),
        (
            {"model": weights, "model_ema": average},
            {"average": True},
            r"several state dicts \('model', 'model_ema'\), none of them under 'ema' or",
        ),
        ({"a": weights, "b": weights}, {}, r"several state dicts \('a', 'b'\), none of them under"),
        ({"state_dict": weights, "model": weights}, {}, r"may be meant \('state_dict', 'model'\)"),
        ({"state_dict": weights, "ema": nothing}, {"average": True}, "'ema' is no .*: it is empty"),
        (
            {"model": b"(cnets\nNet\no", "net": weights},
            {},
            "'model' is no .* of the class nets.Net",
        ),
        ({"model": stage}, {"average": True}, "looks like a first stage .*, and tiny-dit is of"),
        ({"model": state(1, other)}, {}, "final_layer"),
    ):
        with pytest.raises(ValueError, match=message):
            outcome(entries, **changes)


def test_pixart_with_t5(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    t5 = tmp_path / "t5"
    save(t5_tensors(), t5 / "model.safetensors")
    (t5 / "config.json").write_text(json.dumps(T5_FIELDS))
    (tmp_path / "lines.txt").write_text("a cat on the mat\nthe dog and a cat\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "lines.txt"),
        model_prefix=str(t5 / "spiece"),
        vocab_size=16,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    caption = np.ones((5, 20), np.float32)
    weights = {**pixart.official("alpha"), "y_embedder.y_embedding": caption}
    save(weights, tmp_path / "pixart.pth")
    save(stages.tensors("kl", "compvis"), tmp_path / "kl.ckpt")
    parts = Parts("tiny-pixart", first_stage="kl.ckpt", text="t5", folder=str(tmp_path))
    pipeline = load_pipeline("pixart.pth", parts)
    assert pipeline.text.config == t5_config(T5_FIELDS)
    y = conditions(pipeline, ["a cat", ""])
    assert y["context"].shape == (2, 5, 20)
    assert y["mask"].sum(axis=1)[1] == 1  # the end of an empty prompt
    null = null_labels(classifier_free(4.5, null_condition(pipeline)), y)
    np.testing.assert_array_equal(null["context"], np.broadcast_to(caption, (2, 5, 20)))
    for name in set(y) - {"context"}:
        np.testing.assert_array_equal(null[name], y[name])
    save(pixart.official("alpha"), tmp_path / "without.pth")
    with pytest.raises(ValueError, match="has no y_embedder.y_embedding"):
        load_pipeline("without.pth", parts)
    with pytest.raises(ValueError, match="there is nothing at t6 or .*t6, where the text encoder"):
        load_pipeline("pixart.pth", dataclasses.replace(parts, text="t6"))


@pytest.mark.parametrize(
    ("model", "parts", "message"),
    [
        ("sd.ckpt", {"network": "tiny-sdd"}, "no published network is called .*mean 'tiny-sd'"),
        ("sd.ckp", {}, r"nothing at sd.ckp or .*, where the model tiny-sd \(nowhere\) should be"),
        ("", {}, "no place is given for the model tiny-sd"),
        ("sd.ckpt", {"vocabulary": "v"}, "where the vocabulary of tiny-sd should be"),
        ("sd.ckpt", {"average": True}, "has no moving averages"),
        (
            "sd.ckpt",
            {"network": "tiny-dit"},
            "is of the family unet_ldm: .* of the family dit; give",
        ),
        ("averages.ckpt", {}, "holds moving averages without their weights, .*; take the whole"),
        ("page.ckpt", {}, "web page"),
        ("other.ckpt", {}, "has tensors of no network that is known here .such as odd.weight"),
        ("sd.ckpt", {"network": "ddpm_cifar10", "text": "x"}, "ddpm_cifar10 has no text; leave"),
        ("random:sd", {"network": "", "text": "x"}, "text is given without a network; name"),
        ("random:sdd", {"network": ""}, "Did you mean 'random:sd'"),
        ("unet.ckpt", {"average": True}, "holds one set of weights and no moving averages"),
        (
            "unet.ckpt",
            {"network": "tiny-dit", "average": True},
            "is of the family unet_ldm: it looks",
        ),
        ("sd/unet", {"network": "ddpm_cifar10"}, "unet_ldm: it looks like a U-Net with cross-att"),
        ("sd/unet", {"network": "tiny-dit"}, "is of the family unet_ldm: it .* of the family dit"),
        ("sd/unet", {"average": True}, "holds one set of weights and no moving averages"),
        ("sd/vae", {}, r"looks like a first stage \(autoencoder\) .* of the family unet_ldm"),
        ("unet.ckpt", {"network": "tiny-kl"}, "has no scale_factor, by which tiny-kl multiplies"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(files, tmp_path, model, parts, message):
    (tmp_path / "sd.ckpt").symlink_to(files / "native" / "sd.ckpt")
    mark = "model.diffusion_model."
    whole = load_state_dict(files / "native" / "sd.ckpt")
    own = {k.removeprefix(mark): np.asarray(v) for k, v in whole.items() if k.startswith(mark)}
    save(own, tmp_path / "unet.ckpt")
    (tmp_path / "sd").symlink_to(files / "diffusers")
    (tmp_path / "page.ckpt").write_text("<!DOCTYPE html><html>not found</html>" * 20)
    save({"model_ema.diffusion_modelout2bias": np.zeros(3, np.float32)}, tmp_path / "averages.ckpt")
    save({"odd.weight": np.zeros(3, np.float32)}, tmp_path / "other.ckpt")
    given = Parts(**{"network": "tiny-sd", "folder": str(tmp_path), **parts})
    with pytest.raises(ValueError, match=message) as error:
        load_pipeline(model, given)
    assert str(error.value).count(". ") <= 1
    assert len(str(error.value)) < 700


def test_a_file_without_a_vocabulary_beside_it_says_what_to_give(files, tmp_path):
    (tmp_path / "sd.ckpt").symlink_to(files / "native" / "sd.ckpt")
    with pytest.raises(ValueError, match="no vocabulary beside .*sd.ckpt: give the place of vocab"):
        load_pipeline(str(tmp_path / "sd.ckpt"), Parts(network="tiny-sd"))


def test_a_repository_of_one_network_has_it_in_shards_at_its_root(files, hub):
    root = files / "t5"
    save({"a": np.zeros(2, np.float32)}, root / "model-1.safetensors")
    save({"b": np.zeros(2, np.float32)}, root / "model-2.safetensors")
    shards = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (root / "model.safetensors.index.json").write_text(json.dumps(shards))
    (root / "config.json").write_text("{}")
    (root / "spiece.model").write_text("pieces")
    place = find_place("hub:owner/t5", "", "it")
    assert place.is_pipeline
    assert part_of(place, ("text_encoder",), "text encoder") == root
    assert {"config.json", "model-1.safetensors", "model-2.safetensors"} <= set(hub)
    assert beside(place, ("spiece.model",)) == root
    assert find_place("hub:owner/t5", "", "it", files=("spiece.model",)).path == root
    with pytest.raises(ValueError, match="the repository has none of"):
        beside(place, ("vocab.json", "merges.txt"))


def test_a_bundle_of_another_network_is_refused(files):
    place = str(files / "native" / "sd.ckpt")
    with pytest.raises(ValueError, match="made of random:sd, and the other parts .* of tiny-sd"):
        load_pipeline(place, Parts(network="tiny-sd"), miniature("random:sd"))


def test_models_of_this_project_are_pipelines_by_name():
    assert load_pipeline("random:sd").diffusion is load("random:sd")
    assert load_pipeline("random:miniature").first_stage is None
    assert load_pipeline("unet_fashion").image_shape == (32, 32, 1)
    # A network of its own (of a bundle) takes the place of the model's.
    own = miniature("random:sd")._replace(null_class=None)
    assert load_pipeline("random:sd", diffusion=own).diffusion is own
    with pytest.raises(ValueError, match="latents of 1 channels and the first stage of random:sd"):
        load_pipeline("random:sd", diffusion=load("random:ldm"))


def test_every_published_pipeline_fits_together():
    for name, row in PUBLISHED.items():
        if row.first_stage is not None:
            assert row.first_stage.embed_dim == row.network.in_channels, name
        if isinstance(row.text, TextConfig):
            assert row.text.tower.width == row.network.context_dim
            assert row.text.positions == row.network.context_length
        assert (row.text == T5) == name.startswith("PixArt")
