"""Checkpoints of any pytree: atomic, verified, restored onto the sharding of a template.

The only file that knows Orbax (its v0 API). A tree is stored flat: one entry per leaf, numbered in
flattening order, and beside it a record of each leaf's path, shape, dtype and checksum. A template
gives the structure back, so any registered pytree works (flax.struct dataclasses, optax states,
PRNG keys), and a template that does not fit is refused with the first leaf that differs.

Orbax writes to a temporary folder and renames it, so a process killed while saving leaves no step
that looks complete. Damage that comes later (a bad disk, a partial copy) is found by the checksums.
"""

import errno
import pathlib
import shutil
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from qdiff_jax.runtime.mesh import from_host

_FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says what to do."""


class Restored(NamedTuple):
    """tree: like the template; step: the step it was saved at."""

    tree: Any
    step: int


def save(directory, step: int, tree: Any, *, keep: int = 3) -> None:
    """Writes `tree` as `directory/step`, then drops all but the newest `keep` steps; blocks.

    A step that exists already is written anew. With several processes all of them call this, and
    every leaf must be replicated or addressable.

    Args:
      directory: made if missing.
      step: at least 0.
      tree: pytree of jax or numpy arrays, Python numbers and PRNG keys.
      keep: how many steps stay; at least 1.

    Raises:
      CheckpointError: not enough disk space, or the files cannot be written. Earlier steps stay as
        they were.
      TypeError: a leaf that is no array.
    """
    directory = pathlib.Path(directory).absolute()
    arrays, records = _flatten(tree)
    needed = sum(array.nbytes for array in arrays.values())
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(_full(directory, step, f"{needed:,} bytes needed, {free:,} free"))
    items = ocp.args.Composite(
        arrays=ocp.args.PyTreeSave(arrays),
        record=ocp.args.JsonSave({"format": _FORMAT, "leaves": records}),
    )
    try:
        with _manager(directory, keep) as manager:
            if step in manager.all_steps():
                manager.delete(step)
            saved = manager.save(step, args=items, force=True)
    except (OSError, ValueError, RuntimeError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise CheckpointError(_full(directory, step, "no space left on the device")) from error
        raise CheckpointError(
            f"step {step} could not be saved under {directory} ({_first_line(error)}); check that "
            "the folder can be written; the earlier checkpoints are intact."
        ) from error
    if not saved:
        raise CheckpointError(f"Orbax declined to save step {step} under {directory}.")


def all_steps(directory) -> list[int]:
    """The steps completely saved under a directory, ascending; empty if there is none."""
    directory = pathlib.Path(directory).absolute()
    if not directory.is_dir():
        return []
    with _manager(directory, None) as manager:
        return sorted(manager.all_steps())


def latest_step(directory) -> int | None:
    """The newest completely saved step, or None."""
    steps = all_steps(directory)
    return steps[-1] if steps else None


def restore(directory, template: Any, step: int | None = None) -> Restored:
    """Reads a checkpoint into the structure, and onto the devices, of a template.

    Args:
      directory: as given to `save`.
      template: pytree of arrays or ShapeDtypeStructs. A leaf with a sharding is restored with that
        sharding (whatever devices it was saved from); a numpy leaf as numpy; a number as a number.
      step: which one; None for the newest. If the newest turns out damaged, the one before it is
        used and a warning is logged; a step asked for by number is never replaced.

    Returns:
      Restored(tree, step).

    Raises:
      CheckpointError: there is none, it is damaged, or it does not fit the template.
    """
    directory = pathlib.Path(directory).absolute()
    steps = all_steps(directory)
    if step is not None and step not in steps:
        raise CheckpointError(
            f"there is no complete checkpoint of step {step} under {directory}; "
            f"it has {steps or 'none'}."
        )
    if not steps:
        raise CheckpointError(f"there is no complete checkpoint under {directory}; check the path.")
    wanted = steps[::-1] if step is None else [step]
    for candidate in wanted:
        try:
            arrays, records = _read(directory, candidate)
        except Exception as error:  # damage surfaces as many types from several libraries
            damage = _first_line(error)
            if candidate is not wanted[-1]:
                logging.warning(
                    "checkpoint %s/%d is damaged (%s): going back to the one before it.",
                    directory,
                    candidate,
                    damage,
                )
                continue
            raise CheckpointError(
                f"checkpoint {directory}/{candidate} is damaged ({damage}); delete that folder "
                "to go on from an earlier step, or from scratch."
            ) from error
        return Restored(
            _unflatten(template, arrays, records, directory / str(candidate)), candidate
        )
    raise AssertionError("unreachable: the last candidate returns or raises")


def _manager(directory: pathlib.Path, keep: int | None) -> ocp.CheckpointManager:
    """For writing with `keep`, for reading without: a reader must not sweep away a half-written
    step, which another process may be writing; a writer sweeps away what a killed one left."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=True,
        enable_async_checkpointing=False,
        cleanup_tmp_directories=keep is not None,
    )
    return ocp.CheckpointManager(
        directory,
        options=options,
        item_names=("arrays", "record"),
        item_handlers={
            "arrays": ocp.PyTreeCheckpointHandler(),
            "record": ocp.JsonCheckpointHandler(),
        },
    )


