"""The text encoders against the live modules of transformers, at reduced and (slow) at full size."""

import jax
import numpy as np
import pytest

from qdiff_jax.models.clip import TextTower
from qdiff_jax.models.port.hub_folder import load_component
from qdiff_jax.models.t5 import T5Encoder

from ..tiny_unet import QUICK
from .references import both, build, need, per_sample, saved

torch, _ = need("torch", "transformers")

_CLIP = dict(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    vocab_size=90,
    max_position_embeddings=20,
    hidden_act="quick_gelu",
    bos_token_id=88,
    eos_token_id=89,
    pad_token_id=89,
    projection_dim=32,
)
# ViT-L/14 of Stable Diffusion 1.
_FULL = _CLIP | dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    vocab_size=49408,
    max_position_embeddings=77,
    bos_token_id=49406,
    eos_token_id=49407,
    pad_token_id=49407,
    projection_dim=768,
)
_T5 = dict(
    d_model=40,
    d_ff=64,
    d_kv=8,
    num_layers=3,
    num_heads=5,
    vocab_size=80,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)


def clip(options, tmp_path):
    model = build("transformers", "CLIPTextModel", **options)
    length, vocabulary = options["max_position_embeddings"], options["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocabulary - 3, (2, length)).astype(np.int32)
    ids[:, 0], ids[0, 6:], ids[1, -1] = vocabulary - 2, vocabulary - 1, vocabulary - 1
    component = load_component(saved(model, tmp_path))
    assert (component.kind, component.name) == ("text", "CLIPTextModel")
    expected, floor = both(
        model, lambda model, _: model(input_ids=torch.tensor(ids).long()).last_hidden_state
    )
    run = jax.jit(TextTower(component.config).apply, compiler_options=QUICK)
    with jax.default_matmul_precision("highest"):
        out = run({"params": component.params}, ids)
    return np.asarray(out["hidden"]), expected, floor


def test_clip(tmp_path):
    out, expected, floor = clip(_CLIP, tmp_path)
    assert (per_sample(out, expected) <= 4 * floor).all(), floor


@pytest.mark.slow
def test_clip_at_full_size(tmp_path):
    out, expected, floor = clip(_FULL, tmp_path)
    assert (per_sample(out, expected) <= 4 * floor).all(), floor


def test_t5(tmp_path):
    """40 tokens, so that distant positions share a bucket; the second caption ends after 11."""
    model = build("transformers", "T5EncoderModel", **_T5)
    ids = np.random.default_rng(1).integers(3, 80, (2, 40)).astype(np.int32)
    mask = np.arange(40)[None] < np.array([[40], [11]])
    component = load_component(saved(model, tmp_path))
    assert component.kind == "text"
    given = dict(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long())
    expected, floor = both(model, lambda model, _: model(**given).last_hidden_state)
    run = jax.jit(T5Encoder(component.config).apply, compiler_options=QUICK)
    with jax.default_matmul_precision("highest"):
        out = np.asarray(run({"params": component.params}, ids, mask))
    keep = mask[..., None]
    assert (per_sample(out * keep, expected * keep) <= 4 * floor).all(), floor
