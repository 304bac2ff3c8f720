"""Named tensors of any published weights file, left in the file until each is asked for.

A file is known by its content, not by its name: safetensors, or what `torch.save` wrote (a zip archive
or the older sequence of pickles). A folder is one of Hugging Face's, with its weights in one file or in
shards. Nothing in a file is run (`runtime.torch_files`).

Source: the layouts are those of huggingface_hub 1.0 (`constants.py`) and safetensors 0.6.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes  # noqa: F401 - safetensors reads bfloat16 only where NumPy knows that type
import numpy as np
from safetensors import SafetensorError, safe_open

from qdiff_jax.runtime.not_weights import refuse_other_files
from qdiff_jax.runtime.torch_files import is_safetensors, is_torch
from qdiff_jax.runtime.torch_state_dicts import torch_state_dict, torch_state_dicts
from qdiff_jax.runtime.torch_storages import Deferred

# What Hugging Face calls the weights in a model's folder; the first one there is taken.
FOLDER_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Types that are widened to float32 when read; float64 and integers stay as they are.
_NARROW = ("float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file: `np.asarray(tensor)` reads it, anew each time. Half precision becomes float32."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        values = self.read()
        return values.astype(dtype or self.dtype, copy=bool(copy))


def load_state_dict(path, entry: str | None = None) -> dict[str, LazyTensor]:
    """The named tensors of a weights file or of a model's folder; only names and shapes are read.

    Args:
      path: a file of safetensors or of `torch.save`, an index of shards (`*.index.json`), or a folder
        with one of `FOLDER_FILES`.
      entry: which state dict of a checkpoint that holds several, such as "ema" or "model". None: the one
        under "state_dict", else the checkpoint itself, else the only one it has.

    A prefix "module.", as data parallelism leaves it on every name, is taken off.

    Raises:
      ValueError: nothing there, a damaged or truncated file, text or a pointer in place of weights, a
        missing shard, no state dict or several. Reading a tensor of a damaged archive raises, too.
    """
    path, kind = _place(path)
    if kind == "index":
        return _sharded(path, entry)
    if kind == "torch":
        return _named(_lazy_all(torch_state_dict(path, entry)))
    if entry is not None:
        raise ValueError(f"{path} is a safetensors file and has no entry {entry!r}; leave it out.")
    return _named(_safetensors(path))


class StateDicts(NamedTuple):
    """found: tensors by entry, "" where the file itself is a state dict. odd: of the names in
    `torch_state_dicts.WEIGHTS` and `AVERAGES`, those with something else under them: what, in words."""

    found: dict[str, dict[str, LazyTensor]]
    odd: Mapping[str, str]


def state_dicts_in(path) -> StateDicts:
    """All the state dicts of a weights file or folder.

    path, prefixes and what raises: as of `load_state_dict`, but that there may be several.
    """
    place, kind = _place(path)
    if kind != "torch":
        return StateDicts({"": load_state_dict(place)}, {})
    found, odd = torch_state_dicts(place)
    return StateDicts({entry: _named(_lazy_all(tensors)) for entry, tensors in found.items()}, odd)


def _place(path) -> tuple[pathlib.Path, str]:
    """The file of `path`, which may be a folder, and how it is read: "index", "safetensors" or "torch"."""
    path = pathlib.Path(path)
    if path.is_dir():
        path = _file_of_folder(path)
    if not path.is_file():
        raise ValueError(f"there is no weights file {path}; check the path.")
    if path.name.endswith(".index.json"):
        return path, "index"
    with open(path, "rb") as file:
        head = file.read(512)
    refuse_other_files(head, path)
    # By its name only where the content does not tell: a damaged file.
    named = path.suffix == ".safetensors" and not is_torch(head)
    return path, "safetensors" if is_safetensors(head) or named else "torch"


def _named(found: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    if found and all(key.startswith("module.") for key in found):
        found = {key.removeprefix("module."): tensor for key, tensor in found.items()}
    return found


def load_config(folder) -> dict[str, Any]:
    """The `config.json` of a model's folder (or the file itself).

    Raises ValueError: it is not there or is no JSON object.
    """
    path = pathlib.Path(folder)
    path = path / "config.json" if path.is_dir() else path
    return _json(path, "a model's folder of Hugging Face has one beside its weights")


def check_fields(fields: Mapping[str, Any], names: Iterable[str], source: object) -> None:
    """Raises one ValueError, naming `source`, that lists the `names` which a config does not have."""
    lacking = [name for name in names if name not in fields]
    if lacking:
        raise ValueError(
            f"{source} lacks {', '.join(lacking)}: it is cut or of another kind of model; download it again."
        )


def _json(path: pathlib.Path, hint: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no {path}: {hint}.")
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged or no JSON ({error}); download it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__} where a JSON object belongs.")
    return found


def _file_of_folder(folder: pathlib.Path) -> pathlib.Path:
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    if (folder / "model_index.json").is_file():
        parts = sorted(part.name for part in folder.iterdir() if (part / "config.json").is_file())
        raise ValueError(
            f"the folder {folder} is a whole pipeline; give the folder of one network in it: "
            f"{', '.join(parts)}."
        )
    others = sorted(file.name for file in folder.iterdir() if file.is_file())
    raise ValueError(
        f"the folder {folder} has none of {', '.join(FOLDER_FILES)}; it has {', '.join(others) or 'no file'}"
        " (give a file by its own path to read another)."
    )


def _sharded(path: pathlib.Path, entry: str | None) -> dict[str, LazyTensor]:
    places = _json(path, "check the path").get("weight_map")
    if not isinstance(places, Mapping) or not places:
        raise ValueError(f"{path} has no weight_map; download it again.")
    names = sorted(set(places.values()))
    for name in names:
        if not isinstance(name, str) or pathlib.PurePath(name).name != name:
            raise ValueError(f"{path} names the shard {name!r}, which is no file beside it.")
        if name.endswith(".index.json"):
            raise ValueError(f"{path} names the index {name!r} as a shard; download it again.")
    absent = [name for name in names if not (path.parent / name).is_file()]
    if absent:
        raise ValueError(
            f"{len(absent)} of the {len(names)} shards that {path.name} names are not in {path.parent}: "
            f"{', '.join(absent)}; download them."
        )
    shards = {name: load_state_dict(path.parent / name, entry) for name in names}
    lacking = [key for key, name in places.items() if key not in shards[name]]
    extra = [key for name, shard in shards.items() for key in shard if places.get(key) != name]
    if lacking or extra:
        raise ValueError(
            f"{path} and its shards disagree in {len(lacking) + len(extra)} tensors, such as "
            f"{(lacking + extra)[0]}; download them again."
        )
    return {key: shards[name][key] for key, name in places.items()}


def _safetensors(path: pathlib.Path) -> dict[str, LazyTensor]:
    found = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():
                part = file.get_slice(key)
                dtype = part.get_dtype()
                if dtype not in _DTYPES:
                    raise ValueError(f"{path} stores {key} as {dtype}, which is not read.")
                read = functools.partial(_read_safetensors, path, key)
                found[key] = _lazy(part.get_shape(), _DTYPES[dtype], read)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({error}); download or copy it again."
        ) from error
    return found


def _read_safetensors(path: pathlib.Path, key: str) -> np.ndarray:
    # Opened for each tensor: a mapping that stays open keeps every page once read in memory.
    with safe_open(path, framework="numpy") as file:
        return file.get_tensor(key)


# The dtypes of safetensors by NumPy's names.
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def _lazy_all(found: Mapping[str, Deferred]) -> dict[str, LazyTensor]:
    return {key: _lazy(tensor.shape, tensor.dtype, tensor.read) for key, tensor in found.items()}


def _lazy(shape, dtype: str, read: Callable[[], np.ndarray]) -> LazyTensor:
    return LazyTensor(tuple(shape), np.dtype("float32" if dtype in _NARROW else dtype), read)


def to_device(tree: dict) -> dict:
    """Moves the leaves of a nested dict of arrays to the default device, one at a time, and empties `tree`.

    So that the arrays of the file and those of the device never lie in memory both at once.
    """
    moved = {}
    for name in list(tree):
        node = tree.pop(name)
        moved[name] = to_device(node) if isinstance(node, dict) else jnp.array(node)
    return moved
