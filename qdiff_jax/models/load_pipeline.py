"""A published pipeline from its files: native checkpoints first, folders in diffusers' layout second.

Every part may lie in the model's own file or folder (a whole CompVis checkpoint, a diffusers pipeline), or
be given apart. Places are local paths, paths in a cache folder, or `hub:OWNER/REPO[/FILE]` (`eval.hub`).
Names are mapped by the tables of `models.port`, strict both ways.
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
from collections.abc import Mapping

import numpy as np

from qdiff_jax.eval.hub import PREFIX
from qdiff_jax.eval.networks.state_dict import fingerprint
from qdiff_jax.models import registry
from qdiff_jax.models.autoencoder import AutoencoderConfig
from qdiff_jax.models.clip import TextConfig
from qdiff_jax.models.clip_tokenizer import load_tokenizer
from qdiff_jax.models.families import model_json
from qdiff_jax.models.miniature_pipelines import miniature_pipeline
from qdiff_jax.models.pipeline import FirstStage, Pipeline, TextEncoder, conditions
from qdiff_jax.models.places import Place, beside, find_place, part_of
from qdiff_jax.models.port import pixart
from qdiff_jax.models.port.clip import text_params
from qdiff_jax.models.port.first_stage import first_stage_params
from qdiff_jax.models.port.t5 import t5_config, t5_params
from qdiff_jax.models.published import PUBLISHED, Published
from qdiff_jax.models.released_layouts import parameters, read_network
from qdiff_jax.models.t5_tokenizer import load_t5_tokenizer
from qdiff_jax.runtime.state_dicts import load_config, load_state_dict

_STAGE_IN_MODEL, _TEXT_IN_MODEL = "first_stage_model.", "cond_stage_model.transformer."


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a published pipeline is made of, beside its model's place.

    network: a name of `published.PUBLISHED`; "" for a model of this project (shipped, trained, random).
    average: use the moving averages that the model's file holds beside the weights, instead of the weights; a
    released file that holds averages alone is loaded with False. first_stage, text, vocabulary: places of the
    other parts; "" where the model's own file or folder has them. folder: where relative places are looked
    for besides the working directory.
    """

    network: str = ""
    average: bool = False
    first_stage: str = ""
    text: str = ""
    vocabulary: str = ""
    folder: str = ""


def load_pipeline(
    model: str, parts: Parts = Parts(), diffusion: registry.DiffusionModel | None = None
) -> Pipeline:
    """The pipeline of a model: `registry.load`'s models by their names, published ones from their files.

    Args:
      model: the name of a model of this project, or the place of a published network or pipeline.
      diffusion: use this network (one from a bundle, say) and read the other parts alone.

    Raises ValueError for an unknown network, a place where nothing is, a file of another family, a part that
    is missing or does not fit its network, or parts given to a model that has none.
    """
    if not parts.network:
        return _own(model, parts, diffusion)
    if parts.network not in PUBLISHED:
        near = difflib.get_close_matches(parts.network, PUBLISHED, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"no published network is called {parts.network!r}; there are {', '.join(PUBLISHED)}.{hint}"
        )
    row = PUBLISHED[parts.network]
    need = f"{parts.network} ({row.origin})"
    place = find_place(model, parts.folder, f"the model {need}")
    _check_parts(row, parts)
    if diffusion is not None:
        _check_network(row, diffusion, parts.network)
    path = part_of(place, ("unet", "transformer"), "network") if place.is_pipeline else place.path
    read = read_network(path, row.network, parts.network, average=parts.average)
    whole = None if place.is_pipeline else read.whole
    # The smallest first: what is missing is said before the network is read.
    stage = _first_stage(row, place, whole, parts)
    text = None if row.text is None else _text(row, place, whole, parts)
    others = {"first_stage_sha256": stage, "text_sha256": text}
    digests = {name: fingerprint(part.params) for name, part in others.items() if part is not None}
    if diffusion is None:
        params = parameters(read, row.network, path)
        source = {"name": parts.network, "sha256": fingerprint(params), "schedule": row.schedule}
        diffusion = registry.assembled(row.network, params, source)
    made = _checked(Pipeline(diffusion, stage, text, digests), model)
    # diffusers encodes the empty prompt, and reads it under its own mask.
    if not row.null_caption or read.layout != "native":
        return made
    if row.null_caption == "learned":
        return made._replace(null_caption=pixart.null_caption(read.tensors, path))
    return made._replace(null_caption=conditions(made, [""])["context"][0])


def _own(model: str, parts: Parts, diffusion: registry.DiffusionModel | None) -> Pipeline:
    given = [
        name for name in ("first_stage", "text", "vocabulary", "average") if getattr(parts, name)
    ]
    if given:
        raise ValueError(
            f"{given[0]} is given without a network; name the published network that it belongs to "
            f"(such as {next(iter(PUBLISHED))!r}), or leave it out."
        )
    if diffusion is None and not model.startswith(registry.RANDOM):
        diffusion = registry.load(model)
        sizes = diffusion.config
        if sizes["num_classes"] is None and (sizes.get("context_dim") or sizes.get("caption_dim")):
            raise ValueError(
                f"{model} is a network that reads prompts, and has no text encoder beside it: name the "
                "published network of its pipeline as parts.network."
            )
        return Pipeline(diffusion)
    if not model.startswith(registry.RANDOM):
        return Pipeline(diffusion)
    registry.load(model)  # an unknown name is refused there
    pipeline = miniature_pipeline(model)
    return (
        pipeline if diffusion is None else _checked(pipeline._replace(diffusion=diffusion), model)
    )


