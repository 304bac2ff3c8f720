"""T5's encoder against transformers on seeded weights, its tokenizer, and what is refused."""

import dataclasses
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.models.port.t5 import t5_config, t5_params
from qdiff_jax.models.t5 import T5_SIZES, T5Encoder, position_buckets, t5_shapes
from qdiff_jax.models.t5_tokenizer import load_t5_tokenizer, tokenize_t5

from ..parity.networks import seeded
from ..tiny_unet import QUICK

CASE = pathlib.Path(__file__).parents[1] / "parity" / "networks" / "text_encoders.npz"
CAPTIONS = [
    "a photo of a cat",
    "The cat's hat, on the mat!!",
    "Crème brûlée — naïve café",
    "1234 dogs",
]


@functools.cache
def stored():
    with np.load(CASE, allow_pickle=False) as file:
        case = {k.removeprefix("t5/"): file[k] for k in file.files if k.startswith("t5/")}
    return case, json.loads(str(case.pop("meta")))


def tensors():
    state = seeded.state_dict(stored()[1]["manifest"])
    return state | {"encoder.embed_tokens.weight": state["shared.weight"]}


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def run(config, params, ids, mask=None):
    return T5Encoder(config).apply({"params": params}, ids, mask)


def test_the_hidden_states():
    case, meta = stored()
    config = t5_config(meta["config"])
    params = t5_params(tensors(), config)
    with jax.default_matmul_precision("highest"):
        hidden = np.asarray(run(config, params, case["ids"], case["mask"]))
    lengths = case["mask"].sum(1)
    assert sorted(lengths) == [1, 9, 26]
    for row, expected, length in zip(hidden, case["hidden"], lengths):
        error = np.abs(row - expected)[:length].max()
        assert error < 4 * case["float32_error"]
    # What stands in the padding has no influence on the tokens.
    other = np.where(case["mask"], case["ids"], 1)
    assert (other != case["ids"]).any()
    again = np.asarray(run(config, params, other, case["mask"]))
    np.testing.assert_array_equal(again[case["mask"]], hidden[case["mask"]])


def test_without_a_mask_everything_is_a_token():
    case, meta = stored()
    config = t5_config(meta["config"])
    params = t5_params(tensors(), config)
    everything = np.ones_like(case["mask"])
    found = run(config, params, case["ids"])
    np.testing.assert_allclose(found, run(config, params, case["ids"], everything), atol=1e-6)
    half = run(dataclasses.replace(config, dtype="bfloat16"), params, case["ids"])
    assert half.dtype == jnp.float32
    assert 1e-4 < np.abs(half - found).max() < 0.3


def test_the_buckets_of_relative_positions():
    case, _ = stored()
    buckets = position_buckets(401, 32, 128)
    row = np.concatenate([buckets[400], buckets[0, 1:]])  # offsets -400..0 and 1..400
    np.testing.assert_array_equal(row, case["buckets"])
    assert len(np.unique(row)) == 31  # bucket 16, "0 behind", is nobody's


def test_the_published_size():
    shapes = t5_shapes(T5_SIZES["t5-v1_1-xxl"])
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 4_762_310_656


def test_strict_and_the_decoder_dropped():
    config = t5_config(stored()[1]["config"])
    whole = tensors()
    params = t5_params(whole, config)
    decoder = {
        "decoder.block.0.layer.0.layer_norm.weight": np.ones(24),
        "lm_head.weight": np.ones(2),
    }
    jax.tree.map(np.testing.assert_array_equal, params, t5_params(whole | decoder, config))
    other = {"encoder.embed_tokens.weight": whole["shared.weight"] + 1}
    with pytest.raises(ValueError, match=r"f: encoder\.embed_tokens\.weight is not shared\.weight"):
        t5_params(whole | other, config, "f")
    shared = whole.pop("shared.weight")  # files of the encoder alone may have the other name only
    jax.tree.map(np.testing.assert_array_equal, params, t5_params(whole, config))
    del whole["encoder.block.1.layer.1.DenseReluDense.wi_1.weight"]
    with pytest.raises(ValueError, match="f does not fit.*block_1/up/kernel"):
        t5_params(whole, config, "f")
    bias = {"encoder.block.1.layer.0.SelfAttention.q.bias": shared[0]}
    with pytest.raises(ValueError, match=r"1 tensors without a parameter: .*q\.bias"):
        t5_params(tensors() | bias, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mt5"}, "f describes a mt5"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu'.*1.1"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon=1e-05"),
    ],
)
def test_configs_of_other_models(change, message):
    with pytest.raises(ValueError, match=message):
        t5_config(stored()[1]["config"] | change, "f")


def test_a_config_that_is_cut():
    fields = {k: v for k, v in stored()[1]["config"].items() if k not in ("d_ff", "num_heads")}
    with pytest.raises(ValueError, match="f lacks num_heads, d_ff: it is cut"):
        t5_config(fields, "f")


def test_wrong_inputs():
    config = t5_config(stored()[1]["config"])
    with pytest.raises(ValueError, match=r"got \(2, 3\), \(2, 4\)"):
        jax.eval_shape(
            T5Encoder(config).init,
            jax.random.key(0),
            jnp.zeros((2, 3), jnp.int32),
            jnp.ones((2, 4), bool),
        )


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A sentencepiece model with T5's special symbols, trained on the captions."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder


def test_captions_as_tokens(vocabulary):
    tokenizer = load_t5_tokenizer(vocabulary)
    ids, mask = tokenize_t5(tokenizer, CAPTIONS, 40)
    assert ids.dtype == np.int32
    assert ids.shape == mask.shape == (4, 40)
    for text, row, filled in zip(CAPTIONS, ids, mask):
        count = int(filled.sum())
        assert filled[:count].all()
        assert row[count - 1] == 1  # the end
        assert (row[count:] == 0).all()
        assert tokenizer.decode(row[: count - 1].tolist()) == text
    cut, whole = (tokenize_t5(tokenizer, CAPTIONS[:1], length) for length in (4, 40))
    np.testing.assert_array_equal(cut[0][0], [*whole[0][0, :3], 1])
    assert cut[1].all()
    empty, one = tokenize_t5(tokenizer, [""], 5)
    np.testing.assert_array_equal(empty, [[1, 0, 0, 0, 0]])
    assert one.sum() == 1


def test_unusable_vocabularies(vocabulary, tmp_path):
    import sentencepiece

    with pytest.raises(ValueError, match=r"no T5 vocabulary .*spiece\.model"):
        load_t5_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"<html>no</html>")
    with pytest.raises(ValueError, match="damaged or no sentencepiece model"):
        load_t5_tokenizer(tmp_path)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 20),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=40,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="no padding symbol"):
        load_t5_tokenizer(tmp_path)


def test_without_sentencepiece(tmp_path, monkeypatch):
    (tmp_path / "spiece.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[t5\]'"):
        load_t5_tokenizer(tmp_path)
