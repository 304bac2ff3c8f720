"""From a config file and its `:arg` to frozen dataclasses; the fingerprint that guards resuming.

A config file is a Python file with `get_config(arg)` that returns a `ml_collections.ConfigDict`.
It is turned into frozen dataclasses once, at the door (`to_dataclass`), where every misspelt or
missing key is an error; nothing below the experiments ever sees a ConfigDict.
"""

import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import json
import os
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections


class UnknownWordError(ValueError):
    """word: what stands behind a config's colon and is none of its words."""

    def __init__(self, message: str, word: str):
        super().__init__(message)
        self.word = word


def parse_arg(arg: str | None, **defaults) -> types.SimpleNamespace:
    """Reads the part behind the colon of `--config=configs/x.py:w4a8,smoke,seed=3`.

    Args:
      arg: comma-separated words, each `key=value` or bare; None or "" for the defaults.
      **defaults: the keys there are. A bool is a flag (bare: on); a tuple of strings is a choice,
        its first entry the default, and any entry can be written bare; an int, float or str takes
        `key=value`.

    Returns:
      A namespace with one attribute per key.

    Raises:
      ValueError: an unknown word (an `UnknownWordError`, with the nearest known one), or a value of the
        wrong type.

    Example:
      parse_arg("w8a8,smoke", bits=("w4a8", "w8a8"), smoke=False, seed=0)
      -> namespace(bits="w8a8", smoke=True, seed=0)
    """
    values = {k: v[0] if isinstance(v, tuple) else v for k, v in defaults.items()}
    choices = {word: k for k, v in defaults.items() if isinstance(v, tuple) for word in v}
    for item in filter(None, (part.strip() for part in (arg or "").split(","))):
        key, equals, text = item.partition("=")
        if not equals and key in choices:
            values[choices[key]] = key
        elif not equals and isinstance(defaults.get(key), bool):
            values[key] = True
        elif equals and key in defaults:
            values[key] = _parse_value(key, text, defaults[key])
        elif key in defaults:
            raise ValueError(f"config argument {key!r} needs a value: write {key}=...")
        else:
            known = [*defaults, *choices]
            raise UnknownWordError(
                f"config argument {item!r} is not known{_suggest(key, known)}.", item
            )
    return types.SimpleNamespace(**values)


def _parse_value(key: str, text: str, default):
    if isinstance(default, tuple):
        if text not in default:
            raise ValueError(f"config argument {key}={text} must be one of {', '.join(default)}.")
        return text
    if isinstance(default, bool):
        words = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in words:
            raise ValueError(f"config argument {key}={text} must be true or false.")
        return words[text.lower()]
    try:
        return type(default)(text)
    except ValueError as error:
        raise ValueError(
            f"config argument {key}={text} must be of type {type(default).__name__}."
        ) from error


def load_config(path_with_arg: str, overrides: Mapping[str, Any] | None = None):
    """Imports a config file by path and returns its locked ConfigDict; needs no flags.

    Args:
      path_with_arg: `path/to/config.py` or `path/to/config.py:arg`.
      overrides: {"data.source": "synthetic:64"}: as `--config.data.source=...` on a command line.

    Raises:
      ValueError: no such file, no get_config in it, an unknown override.
    """
    path, _, arg = path_with_arg.partition(":")
    if not pathlib.Path(path).is_file():
        raise ValueError(f"there is no config file {path}.")
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no function get_config(arg).")
    takes_arg = bool(inspect.signature(module.get_config).parameters)
    if arg and not takes_arg:
        raise ValueError(f"{path} takes no argument, but {arg!r} was given.")
    config = module.get_config(arg or None) if takes_arg else module.get_config()
    known = flatten(config.to_dict())
    for name, value in (overrides or {}).items():
        if name not in known:
            raise ValueError(f"{path} has no key {name!r}{_suggest(name, known)}.")
        config.update_from_flattened_dict({name: value})
    return config.lock()


