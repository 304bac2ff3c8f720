"""A quantized model on disk: packed integers in safetensors, everything else said in a manifest.

A bundle is a folder with two files. `weights.safetensors` holds every array (codes as uint8 or
int8: the format has no 4-bit type). `manifest.json` holds the version of the format, the model, its
schedule and sampler, the plan (which rule decided which operand), the structure of both trees with
the grid of every tensor, the source checkpoint, and a digest of every array and of itself. It is
written whole or not at all, and read back bit for bit or not at all.
"""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from qdiff_jax.export.encode import decode_tree, encode_tree
from qdiff_jax.export.manifest import (
    MANIFEST,
    BundleError,
    intact,
    plain_json,
    read_manifest,
    sealed,
)
from qdiff_jax.export.qtensor import QTensor
from qdiff_jax.quant.timed import TimeIndexed
from qdiff_jax.sites import SiteQuant, flatten_sites

WEIGHTS = "weights.safetensors"


class Bundle(NamedTuple):
    """params: full-precision leftovers (kernels held as codes are absent). quant: sites as
    `SiteQuant`. manifest: the JSON of the bundle. correction: what sampling corrects, for
    `diffusion.corrections.hooks_of`; None for nothing."""

    params: dict
    quant: dict
    manifest: dict
    correction: Any = None


class StoredBytes(NamedTuple):
    """tensors: bytes of all arrays; by_kind: the same by what they are for: "codes",
    "weight_grids" (scales, zero points and code ranges of the codes), "quantizers" (of activations,
    with their step tables), "branches" (low-rank, 16-bit), "parameters" (full precision), "correction" (of the
    sampling). files: both files as they lie there."""

    tensors: int
    by_kind: dict[str, int]
    files: int


def save_bundle(
    directory: str | os.PathLike,
    *,
    params: Mapping,
    quant: Mapping,
    plan_json: list,
    model_config: Any,
    schedule_config: Any,
    sampler_config: Any,
    source: Mapping,
    extra: Any = None,
    correction: Any = None,
) -> pathlib.Path:
    """Write a bundle and return its folder; it appears whole or not at all.

    Args:
      directory: must not exist yet; its parent is made.
      params: nested dict of float32 arrays; the kernel of a site whose rhs is a `QTensor` is left
        out, whether or not it is given.
      quant: nested dict {block: {op: SiteQuant}}, finished: no taps, no soft rounding.
      plan_json: `SitePlan.to_json()`.
      model_config, schedule_config, sampler_config: JSON values or dataclasses of such;
        model_config names its "family".
      source: of the full-precision weights; has the "sha256" of the checkpoint.
      extra: further JSON, such as the report of the run.
      correction: step tables of the sampler's hook (`diffusion.corrections`), or None.

    Raises:
      BundleError: the folder exists, the disk is full or cannot be written, a kernel and its codes
        differ in shape, or a configuration is not JSON. TypeError: an array of a dtype, or an
        object of a type, that a bundle cannot hold.
    """
    directory = pathlib.Path(directory).absolute()
    if directory.exists():
        raise BundleError(f"{directory} exists already; choose another folder or remove it first")
    trees, arrays, kinds = {}, {}, {}
    leftovers = without_packed_kernels(params, quant)
    stored = [("params", leftovers, "parameters"), ("quant", dict(quant), "quantizers")]
    if correction is not None:
        stored.append(("correction", correction, "correction"))
    for name, tree, kind in stored:
        trees[name], more, more_kinds = encode_tree(tree, name, kind)
        arrays.update(more)
        kinds.update(more_kinds)
    manifest = {
        "model": plain_json(model_config, "model_config", needs="family"),
        "schedule": plain_json(schedule_config, "schedule_config"),
        "sampler": plain_json(sampler_config, "sampler_config"),
        "plan": plain_json(plan_json, "plan_json"),
        "source": plain_json(source, "source", needs="sha256"),
        "extra": plain_json(extra, "extra"),
        "trees": trees,
        "tensors": {
            name: {
                "kind": kinds[name],
                "dtype": str(array.dtype),
                "shape": list(array.shape),
                "sha256": _digest(array),
            }
            for name, array in arrays.items()
        },
    }
    _write(directory, arrays, sealed(manifest))
    return directory


