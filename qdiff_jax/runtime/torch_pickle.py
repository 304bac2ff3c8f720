"""The pickle inside a PyTorch checkpoint, read without torch and without running anything it names.

Unpickling calls whatever functions the file names. Here every global is looked up in a short table of
harmless functions, and any other becomes an `Unknown`: a record of what was asked for, which does
nothing.

Format: torch/_utils.py and torch/_tensor.py of PyTorch 2.13 (`_rebuild_tensor_v2` and its relatives).
"""

from __future__ import annotations

import collections
import pickle
import pickletools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from qdiff_jax.runtime.torch_storages import (
    DTYPES,
    STORAGES,
    Deferred,
    Dtype,
    Later,
    NotRead,
    Storage,
    storage_values,
)


class Unknown:
    """Stands for an object of a class that is not rebuilt; holds what the pickle said about it.

    Attributes:
      path: "module.name" of the class or function in the file.
      args, kwargs: what it was to be called with.
      state: what its attributes were to be set from, or None.
      items: what was to be stored into it.
    """

    path = "?"

    def __new__(cls, *args, **kwargs):
        self = object.__new__(cls)
        self.args, self.kwargs, self.state, self.items = args, kwargs, None, []
        return self

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        self.items.append((key, value))

    def append(self, value):
        self.items.append(value)

    extend = append
    add = append

    def __repr__(self):
        return f"<{self.path}, not rebuilt>"


class _Parameter(Unknown):
    """A parameter as torch before 0.4 saved it, an object around its tensor; `unpickle` leaves the tensor."""

    path = "torch.nn.parameter.Parameter"


def _rebuild_tensor(storage, offset, size, stride, *_unused):
    """A view of the storage, refused where it would reach beyond it; of one read later, a `Deferred`."""
    values = storage.values
    if values is None:
        return None
    later = isinstance(values, Later)
    count = values.count if later else len(values)
    size, stride = tuple(map(int, size)), tuple(map(int, stride))
    if len(size) != len(stride) or min((offset, *size, *stride), default=0) < 0:
        raise ValueError(f"impossible tensor: size {size}, stride {stride}, offset {offset}")
    if 0 not in size and offset + sum((n - 1) * s for n, s in zip(size, stride)) >= count:
        raise ValueError(f"a tensor of size {size} reaches beyond its {count} values")
    if later:
        return Deferred(size, storage.dtype, lambda: _view(values.read(), offset, size, stride))
    return _view(values, offset, size, stride)