def _checked(pipeline: Pipeline, model: str) -> Pipeline:
    channels = pipeline.latent_shape[-1]
    stage = pipeline.first_stage
    if stage is not None and stage.config.embed_dim != channels:
        raise ValueError(
            f"the network draws latents of {channels} channels and the first stage of {model} takes "
            f"{stage.config.embed_dim}; they belong to different models."
        )
    return pipeline


def _check_network(row: Published, diffusion: registry.DiffusionModel, network: str) -> None:
    name = diffusion.source["name"]
    if diffusion.config != model_json(row.network) or (name in PUBLISHED and name != network):
        raise ValueError(
            f"the bundle holds a network made of {name}, and the other parts are asked for of {network}: name "
            "the bundle's own network as parts.network."
        )


def _check_parts(row: Published, parts: Parts) -> None:
    for name, has in (
        ("first_stage", row.first_stage),
        ("text", row.text),
        ("vocabulary", row.text),
    ):
        if getattr(parts, name) and has is None:
            raise ValueError(f"{parts.network} has no {name}; leave {name} empty.")


def _first_stage(
    row: Published, place: Place, whole: Mapping | None, parts: Parts
) -> FirstStage | None:
    config: AutoencoderConfig | None = row.first_stage
    if config is None:
        return None
    if whole is not None and "scale_factor" in whole:
        scale = float(np.asarray(whole["scale_factor"]))
        config = dataclasses.replace(config, scale_factor=scale)
    elif row.scale_in_file:
        config = dataclasses.replace(config, scale_factor=_scale_beside(place, parts))
    if parts.first_stage:
        at = find_place(parts.first_stage, parts.folder, f"the first stage of {parts.network}")
        path = part_of(at, ("vae", "vqvae"), "first stage") if at.is_pipeline else at.path
        tensors = load_state_dict(path)
    elif whole is None:
        path = part_of(place, ("vae", "vqvae"), "first stage")
        tensors = load_state_dict(path)
    elif any(key.startswith(_STAGE_IN_MODEL) for key in whole):
        path, tensors = place.path, whole
    else:
        raise ValueError(
            f"{place.path} has no first stage, and {parts.network} draws latents; give the place of its "
            "autoencoder as first_stage."
        )
    params, config = first_stage_params(tensors, config, path)
    return FirstStage(config, params)


def _scale_beside(place: Place, parts: Parts) -> float:
    """The scale factor from the config of a diffusers pipeline's first stage."""
    if place.is_pipeline:
        fields = load_config(part_of(place, ("vae", "vqvae"), "first stage"))
        if "scaling_factor" in fields:
            return float(fields["scaling_factor"])
    raise ValueError(
        f"{place.path} has no scale_factor, by which {parts.network} multiplies its latents and which every "
        "training run measured for itself: take the whole checkpoint."
    )


def _text(row: Published, place: Place, whole: Mapping | None, parts: Parts) -> TextEncoder:
    clip = isinstance(row.text, TextConfig)
    if parts.text:
        at = find_place(parts.text, parts.folder, f"the text encoder of {parts.network}")
        path = part_of(at, ("text_encoder",), "text encoder") if at.is_pipeline else at.path
    elif whole is None:
        at, path = place, part_of(place, ("text_encoder",), "text encoder")
    elif clip and any(key.startswith(_TEXT_IN_MODEL) for key in whole):
        at, path = place, place.path
    else:
        raise ValueError(
            f"{place.path} has no text encoder, and {parts.network} reads prompts; give the place of its "
            f"{'CLIP' if clip else 'T5'} as text."
        )
    vocabulary = _vocabulary(at, parts, clip)
    if clip:
        tokenizer = load_tokenizer(vocabulary)
        symbols, config, length = len(tokenizer.ids), row.text, row.network.context_length
    else:
        tokenizer = load_t5_tokenizer(vocabulary)
        config, length = t5_config(load_config(path), path), row.network.caption_length
        symbols = tokenizer.vocab_size()
    width = config.tower.width if clip else config.width
    wanted = row.network.context_dim if clip else row.network.caption_dim
    if width != wanted or (clip and symbols != config.vocabulary) or symbols > config.vocabulary:
        raise ValueError(
            f"{path} gives {width} features of {config.vocabulary} tokens, the vocabulary {vocabulary} has "
            f"{symbols} symbols, and {parts.network} reads {wanted} features; they belong to different models."
        )
    tensors = whole if whole is not None and path == place.path else load_state_dict(path)
    params = (text_params if clip else t5_params)(tensors, config, path)
    return TextEncoder(config, params, tokenizer, length)


def _vocabulary(at: Place, parts: Parts, clip: bool) -> pathlib.Path:
    files = ("vocab.json", "merges.txt") if clip else ("spiece.model",)
    if parts.vocabulary:
        need = f"the vocabulary of {parts.network}"
        if parts.vocabulary.startswith(PREFIX):
            return find_place(parts.vocabulary, "", need, files=files).path
        return find_place(parts.vocabulary, parts.folder, need).path
    found = beside(at, files)
    if found is None:
        what = (
            "vocab.json and merges.txt, or bpe_simple_vocab_16e6.txt.gz" if clip else "spiece.model"
        )
        raise ValueError(
            f"{parts.network} reads prompts, and there is no vocabulary beside {at.path}: give the place of "
            f"{what} as vocabulary."
        )
    return found
