"""Pytrees of registered types as a JSON description plus named arrays, and back.

No pickle: each type has a codec under a name that is part of the file format, so that files can be
read without trusting them and a renamed Python class does not orphan them. A node is

    null | {"dict": {key: node}} | {"tensor": name} | {"type": codec name, "fields": {...}}

Children that are None are left out, and fields a description lacks take the default of the class,
so a class may gain fields with defaults without a new format.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.branch import LowRank, low_rank
from qdiff_jax.diffusion.corrections import AffineCorrection
from qdiff_jax.export.qtensor import QTensor, check_storage
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.quant.spec import QuantSpec, implied_zero_point
from qdiff_jax.quant.timed import TimeIndexed
from qdiff_jax.sites import Replacement, SiteQuant

DTYPES = ("float32", "float16", "int32", "int8", "uint8", "bool")


class Codec(NamedTuple):
    """How one type is described.

    encode(value, put) -> JSON fields, where put(field, child, kind=None) describes a child (its
    arrays are counted as `kind`, or as what surrounds it); decode(fields, get) -> value, where
    get(node) rebuilds a child. decode raises KeyError, TypeError or ValueError for wrong fields.
    """

    name: str
    cls: type
    encode: Callable[[Any, Callable], dict]
    decode: Callable[[dict, Callable], Any]


_BY_NAME: dict[str, Codec] = {}
_BY_CLASS: dict[type, Codec] = {}


def register(codec: Codec) -> None:
    """Add a type; its name can never be given to another type. Raises ValueError if it is taken."""
    if codec.name in _BY_NAME or codec.cls in _BY_CLASS:
        raise ValueError(
            f"the codec {codec.name!r} for {codec.cls.__name__} clashes with one registered "
            "before; register each type once, under a name of its own"
        )
    _BY_NAME[codec.name] = _BY_CLASS[codec.cls] = codec


def dataclass_codec(
    name: str,
    cls: type,
    children: Mapping[str, str | None],
    static: Mapping[str, tuple[Callable, Callable]] | None = None,
) -> Codec:
    """Codec of a dataclass by its fields.

    Args:
      name: of the codec, in the files for good. cls: the class, which may be renamed.
      children: fields that hold arrays or trees, and what their arrays are counted as (None: as
        what surrounds them).
      static: the other fields, each with (to JSON, from JSON).

    Raises:
      ValueError: children and static are not all fields of the class: one would be lost silently.
    """
    static = static or {}
    fields = {field.name for field in dataclasses.fields(cls)}
    if fields != {*children, *static}:
        raise ValueError(
            f"the codec of {cls.__name__} names {sorted({*children, *static})}, the class has "
            f"{sorted(fields)}: describe every field"
        )

    def encode(value, put):
        described = {}
        for field, counted_as in children.items():
            if getattr(value, field) is not None:
                described[field] = put(field, getattr(value, field), counted_as)
        for field, (to_json, _) in static.items():
            described[field] = to_json(getattr(value, field))
        return described

    def decode(described, get):
        unknown = sorted(set(described) - fields)
        if unknown:
            raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}")
        values = {
            field: get(item) if field in children else static[field][1](item)
            for field, item in described.items()
        }
        return cls(**values)

    return Codec(name, cls, encode, decode)


def encode_tree(tree: Any, name: str, kind: str) -> tuple[Any, dict[str, np.ndarray], dict]:
    """(description, arrays by name, kind by name) of a tree of dicts, arrays, registered types.

    Args:
      tree: the tree. name: its root in the names of the arrays. kind: what its arrays count as
        where no codec says otherwise.

    Raises:
      TypeError: something has no codec, or an array a dtype that a bundle does not hold; the
        message names the place. ValueError: two arrays would get one name.
    """
    arrays: dict[str, np.ndarray] = {}
    kinds: dict[str, str] = {}

    def walk(node, path, kind):
        if node is None:
            return None
        if type(node) is dict:
            if not all(isinstance(key, str) for key in node):
                raise TypeError(f"{path}: the keys of a stored dict must be strings")
            return {"dict": {key: walk(item, f"{path}/{key}", kind) for key, item in node.items()}}
        if isinstance(node, jax.Array | np.ndarray):
            if str(node.dtype) not in DTYPES:
                raise TypeError(
                    f"{path} is {node.dtype}; a bundle holds {', '.join(DTYPES)}: cast it first "
                    "(full-precision tensors to float32)"
                )
            if path in arrays:
                raise ValueError(f"two arrays would be stored as {path}; keep '/' out of the keys")
            arrays[path] = np.asarray(node, order="C")  # ascontiguousarray would make () into (1,)
            kinds[path] = kind
            return {"tensor": path}
        codec = _BY_CLASS.get(type(node))
        if codec is None:
            raise TypeError(
                f"{path} is a {type(node).__name__}, which a bundle cannot hold: finish it (decide "
                "codes, remove taps), or register a codec for it with export.encode.register"
            )

        def put(field, child, counted_as=None):
            return walk(child, f"{path}/{field}", counted_as or kind)

        return {"type": codec.name, "fields": codec.encode(node, put)}

    return walk(tree, name, kind), arrays, kinds


def decode_tree(node: Any, array: Callable[[str], np.ndarray]) -> Any:
    """The tree of a description; array(name) gives each tensor it refers to.

    Leaves come back as jax arrays. Raises ValueError for the first thing that is wrong with it.
    """
    if node is None:
        return None
    if isinstance(node, dict) and set(node) == {"dict"}:
        return {key: decode_tree(item, array) for key, item in node["dict"].items()}
    if isinstance(node, dict) and set(node) == {"tensor"}:
        return jnp.asarray(array(node["tensor"]))
    if not isinstance(node, dict) or set(node) != {"type", "fields"}:
        raise ValueError(f"{str(node)[:80]!r} is no description of a dict, a tensor or a type")
    codec = _BY_NAME.get(node["type"])
    if codec is None:
        raise ValueError(
            f"the type {node['type']!r} is not known: import the module that registers it, or use "
            "the version of qdiff_jax that wrote the description"
        )
    try:
        return codec.decode(node["fields"], lambda child: decode_tree(child, array))
    except (KeyError, TypeError) as error:
        raise ValueError(f"a {node['type']} is described wrongly ({error})") from error


def _same(value):
    return value


# Operators in place of a site's own, under names that are in the files for good.
OPERATORS = {"low_rank": low_rank}


def _operator_name(function: Callable) -> str:
    for name, known in OPERATORS.items():
        if known is function:
            return name
    raise TypeError(
        f"{getattr(function, '__name__', function)} is an operator that a bundle cannot hold; give it a "
        "name in export.encode.OPERATORS"
    )


_PLAIN = (_same, _same)
_SPEC = (dataclasses.asdict, lambda fields: QuantSpec(**fields))


def _qtensor_codec() -> Codec:
    children = {"data": "codes", "qparams": "weight_grids"}
    static = {"shape": (list, tuple), "bits": _PLAIN}
    codec = dataclass_codec("QTensor", QTensor, children, static)
    return codec._replace(decode=lambda fields, get: check_storage(codec.decode(fields, get)))


def _qparams_codec() -> Codec:
    """Zero points that follow from the spec are left out; a scale of the format "f16" is held as float16."""
    children = dict.fromkeys(("scale", "zero_point", "qmin", "qmax"))
    codec = dataclass_codec("QParams", QParams, children, {"spec": _SPEC, "rows": _PLAIN})

    def encode(value, put):
        implied = implied_zero_point(value.spec)
        if implied is not None and _holds(value.zero_point, value.scale, implied):
            value = value.replace(zero_point=None)
        if value.spec.scale_format == "f16":
            scale = np.asarray(value.scale)
            with np.errstate(over="ignore"):
                narrow = scale.astype(np.float16)
            # One that has left its format is held as it is: what is read back must be what ran.
            if np.array_equal(narrow.astype(np.float32), scale, equal_nan=True):
                value = value.replace(scale=narrow)
        return codec.encode(value, put)

    def decode(fields, get):
        made = codec.decode({"zero_point": None, **fields}, lambda n: None if n is None else get(n))
        made = made.replace(scale=made.scale.astype(jnp.float32))
        if made.zero_point is None:
            implied = implied_zero_point(made.spec)
            if implied is None:
                raise ValueError(f"zero points of {made.spec} are missing")
            made = made.replace(zero_point=jnp.full_like(made.scale, implied))
        return made

    return codec._replace(encode=encode, decode=decode)


def _holds(leaf, like, value) -> bool:
    """Whether a leaf is to the last bit `jnp.full_like(like, value)`."""
    leaf = np.asarray(leaf)
    whole = np.full(np.shape(like), value, np.float32)
    return (
        leaf.dtype == whole.dtype
        and leaf.shape == whole.shape
        and leaf.tobytes() == whole.tobytes()
    )


register(_qparams_codec())
register(_qtensor_codec())
register(
    dataclass_codec(
        "TimeIndexed",
        TimeIndexed,
        dict.fromkeys(("table", "timesteps")),
        {"rule": _PLAIN, "branched": _PLAIN},
    )
)
register(
    dataclass_codec(
        "SiteQuant",
        SiteQuant,
        {**dict.fromkeys(("lhs", "rhs", "tap", "substitute")), "bias": "parameters"},
        {"execute": _PLAIN, "product": _PLAIN},
    )
)
register(
    dataclass_codec(
        "Replacement",
        Replacement,
        {"arrays": None},
        {"apply": (_operator_name, OPERATORS.__getitem__)},
    )
)
register(
    dataclass_codec(
        "LowRank",
        LowRank,
        {"down": "branches", "up": "branches", "smoothing": None, "shift": None},
    )
)
register(
    dataclass_codec(
        "AffineCorrection",
        AffineCorrection,
        dict.fromkeys(("scale", "shift", "variance")),
    )
)