def _flatten(tree: Any) -> tuple[dict, list[dict]]:
    """Entries for Orbax and their records. Empty arrays have a record only: Orbax refuses them."""
    arrays, records = {}, []
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        name = jax.tree_util.keystr(path)
        key = _is_key(leaf)
        array = jax.random.key_data(leaf) if key else leaf
        if not isinstance(array, jax.Array | np.ndarray | np.generic | int | float | bool):
            raise TypeError(
                f"leaf {name} is a {type(leaf).__name__}; only arrays can be checkpointed."
            )
        array = array if isinstance(array, jax.Array) else np.asarray(array)
        record = {"path": name, "shape": list(array.shape), "dtype": str(array.dtype)}
        record["key"] = str(jax.random.key_impl(leaf)) if key else None
        record["crc32"] = _checksum(array)
        records.append(record)
        if array.size:
            arrays[f"{i:06d}"] = array
    return arrays, records


def _read(directory: pathlib.Path, step: int) -> tuple[list[np.ndarray], list[dict]]:
    with _manager(directory, None) as manager:
        record = manager.restore(
            step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
        ).record
        if record["format"] != _FORMAT:
            raise ValueError(f"format {record['format']} is not known to this version")
        records = record["leaves"]
        names = [f"{i:06d}" for i, r in enumerate(records) if np.prod(r["shape"], dtype=int)]
        item = {name: np.zeros(()) for name in names}
        how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        args = ocp.args.Composite(arrays=ocp.args.PyTreeRestore(item=item, restore_args=how))
        stored = manager.restore(step, args=args).arrays if names else {}
    arrays = []
    for i, r in enumerate(records):
        array = stored.get(f"{i:06d}")
        array = (
            np.zeros(r["shape"], jax.dtypes.canonicalize_dtype(r["dtype"]))
            if array is None
            else array
        )
        if list(array.shape) != r["shape"] or str(array.dtype) != r["dtype"]:
            raise ValueError(
                f"leaf {r['path']} is {array.dtype}{list(array.shape)}, not as recorded"
            )
        if r["crc32"] is not None and _checksum(array) != r["crc32"]:
            raise ValueError(f"leaf {r['path']} does not match its checksum")
        arrays.append(array)
    return arrays, records


def _unflatten(template, arrays, records, where):
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
    paths = [jax.tree_util.keystr(path) for path, _ in leaves]
    stored = [r["path"] for r in records]
    if paths != stored:
        missing, extra = sorted(set(paths) - set(stored)), sorted(set(stored) - set(paths))
        raise CheckpointError(
            f"{where} holds another tree: it lacks {missing[:3] or 'nothing'} and has "
            f"{extra[:3] or 'nothing'} more; it was saved from another configuration or version."
        )
    out = [_place(leaf, a, r, where) for (_, leaf), a, r in zip(leaves, arrays, records)]
    return jax.tree_util.tree_unflatten(treedef, out)


def _place(leaf, array: np.ndarray, record: dict, where):
    if isinstance(leaf, bool | int | float):
        return type(leaf)(array.item())
    key = _is_key(leaf)
    shape = tuple(record["shape"])
    if key != (record["key"] is not None) or (
        not key and (shape, record["dtype"]) != (tuple(leaf.shape), str(leaf.dtype))
    ):
        raise CheckpointError(
            f"{where}: leaf {record['path']} was saved as {record['dtype']}{list(shape)}, but "
            f"{leaf.dtype}{list(leaf.shape)} is expected; it comes from another configuration."
        )
    if isinstance(leaf, np.ndarray | np.generic):
        return array
    sharding = getattr(leaf, "sharding", None)
    if key:
        restored = jax.random.wrap_key_data(array, impl=record["key"])
        return restored if sharding is None else from_host(restored, sharding)
    if sharding is None:
        return jax.numpy.asarray(array)
    return from_host(array, sharding)


def _is_key(leaf) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _checksum(array) -> int | None:
    """CRC-32 of the values; None for an array of which this process holds a part only."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        return None
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _full(directory, step, detail) -> str:
    return (
        f"the disk is too full to save step {step} under {directory} ({detail}); free some "
        "space, or keep fewer checkpoints; the earlier ones are intact."
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
