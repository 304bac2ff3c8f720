r"""State dicts of PyTorch as parameter trees of ours, by a table of names, strict in both directions.

A table is a list of rows (native module, our module, kind of layer), short enough to be checked by eye:

    Row(r"mid\.attn_1\.(q|k|v)", r"mid_attn_1/\1", "dense")

Layouts follow from the kind: torch stores OIHW and [out, in], we store HWIO and [in, out].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from qdiff_jax.models.port.looks import looks_like


def _same(tensor: np.ndarray) -> np.ndarray:
    return tensor


def _hwio(tensor: np.ndarray) -> np.ndarray:
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor


def _in_out(tensor: np.ndarray) -> np.ndarray:
    """[out, in], or a convolution of size 1 with that many ones behind, as [in, out]."""
    if tensor.ndim < 2 or any(size != 1 for size in tensor.shape[2:]):
        return tensor
    return tensor.reshape(tensor.shape[:2]).T


_BIAS = {"bias": ("bias", _same)}
_NORM = {"weight": ("scale", _same), **_BIAS}

# kind -> {native leaf: (our leaf, layout)}; a row of kind "tensor" names a whole key and a whole path.
KINDS = {
    "conv": {"weight": ("kernel", _hwio), **_BIAS},
    "dense": {"weight": ("kernel", _in_out), **_BIAS},
    "norm": _NORM,
    "batch_norm": {
        **_NORM,
        "running_mean": ("mean", _same),
        "running_var": ("var", _same),
    },
    "embed": {"weight": ("embedding", _same)},
}


class Row(NamedTuple):
    r"""native: a pattern that a whole module name (key without ".weight", ".bias", ...) must match.
    ours: its path "block/layer", where \1 is what the first group matched, dots as underscores. kind: of
    `KINDS`, or "tensor" for a bare parameter taken as it is, where native matches the whole key and
    ours is the whole path."""

    native: str
    ours: str
    kind: str


class Table(NamedTuple):
    """rows: the first that matches decides. drops: patterns of whole keys that are read and thrown away
    on purpose (buffers, losses, moving averages)."""

    rows: tuple[Row, ...]
    drops: tuple[str, ...] = ()


def port_parameters(
    tensors: Mapping[str, np.ndarray],
    table: Table,
    shapes: Mapping,
    source: object = "the state dict",
) -> dict:
    """A parameter tree of exactly the names and shapes of `shapes`, float32 NumPy arrays.

    Args:
      tensors: {native name: array}.
      table: the family's.
      shapes: nested dict of arrays or ShapeDtypeStructs, such as `families.parameter_shapes` gives.
      source: where the tensors come from, for messages.

    Raises:
      ValueError: one message that lists every tensor without a row, every parameter without a tensor,
        every parameter that two tensors claim, every shape that differs, every tensor that is not of
        real floating-point numbers (an 8-bit checkpoint) and every one with values that are not finite
        in float32. Before a long list it says what the tensors look like, and how many are wrong.
    """
    wanted = dict(_leaves(shapes))
    found: dict[str, tuple[str, np.ndarray]] = {}
    unmapped, doubled, misshapen, untyped, infinite = [], [], [], [], []
    for key, tensor in tensors.items():
        if any(re.fullmatch(pattern, key) for pattern in table.drops):
            continue
        place = our_place(table, key)
        if place is None or place[0] not in wanted:
            unmapped.append(key if place is None else f"{key} (would be {place[0]})")
            continue
        path, layout = place
        if path in found:
            doubled.append(f"{path} from {found[path][0]} and {key}")
            continue
        given = np.asarray(tensor)
        value = layout(given)
        found[path] = (key, value)
        if not jnp.issubdtype(given.dtype, np.floating):
            untyped.append(f"{key} ({given.dtype})")
        elif not _all_finite(given):
            infinite.append(key)
        if value.shape != tuple(wanted[path].shape):
            misshapen.append(f"{key} {np.shape(tensor)} for {path} {tuple(wanted[path].shape)}")
    unfilled = [path for path in wanted if path not in found]
    wrong = (
        ("tensors without a parameter", unmapped),
        ("parameters without a tensor", unfilled),
        ("parameters with two tensors", doubled),
        ("tensors of another shape", misshapen),
        ("tensors that are not of floating-point numbers (quantized before?)", untyped),
        ("tensors with NaN or infinite values", infinite),
    )
    wrong = [(what, items) for what, items in wrong if items]
    if wrong:
        said = "; ".join(f"{len(items)} {what}: {', '.join(items)}" for what, items in wrong)
        if sum(len(items) for _, items in wrong) > _FEW:
            counts = ", ".join(f"{len(items)} {what}" for what, items in wrong)
            looks = looks_like({key: np.shape(tensor) for key, tensor in tensors.items()})
            said = f"{f'it looks like {looks}; ' if looks else ''}{counts}. All of them: {said}"
        raise ValueError(f"{source} does not fit this model: {said}.")
    tree: dict = {}
    for path, (_, value) in found.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value.astype(np.float32, copy=False)
    return tree


# How many wrong tensors are listed at once, without a summary.
_FEW = 8


def _all_finite(values: np.ndarray) -> bool:
    """Whether all are finite in float32, without an array of their size."""
    if not values.size:
        return True
    with np.errstate(over="ignore"):
        bounds = np.array([values.min(), values.max()]).astype(np.float32)
    return bool(np.isfinite(bounds).all())


def our_place(table: Table, key: str):
    """(our path "block/layer/leaf", function that lays the tensor out) of a native key, or None."""
    module, _, leaf = key.rpartition(".")
    for row in table.rows:
        match = re.fullmatch(row.native, key if row.kind == "tensor" else module)
        if match is None:
            continue
        path = row.ours
        for i, group in enumerate(match.groups(), 1):
            path = path.replace(f"\\{i}", (group or "").replace(".", "_"))
        if row.kind == "tensor":
            return path, _same
        if leaf in KINDS[row.kind]:
            name, layout = KINDS[row.kind][leaf]
            return f"{path}/{name}", layout
    return None


def take(
    tensors: Mapping[str, np.ndarray],
    parts: Mapping[str, str],
    keep: Sequence[str] = (),
    drops: Iterable[str] = (),
    source: object = "the checkpoint",
) -> dict[str, dict[str, np.ndarray]]:
    """A checkpoint of several networks taken apart: {part: {name without prefix: tensor}}.

    Args:
      parts: {part: prefix}, such as {"unet": "model.diffusion_model."}; a part may come out empty. The
        longest prefix decides.
      keep: whole names of lone tensors to hand back under "" (`scale_factor`), where the file has them.
      drops: patterns of whole keys to throw away.

    Raises:
      ValueError: lists the keys that belong to no part.
    """
    drops = tuple(drops)
    taken: dict[str, dict[str, np.ndarray]] = {"": {}, **{part: {} for part in parts}}
    odd = []
    longest_first = sorted(parts.items(), key=lambda item: -len(item[1]))
    for key, tensor in tensors.items():
        part = next((p for p, prefix in longest_first if key.startswith(prefix)), None)
        if key in keep:
            taken[""][key] = tensor
        elif any(re.fullmatch(pattern, key) for pattern in drops):
            continue
        elif part is None:
            odd.append(key)
        else:
            taken[part][key.removeprefix(parts[part])] = tensor
    if odd:
        raise ValueError(f"{source} has {len(odd)} tensors of no part we know: {', '.join(odd)}.")
    return taken


def with_moving_average(
    tensors: Mapping[str, np.ndarray],
    prefix: str = "model.",
    average: str = "model_ema.",
    counters: Sequence[str] = ("decay", "num_updates"),
    source: object = "the checkpoint",
) -> dict[str, np.ndarray]:
    """The checkpoint with its parameters below `prefix` replaced by their moving averages, which leave.

    The average of `model.a.b.weight` is called `model_ema.abweight`: names lose their dots, so that they
    are found from the model's own names, never parsed.

    Raises:
      ValueError: there are no averages, two parameters would share one, or the two sets of names differ;
        lists the names.
    """
    held = {key.removeprefix(average): key for key in tensors if key.startswith(average)}
    for counter in counters:
        held.pop(counter, None)
    if not held:
        raise ValueError(
            f"{source} has no moving averages ({average}*); load its weights as they are instead."
        )
    names = [key for key in tensors if key.startswith(prefix)]
    short = {key: key.removeprefix(prefix).replace(".", "") for key in names}
    if len(set(short.values())) != len(short):
        seen: dict[str, str] = {}
        pairs = [f"{seen[s]} and {k}" for k, s in short.items() if seen.setdefault(s, k) != k]
        raise ValueError(f"{source}: these parameters share an average: {', '.join(pairs)}.")
    lacking = [key for key in names if short[key] not in held]
    extra = sorted(held[s] for s in set(held) - set(short.values()))
    if lacking or extra:
        raise ValueError(
            f"{source}: {len(lacking)} parameters without a moving average ({', '.join(lacking)}) and "
            f"{len(extra)} averages of no parameter ({', '.join(extra)})."
        )
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(average)}
    return kept | {key: tensors[held[short[key]]] for key in names}


def _leaves(tree: Mapping, prefix: str = ""):
    for name, node in tree.items():
        path = f"{prefix}{name}"
        if isinstance(node, Mapping):
            yield from _leaves(node, f"{path}/")
        else:
            yield path, node
