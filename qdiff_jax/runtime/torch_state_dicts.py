"""The state dicts in a checkpoint of torch: itself, an entry, or several entries of which one is meant."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from qdiff_jax.runtime.torch_files import load_torch
from qdiff_jax.runtime.torch_pickle import Deferred, Unknown

# Where checkpoints of training keep their weights ("" is the file itself), and the averages of these.
WEIGHTS, AVERAGES = ("", "state_dict", "model"), ("ema", "state_dict_ema")
NAMES = (*WEIGHTS, *AVERAGES)


def torch_state_dict(path: pathlib.Path, entry: str | None) -> Mapping[str, Deferred]:
    """The state dict under `entry`; None: as `state_dicts.load_state_dict`, whose errors these are."""
    checkpoint = _torch_mapping(path)
    inside = _entries(checkpoint)
    wanted = "state_dict" if entry is None else entry
    if (
        wanted in checkpoint
        and wanted not in inside
        and not isinstance(checkpoint[wanted], Deferred)
    ):
        # Else another entry, such as the moving average, would be taken in its place unsaid.
        raise ValueError(
            f"{path}: {wanted!r} is no state dict (named tensors): {_odd(checkpoint[wanted])}."
        )
    if entry is None and "state_dict" in inside:
        entry = "state_dict"
    if entry is None and _is_state_dict(checkpoint):
        found = checkpoint
    elif entry is not None and entry not in inside:
        raise ValueError(
            f"{path} has no state dict under {entry!r}; it has {', '.join(map(repr, inside)) or 'none'}."
        )
    elif entry is None and len(inside) != 1:
        if inside:
            what = (
                f"several ({', '.join(map(repr, inside))}): say which as `entry`, or save it in a file of "
                "its own"
            )
        else:
            near = [k for k, v in checkpoint.items() if isinstance(v, Mapping) and _has_tensors(v)]
            what = f"none: {_odd(checkpoint)}"
            if near:
                what = f"none: in {near[0]!r} {_odd(checkpoint[near[0]])}"
        raise ValueError(f"{path} should hold one state dict (named tensors) and has {what}.")
    else:
        found = checkpoint[entry if entry is not None else inside[0]]
    return found


def torch_state_dicts(path: pathlib.Path) -> dict[str, Mapping[str, Deferred]]:
    """All the state dicts of a file by their entries, "" where the file itself is one.

    Raises ValueError if there is none, or for an entry of `NAMES` that has something else in it.
    """
    checkpoint = _torch_mapping(path)
    if _is_state_dict(checkpoint):
        return {"": checkpoint}
    inside = _entries(checkpoint)
    odd = [n for n in NAMES if n not in inside and isinstance(checkpoint.get(n), Mapping)]
    if odd or not inside:
        torch_state_dict(path, odd[0] if odd else None)  # raises, and says what there is
    return {entry: checkpoint[entry] for entry in inside}


def _torch_mapping(path: pathlib.Path) -> Mapping:
    """What a file of torch holds, by names.

    A list as ermongroup/ddim saves in training, (model, optimizer, epoch, step[, averages]), gets names.
    """
    checkpoint = load_torch(path, later=True)
    if isinstance(checkpoint, list | tuple) and checkpoint and _is_state_dict(checkpoint[0]):
        names = ("model", "optimizer", "epoch", "step", "ema")
        if 4 <= len(checkpoint) <= len(names):
            return dict(zip(names, checkpoint))
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f"{path} holds {_kind(checkpoint)}, no state dict (named tensors); export one from the model."
        )
    return checkpoint


def _entries(checkpoint: Mapping) -> list:
    return [key for key, value in checkpoint.items() if _is_state_dict(value)]


def _kind(value: Any) -> str:
    if isinstance(value, Deferred):
        return "a lone tensor"
    if isinstance(value, Unknown):
        return f"a whole object of the class {value.path}"
    return f"a {type(value).__name__}"


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Deferred) for k, v in value.items())
    )


def _has_tensors(value: Mapping) -> bool:
    return any(isinstance(held, Deferred) for held in value.values())


def _odd(value: Any) -> str:
    """What keeps a value from being a state dict."""
    if not isinstance(value, Mapping):
        return f"it is {_kind(value)}"
    odd = [
        f"{key!r} is {_kind(held)}"
        for key, held in value.items()
        if not (isinstance(key, str) and isinstance(held, Deferred))
    ]
    if not odd:
        return "it is empty"
    rest = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
    return f"{', '.join(odd[:5])}{rest}; save it again with tensors only"