def load_bundle(directory: str | os.PathLike) -> Bundle:
    """Read a bundle: the trees that were saved, bit for bit, as jax arrays.

    Raises:
      BundleError: no bundle there, a version this package does not read, or a list of everything
        that does not agree: missing, extra, misshapen or altered tensors, a damaged file, a
        manifest that was changed.
    """
    directory = pathlib.Path(directory)
    manifest = read_manifest(directory)
    problems = []
    if not intact(manifest):
        problems.append(f"{MANIFEST} was changed after it was written (its digest differs)")
    arrays: dict[str, np.ndarray] = {}
    try:
        with safe_open(directory / WEIGHTS, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        problems.append(f"{WEIGHTS} is missing or damaged ({error})")
    else:
        problems += _compare(manifest["tensors"], arrays)
    trees = {}
    if not problems:
        used: set[str] = set()

        def array(name):
            used.add(name)
            if name not in arrays:
                raise ValueError(f"the tensor {name!r} is referred to but not listed")
            return arrays[name]

        # Only bundles whose sampling is corrected have the third.
        described = {"correction": None, **manifest["trees"]}
        for name in ("params", "quant", "correction"):
            try:
                trees[name] = decode_tree(described[name], array)
            except ValueError as error:
                problems.append(f"the {name} tree cannot be rebuilt: {error}")
        if not problems:
            problems += [
                f"the tensor {name} belongs nowhere" for name in arrays if name not in used
            ]
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise BundleError(
            f"{directory} is not the bundle that was saved; copy or export it again:{listed}"
        )
    return Bundle(trees["params"], trees["quant"], manifest, trees["correction"])


def stored_bytes(directory: str | os.PathLike) -> StoredBytes:
    """The bytes a bundle really takes, read off the header of the weights file.

    Raises BundleError if there is no readable bundle, or its files disagree about the tensors.
    """
    directory = pathlib.Path(directory)
    listed = read_manifest(directory)["tensors"]
    try:
        with open(directory / WEIGHTS, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (OSError, ValueError) as error:
        raise BundleError(f"{directory / WEIGHTS} is missing or damaged ({error})") from error
    held = {name: entry["data_offsets"] for name, entry in header.items() if name[:2] != "__"}
    if set(held) != set(listed):
        raise BundleError(f"{directory}: its two files list different tensors; export it again")
    by_kind: dict[str, int] = {}
    for name, (begin, end) in sorted(held.items()):
        kind = listed[name]["kind"]
        by_kind[kind] = by_kind.get(kind, 0) + end - begin
    files = sum((directory / name).stat().st_size for name in (WEIGHTS, MANIFEST))
    return StoredBytes(sum(by_kind.values()), by_kind, files)


def file_sha256(path: str | os.PathLike) -> str:
    """Digest of a file, such as the source checkpoint."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def without_packed_kernels(params: Mapping, quant: Mapping) -> dict:
    """params without the kernels that `quant` holds as codes.

    Raises BundleError if a kernel and its codes differ in shape.
    """
    tree = _copy(params)
    for site, entry in flatten_sites(dict(quant)).items():
        rhs = entry.rhs if isinstance(entry, SiteQuant) else None
        rhs = rhs.table if isinstance(rhs, TimeIndexed) else rhs
        if not isinstance(rhs, QTensor):
            continue
        node = tree
        for part in site.split("/"):
            node = node.get(part, {}) if isinstance(node, dict) else {}
        kernel = node.pop("kernel", None)
        if kernel is not None and tuple(kernel.shape) != rhs.shape:
            raise BundleError(
                f"{site}: the codes have shape {rhs.shape} and the kernel {tuple(kernel.shape)}; "
                "these params and this quant tree are not of one model"
            )
    return tree


def _write(directory, arrays, manifest):
    needed = sum(array.nbytes for array in arrays.values()) + len(manifest)
    draft = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory.parent).free
        if free < needed:
            raise BundleError(
                f"the bundle {directory} needs {needed:,} bytes and the disk has {free:,} free; "
                "nothing was written: make room or choose another disk"
            )
        # Beside its destination, since a rename is atomic only inside one file system.
        draft = pathlib.Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        safetensors.numpy.save_file(arrays, draft / WEIGHTS)
        (draft / MANIFEST).write_text(manifest, encoding="utf-8")
        # mkdtemp's 0700 and safetensors' 0600 would hide the bundle from other readers.
        draft.chmod(0o755)
        for path in (draft / WEIGHTS, draft / MANIFEST):
            path.chmod(0o644)
            _sync(path)
        os.rename(draft, directory)
    except (OSError, SafetensorError) as error:
        raise BundleError(
            f"the bundle {directory} could not be written ({error}); nothing was left behind: "
            "check the free space and the permissions of its parent folder"
        ) from error
    finally:
        if draft is not None and draft.exists():
            shutil.rmtree(draft, ignore_errors=True)
    # The bundle is complete. Making its name survive a power cut needs the folders synced as well,
    # which some network file systems refuse.
    for folder in (directory, directory.parent):
        with contextlib.suppress(OSError):
            _sync(folder)


def _sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _compare(listed, arrays):
    problems = [f"{name} is missing from {WEIGHTS}" for name in listed if name not in arrays]
    problems += [f"{name} is in {WEIGHTS} unlisted" for name in arrays if name not in listed]
    for name, entry in listed.items():
        array = arrays.get(name)
        if array is None:
            continue
        expected = (entry.get("dtype"), tuple(entry.get("shape", ())))
        if (str(array.dtype), array.shape) != expected:
            problems.append(
                f"{name} is {array.dtype} {array.shape}, expected {expected[0]} {expected[1]}"
            )
        elif _digest(array) != entry.get("sha256"):
            problems.append(f"{name} has other values than were saved (its digest differs)")
    return problems


def _copy(tree):
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _digest(array):
    return hashlib.sha256(array.reshape(math.prod(array.shape)).view(np.uint8)).hexdigest()