def to_dataclass(cls: type, values: Mapping, where: str = "config"):
    """Builds a (frozen) dataclass from a mapping, nested dataclasses included.

    Lists become tuples and ints become floats where the field says so; nothing else is converted.

    Raises:
      ValueError: an unknown key (with the nearest known one), a missing key, or a value of another
        type; the message names the key with its dotted path.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for name in values:
        if name not in fields:
            raise ValueError(f"{where}.{name} is not known{_suggest(name, fields)}.")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], f"{where}.{name}")
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}.{name} is missing; {cls.__name__} needs it.")
    return cls(**arguments)


def _convert(hint, value, where: str):
    origin, parameters = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parameters:
            return None
        options = [p for p in parameters if p is not type(None)]
        for option in options[:-1]:
            try:
                return _convert(option, value, where)
            except ValueError:
                continue
        return _convert(options[-1], value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a sub-dict, got {value!r}.")
        return to_dataclass(hint, value, where)
    if origin is tuple and isinstance(value, list | tuple):
        inner = [parameters[0]] * len(value) if parameters[-1] is Ellipsis else parameters
        if len(inner) != len(value):
            raise ValueError(f"{where} must have {len(inner)} entries, got {value!r}.")
        return tuple(_convert(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(inner, value)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = origin or hint
    wrong_bool = isinstance(value, bool) and plain in (int, float)
    if isinstance(plain, type) and (wrong_bool or not isinstance(value, plain)):
        name = getattr(plain, "__name__", str(hint))
        raise ValueError(f"{where} must be of type {name}, got {value!r}.")
    return value


def flatten(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> {"a.b.c": value}; an empty sub-dict keeps its own entry."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def as_json(config) -> dict:
    """A dataclass, ConfigDict or mapping as what JSON keeps of it: dicts, lists and scalars."""
    if dataclasses.is_dataclass(config):
        config = dataclasses.asdict(config)
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    return json.loads(json.dumps(config))


def fingerprint(config, ignore: tuple[str, ...] = ()) -> str:
    """SHA-256 (hex) of the config's canonical JSON: the same for any order of keys, on any machine.

    Args:
      config: dataclass, ConfigDict or mapping of JSON values.
      ignore: dotted names, or names of sub-dicts, that do not count.
    """
    text = json.dumps(_relevant(config, ignore), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _relevant(config, ignore) -> dict[str, Any]:
    flat = flatten(as_json(config))
    return {k: v for k, v in flat.items() if not any(f"{k}.".startswith(f"{i}.") for i in ignore)}


def claim_workdir(workdir, config, ignore: tuple[str, ...] = (), *, write: bool = True) -> bool:
    """Writes `workdir/config.json`, or checks that the one there is of the same experiment.

    Args:
      workdir: made if missing.
      config: dataclass, ConfigDict or mapping of JSON values. With a dataclass, an option that did
        not exist when config.json was written counts there with its default.
      ignore: names that may differ between a run and its resumption, as in `fingerprint`.
      write: False on all processes but one.

    Returns:
      Whether the workdir was in use already (hence: resume).

    Raises:
      ValueError: it holds another experiment; names the keys that differ.
    """
    folder = pathlib.Path(workdir)
    path = folder / "config.json"
    if path.exists():
        try:
            stored = json.loads(path.read_text())["config"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read; delete it or use another workdir.") from error
        stored = _with_defaults(stored, config)
        if fingerprint(stored, ignore) != fingerprint(config, ignore):
            raise ValueError(
                f"{folder} holds another experiment ({_differences(stored, config, ignore)}); "
                "use a new workdir, or set these back to resume it."
            )
        return True
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        record = {"fingerprint": fingerprint(config, ignore), "config": as_json(config)}
        draft = path.with_suffix(".partial")
        draft.write_text(json.dumps(record, indent=2) + "\n")
        os.replace(draft, path)
    return False


def _with_defaults(stored: dict, config) -> dict:
    """Options that came after `stored` was written count there with their defaults."""
    if not dataclasses.is_dataclass(config):
        return stored
    try:
        return as_json(to_dataclass(type(config), stored))
    except ValueError:
        return stored  # an option that has gone since: the comparison will name it


def _differences(stored, config, ignore, most: int = 6) -> str:
    old, new = _relevant(stored, ignore), _relevant(config, ignore)
    absent = "absent"
    names = [k for k in sorted(old | new) if old.get(k, absent) != new.get(k, absent)]
    shown = [f"{k}: {old.get(k, absent)} there, {new.get(k, absent)} now" for k in names[:most]]
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return "; ".join(shown + more)


def _suggest(word: str, known) -> str:
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}" if near else f"; known are {', '.join(known) or 'none'}"
