"""Where the files of a published pipeline are: local paths, a cache folder, or the hub."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from qdiff_jax.eval.hub import PREFIX, folder_on_disk, on_disk
from qdiff_jax.runtime.state_dicts import FOLDER_FILES

_INDEX = "model_index.json"


class Place(NamedTuple):
    """path: a file or folder on disk; of a repository on the hub its name, `hub:OWNER/REPO`, which parts are
    fetched from one by one. is_pipeline: a folder or repository that holds a network and its other parts."""

    path: pathlib.Path | str
    is_pipeline: bool = False


def find_place(where: str, folder: str, need: str, files: Sequence[str] = ()) -> Place:
    """What a config names, on disk where it is no repository.

    Args:
      where: a path, or `hub:OWNER/REPO[@REVISION][/FILE]`.
      folder: also looked in for a relative path; "" for none.
      need: what it is needed for, for the message.
      files: of a repository without a file, fetch these, and the place is their folder.

    Raises ValueError if nothing is there, or as `on_disk`.
    """
    if not where:
        raise ValueError(f"no place is given for {need}; give a path or hub:OWNER/REPO.")
    if where.startswith(PREFIX):
        if where.count("/") > 1 or files:
            return Place(on_disk(where, all_of=tuple(files)))
        return Place(where, is_pipeline=True)
    candidates = [pathlib.Path(where)]
    if folder and not candidates[0].is_absolute():
        candidates.append(pathlib.Path(folder) / where)
    found = next((path for path in candidates if path.exists()), None)
    if found is None:
        tried = " or ".join(map(str, candidates))
        raise ValueError(
            f"there is nothing at {tried}, where {need} should be; download it and give its path, the folder "
            "it is in, or hub:OWNER/REPO."
        )
    return Place(found, found.is_dir() and (found / _INDEX).is_file())


def part_of(place: Place, names: Sequence[str], what: str) -> pathlib.Path:
    """The folder of a pipeline's part, the first of `names` that it has; the pipeline's own folder where
    the network's weights lie beside `model_index.json`, as in the oldest repositories.

    Raises ValueError if it has none of them; what: the part is called in the message.
    """
    if str(place.path).startswith(PREFIX):
        return _fetched(str(place.path), names)
    for name in names:
        if (place.path / name / "config.json").is_file():
            return place.path / name
    if what == "network" and any((place.path / name).is_file() for name in FOLDER_FILES):
        return place.path
    raise ValueError(f"the pipeline {place.path} has no {what}: none of the folders {list(names)}.")


def beside(place: Place, files: Sequence[str]) -> pathlib.Path | None:
    """The folder with a vocabulary: the place itself, or `tokenizer` in it or beside it; None if it is in
    none of them. Of a repository it is fetched; raises ValueError as `on_disk`."""
    if str(place.path).startswith(PREFIX):
        last = files[-1]
        found = on_disk(place.path, any_of=(f"tokenizer/{last}", last))
        prefix = "tokenizer/" if found.parent.name == "tokenizer" else ""
        return on_disk(place.path, all_of=tuple(f"{prefix}{name}" for name in files))
    here = place.path if place.path.is_dir() else place.path.parent
    for folder in (here, here / "tokenizer", here.parent / "tokenizer"):
        if all((folder / name).is_file() for name in files):
            return folder
    return None


def _fetched(repository: str, names: Sequence[str]) -> pathlib.Path:
    """A part's config and weights, its shards included; the folder that they come to."""
    candidates = [f"{name}/{file}" for name in names for file in FOLDER_FILES]
    # Repositories of one network have it at their root.
    weights = on_disk(repository, any_of=(*candidates, *FOLDER_FILES))
    part = next((name for name in names if weights.parent.name == name), "")
    folder = f"{repository}/{part}" if part else repository
    return folder_on_disk(folder, needs=("config.json",), any_of=FOLDER_FILES)
