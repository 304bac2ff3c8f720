"""The manifest of a bundle: one JSON file that says what the bundle holds and seals it."""

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
from typing import Any

MANIFEST = "manifest.json"
FORMAT = "qdiff_jax.bundle"
VERSION = 2  # from 1: zero points that follow from the grid are left out, scales may be float16
READABLE = (1, 2)  # a version stays here for good, with a stored bundle in the tests
_LIBRARIES = ("qdiff_jax", "jax", "flax", "numpy", "safetensors")
_REQUIRED = {"model", "schedule", "sampler", "plan", "source", "trees", "tensors", "sha256"}


class BundleError(RuntimeError):
    """A bundle cannot be written or read; the message lists everything that is wrong with it."""


def sealed(content: dict) -> str:
    """The text of the manifest: content, the format's version, library versions, its own digest."""
    manifest = {"format": FORMAT, "version": VERSION, "libraries": _versions(), **content}
    return json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1)


def intact(manifest: dict) -> bool:
    """Whether a manifest is to the letter what `sealed` wrote."""
    return manifest.get("sha256") == _digest(manifest)


def read_manifest(directory: pathlib.Path) -> dict:
    """The manifest of a bundle of a version that can be read, its seal not yet checked.

    Raises BundleError if there is none, or it is damaged, incomplete or of another version.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise BundleError(f"{directory} holds no bundle: there is no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(f"{path} is damaged or describes no bundle; copy or export it again")
    if manifest.get("version") not in READABLE:
        raise BundleError(
            f"{directory} has format version {manifest.get('version')!r}, this package reads "
            f"{', '.join(map(str, READABLE))}: upgrade qdiff_jax, or export the model again"
        )
    missing = _REQUIRED - set(manifest)
    if missing:
        raise BundleError(f"{path} lacks {', '.join(sorted(missing))}; copy or export it again")
    return manifest


def plain_json(value: Any, name: str, needs: str | None = None) -> Any:
    """value (JSON, or a dataclass of such) exactly as it will be read back.

    Raises BundleError if it is not JSON, or no dict with an entry `needs`.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    try:
        value = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise BundleError(f"{name} cannot be written as JSON ({error})") from error
    if needs is not None and (not isinstance(value, dict) or not value.get(needs)):
        raise BundleError(f"{name} needs an entry {needs!r}, got {str(value)[:80]}")
    return value


def _versions():
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions


def _digest(manifest):
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