def _view(values, offset, size, stride):
    if 0 in size:
        return np.zeros(size, values.dtype)
    steps = tuple(step * values.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(values[offset:], size, steps, writeable=False)


def _rebuild_tensor_v2(storage, offset, size, stride, _grad, _hooks, bits=None):
    """bits: {"neg": ..., "conj": ...}, whether the values are to be negated or conjugated, which torch
    leaves undone until they are used, and undone in the file too."""
    tensor = _rebuild_tensor(storage, offset, size, stride)
    unknown = sorted(set(bits or {}) - set(_BITS))
    if unknown:
        raise NotRead(f"tensors marked {unknown[0]!r} are not supported; save them anew without it")
    functions = [_BITS[name] for name, is_set in (bits or {}).items() if is_set]
    if tensor is None or not functions:
        return tensor
    if isinstance(tensor, Deferred):
        return tensor._replace(read=lambda: _applied(functions, tensor.read()))
    return _applied(functions, tensor)


_BITS = {"neg": np.negative, "conj": np.conjugate}


def _applied(functions, values):
    for function in functions:
        values = np.asarray(function(values))
    values.flags.writeable = False
    return values


def _rebuild_tensor_v3(storage, offset, size, stride, _grad, _hooks, dtype, bits=None):
    """Tensors whose storage is bytes and whose dtype stands beside it."""
    if not isinstance(dtype, Dtype):
        raise NotRead(
            f"tensors of {getattr(dtype, 'path', dtype)} are not supported; save them as float32"
        )

    def typed(values):
        return storage_values(values.tobytes(), dtype.name, _NATIVE_ORDER)

    values = storage.values
    if isinstance(values, Later):
        count = values.count // np.dtype(DTYPES[dtype.name]).itemsize
        values = Later(count, lambda: typed(storage.values.read()))
    elif values is not None:
        values = typed(values)
    return _rebuild_tensor_v2(
        Storage(dtype.name, values), offset, size, stride, _grad, _hooks, bits
    )


_NATIVE_ORDER = "little" if np.dtype("<i4") == np.dtype("i4") else "big"


def _first(value, *_unused):
    return value


def _as_called(function, _type, args, _state=None):
    """A tensor with attributes of its own: the tensor without them. What `function` may be, `_GLOBALS` says."""
    return function(*args)


def _size(values=()):
    return tuple(values)


def _encoded(text, encoding="latin1"):
    if encoding != "latin1":
        raise ValueError(f"unknown encoding {encoding!r}")
    return text.encode("latin1")


class _Function(NamedTuple):
    """A function of the table, wrapped because a pickle may set the attributes of a plain one."""

    call: Callable

    def __call__(self, *args):
        return self.call(*args)


_GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch.Size": _Function(_size),
    "torch._utils._rebuild_tensor": _Function(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": _Function(_rebuild_tensor_v2),
    "torch._utils._rebuild_tensor_v3": _Function(_rebuild_tensor_v3),
    "torch._utils._rebuild_parameter": _Function(_first),
    "torch._utils._rebuild_parameter_with_state": _Function(_first),
    "torch._tensor._rebuild_from_type_v2": _Function(_as_called),
    "torch.nn.parameter.Parameter": _Parameter,
    "torch.storage.UntypedStorage": Dtype("uint8"),
    "_codecs.encode": _Function(_encoded),
    **{f"torch.{name}": Dtype(dtype) for name, dtype in STORAGES.items()},
    **{f"torch.{name}": Dtype(name) for name in DTYPES},
    **{
        f"{module}.{container.__name__}": container
        for module in ("builtins", "__builtin__")
        for container in (set, frozenset, complex, dict, list)
    },
}


class _Unpickler(pickle.Unpickler):
    """Subclassing is how the standard library lets a reader refuse globals."""

    def __init__(self, file, storage: Callable[[tuple], Storage]):
        super().__init__(file, encoding="utf-8")
        self._storage = storage
        self._unknown: dict[str, type] = {}

    def find_class(self, module: str, name: str):
        path = f"{module}.{name}"
        if path in _GLOBALS:
            return _GLOBALS[path]
        if path not in self._unknown:
            self._unknown[path] = type("Unknown", (Unknown,), {"path": path})
        return self._unknown[path]

    def persistent_load(self, pid):
        # Sequences of pickles keep the source code of a whole module beside its class.
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]
        return self._storage(pid)


def unpickle(file, storage: Callable[[tuple], Storage]) -> Any:
    """Reads one pickle from a binary file and leaves the position behind it.

    storage: gives the values for a reference to a storage, the tuple that torch wrote. May raise
    whatever `pickle` raises on a broken file.
    """
    with warnings.catch_warnings():
        # Python warns of backslashes before odd letters, which only a broken file has.
        warnings.simplefilter("ignore", DeprecationWarning)
        _check_memo(file)
        return _without_parameters(_Unpickler(file, storage).load())


def _without_parameters(value: Any, depth: int = 3) -> Any:
    """State dicts lie at the top, in an entry of it or in a list of such."""
    if isinstance(value, _Parameter) and value.args:
        return value.args[0]
    if depth and isinstance(value, dict | list):
        for key, held in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(held, _Parameter | dict | list):
                value[key] = _without_parameters(held, depth - 1)
    return value


def _check_memo(file) -> None:
    """The C unpickler makes room for twice the highest number that an object is stored under: ten bytes
    may ask for gigabytes. Picklers count from 0, so that no number is beyond that of the bytes before it."""
    start = file.tell()
    for opcode, number, place in pickletools.genops(file):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and number > place - start:
            raise pickle.UnpicklingError(
                f"an object is stored under the impossible number {number}"
            )
    file.seek(start)
