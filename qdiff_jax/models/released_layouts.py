"""A published network in its file: in which layout it is written, and which of the file's state dicts it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qdiff_jax.models.families import model_json
from qdiff_jax.models.port import dit, pixart, unet_ddpm, unet_ldm, unet_ldm_diffusers
from qdiff_jax.models.port.looks import look_of
from qdiff_jax.runtime.state_dicts import StateDicts, state_dicts_in
from qdiff_jax.runtime.torch_state_dicts import AVERAGES, WEIGHTS

# family -> {layout, as `port.looks` calls it: parameters of its state dict}.
LAYOUTS: Mapping[str, Mapping[str, Callable]] = {
    "unet_ddpm": {"native": unet_ddpm.from_native, "diffusers": unet_ddpm.from_diffusers},
    "unet_ldm": {
        "CompVis": unet_ldm.from_native,
        "native": unet_ldm.from_native,
        "diffusers": unet_ldm_diffusers.from_diffusers,
    },
    "dit": {"native": dit.from_official, "diffusers": dit.from_diffusers},
    "pixart": {"native": pixart.from_official, "diffusers": pixart.from_diffusers},
}


class NetworkTensors(NamedTuple):
    """tensors: of the network, named as its layout names them. whole: the state dict that they are from, which
    may hold other parts of the pipeline."""

    tensors: Mapping
    layout: str
    whole: Mapping


def read_network(path: Any, config: Any, name: str, *, average: bool) -> NetworkTensors:
    """The weights of the network `name` with this config, or (average) their moving averages, from a file.

    Averages are a state dict of their own in training checkpoints, and further tensors in CompVis's.

    Raises ValueError for a file of another family, which is named, whatever is wrong with its entries; for a
    file without what is asked for, or with several that it may be; and as `state_dicts_in`.
    """
    entries = state_dicts_in(path)
    first = next(
        (n for n in (*WEIGHTS, *AVERAGES) if n in entries.found), next(iter(entries.found))
    )
    layout = _layout(entries.found[first], config, path, name)
    entry = _entry(entries, average, layout == "CompVis", path)
    whole = entries.found[entry]
    layout = _layout(whole, config, path, name)
    if layout != "CompVis":
        return NetworkTensors(whole, layout, whole)
    inside = average and entry not in AVERAGES
    tensors, _ = unet_ldm.unet_tensors(whole, config, ema=inside, source=path)
    return NetworkTensors(tensors, layout, whole)


def parameters(read: NetworkTensors, config: Any, path: Any) -> dict:
    """Parameters of the network. Raises ValueError as the strict port of its layout."""
    return LAYOUTS[_family(config)][read.layout](read.tensors, config, path)


def _entry(entries: StateDicts, average: bool, holds_averages: bool, path: Any) -> str:
    """The entry that is asked for. holds_averages: among the tensors of the weights."""
    found, odd = entries
    weights = [name for name in WEIGHTS if name in found]
    averages = [name for name in AVERAGES if name in found]
    if not weights and not averages and len(found) == 1 and not odd:
        weights = list(found)
    asked = averages if average else weights
    names = ", ".join(map(repr, found))
    if average and not averages and holds_averages:
        asked = weights
    if len(asked) == 1:
        return asked[0]
    if asked:
        raise ValueError(
            f"{path} has several state dicts that may be meant ({', '.join(map(repr, asked))}); save the one "
            "that is in a file of its own."
        )
    for name in AVERAGES if average else WEIGHTS:
        if name in odd:
            raise ValueError(f"{path}: {odd[name]}.")
    if not average and averages:
        raise ValueError(
            f"{path} holds moving averages ({', '.join(map(repr, averages))}) and no weights that are known "
            "here beside them: set average=True."
        )
    if average and len(found) == 1:
        raise ValueError(
            f"{path} holds one set of weights and no moving averages: take the whole checkpoint, or set "
            "average=False if these are the averages."
        )
    known = AVERAGES if average else WEIGHTS[1:]
    raise ValueError(
        f"{path} has several state dicts ({names}), none of them under {' or '.join(map(repr, known))}; save "
        "the one that is meant in a file of its own."
    )


def _family(config: Any) -> str:
    return model_json(config)["family"]


def _layout(tensors: Mapping, config: Any, path: Any, name: str) -> str:
    """The layout of a state dict of the family. Raises ValueError if it is none, naming the one it is."""
    family, look = _family(config), look_of(tensors)
    if look is not None and family in look.families:
        return look.layout
    if any(key.startswith("model_ema.") for key in tensors):
        raise ValueError(
            f"{path} holds moving averages without their weights, and only beside the names of the weights "
            "can theirs be read; take the whole checkpoint."
        )
    if look is None:
        said = "has tensors of no network that is known here"
    elif look.families:
        said = f"is of the family {' or '.join(look.families)}: it looks like {look.text}"
    else:
        said = f"looks like {look.text}"
    raise ValueError(
        f"{path} {said} (such as {next(iter(tensors), 'none')}), and {name} is of the family {family}; give "
        "its file, or name the network that this file holds."
    )
