"""The state dicts in a checkpoint of torch: itself, an entry, or several entries of which one is meant."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from qdiff_jax.runtime.torch_files import load_torch
from qdiff_jax.runtime.torch_pickle import Unknown
from qdiff_jax.runtime.torch_storages import Deferred

# Where checkpoints of training keep their weights ("" is the file itself), and the averages of these.
WEIGHTS, AVERAGES = ("", "state_dict", "model"), ("ema", "state_dict_ema")


def torch_state_dict(path: pathlib.Path, entry: str | None) -> Mapping[str, Deferred]:
    """The state dict under `entry`; None: as `state_dicts.load_state_dict`, whose errors these are."""
    checkpoint = _torch_mapping(path)
    inside = _entries(checkpoint)
    wanted = "state_dict" if entry is None else entry
    if wanted in inside:
        return checkpoint[wanted]
    if wanted in checkpoint and not isinstance(checkpoint[wanted], Deferred):
        # Else another entry, such as the moving average, would be taken in its place unsaid.
        raise ValueError(f"{path}: {no_state_dict(wanted, checkpoint[wanted])}.")
    if entry is not None:
        raise ValueError(
            f"{path} has no state dict under {entry!r}; it has {', '.join(map(repr, inside)) or 'none'}."
        )
    if _is_state_dict(checkpoint):
        return checkpoint
    if len(inside) == 1:
        return checkpoint[inside[0]]
    if inside:
        raise ValueError(
            f"{path} should hold one state dict (named tensors) and has several "
            f"({', '.join(map(repr, inside))}): say which as `entry`, or save it in a file of its own."
        )
    raise ValueError(_none_inside(path, checkpoint))


class TorchEntries(NamedTuple):
    """found: the state dicts of a file by their entries, "" where the file itself is one. odd: what else lies
    under a name of `WEIGHTS` or `AVERAGES`, as `no_state_dict` says it."""

    found: dict[str, Mapping[str, Deferred]]
    odd: dict[str, str]


def torch_state_dicts(path: pathlib.Path) -> TorchEntries:
    """All the state dicts of a file. Raises ValueError if there is none."""
    checkpoint = _torch_mapping(path)
    if _is_state_dict(checkpoint):
        return TorchEntries({"": checkpoint}, {})
    found = {entry: checkpoint[entry] for entry in _entries(checkpoint)}
    odd = {
        name: no_state_dict(name, checkpoint[name])
        for name in (*WEIGHTS, *AVERAGES)
        if name not in found and isinstance(checkpoint.get(name), Mapping | Unknown)
    }
    if not found:
        raise ValueError(
            f"{path}: {next(iter(odd.values()))}." if odd else _none_inside(path, checkpoint)
        )
    return TorchEntries(found, odd)


def _none_inside(path: pathlib.Path, checkpoint: Mapping) -> str:
    near = [k for k, v in checkpoint.items() if isinstance(v, Mapping) and _has_tensors(v)]
    what = f"in {near[0]!r} {_odd(checkpoint[near[0]])}" if near else _odd(checkpoint)
    return f"{path} should hold one state dict (named tensors) and has none: {what}."


def no_state_dict(entry: str, value: Any) -> str:
    """Why what lies under an entry is no state dict, without a full stop."""
    return f"{entry!r} is no state dict (named tensors): {_odd(value)}"


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
    return f"a value of type {type(value).__name__}"


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
