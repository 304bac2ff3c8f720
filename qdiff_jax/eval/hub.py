"""Weights that are named on the Hugging Face hub: `hub:OWNER/REPO/FILE` becomes a file on disk.

Wherever a path of weights or of a vocabulary is asked for, `hub:OWNER/REPO/FILE` may be given, or
`hub:OWNER/REPO` for the files by which a model's folder is known. `hub:OWNER/REPO@REVISION/...` pins a
commit, a tag or a branch. Downloads are kept by huggingface_hub (the extra `hub`) and made once.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

PREFIX = "hub:"
_EXTRA = "huggingface_hub is not installed; pip install -e '.[hub]', or give a local path"


class _Place(NamedTuple):
    repository: str
    revision: str | None
    file: str  # "" for the repository itself


def on_disk(where, *, any_of: Sequence[str] = (), all_of: Sequence[str] = ()) -> pathlib.Path:
    """The local path of `where`, downloaded if it begins with `hub:` and as it is otherwise.

    Args:
      where: a path, or `hub:OWNER/REPO[@REVISION][/FILE]`.
      any_of: for a repository without a file, the first of these names that it holds is taken.
      all_of: or all of these, and the path is that of their folder.

    Raises:
      ValueError: a name of another form, a file that the hub does not have or give, or the extra is not
        installed.
    """
    if not str(where).startswith(PREFIX):
        return pathlib.Path(where)
    place = _parse(str(where))
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise ValueError(f"{where}: {_EXTRA}.") from error

    def get(file: str) -> pathlib.Path:
        return pathlib.Path(hub.hf_hub_download(place.repository, file, revision=place.revision))

    try:
        if place.file:
            return get(place.file)
        if all_of:
            return [get(file) for file in all_of][0].parent
        for file in any_of:
            if hub.file_exists(place.repository, file, revision=place.revision):
                return get(file)
    except Exception as error:  # its own types and those of its HTTP client, by version
        raise ValueError(
            f"{where} cannot be fetched from the hub ({type(error).__name__}: {error}); check the name "
            "and the connection, or download the file and give its path."
        ) from error
    raise ValueError(
        f"{where} names no file and the repository has none of {list(any_of)}; write "
        "hub:OWNER/REPO/FILE."
    )


def folder_on_disk(
    where: str, *, needs: Sequence[str] = (), any_of: Sequence[str] = ()
) -> pathlib.Path:
    """The local folder of `hub:OWNER/REPO[@REVISION][/SUBFOLDER]` with some of its files fetched.

    needs: names of files that must be there. any_of: the first of these that is there is fetched too, and
    where it is an index of shards (`*.index.json`), the shards with it.

    Raises ValueError as `on_disk`, or for a folder that has none of `any_of`.
    """
    base = where.rstrip("/")
    place = _parse(base)
    files = [on_disk(f"{base}/{name}") for name in needs]
    if any_of:
        inside = f"{place.file}/" if place.file else ""
        whole = f"{PREFIX}{place.repository}{'@' + place.revision if place.revision else ''}"
        found = on_disk(whole, any_of=[inside + name for name in any_of])
        files.append(found)
        if found.name.endswith(".index.json"):
            shards = json.loads(found.read_text("utf-8")).get("weight_map", {})
            files += [on_disk(f"{base}/{name}") for name in sorted(set(shards.values()))]
    return files[0].parent


def _parse(where: str) -> _Place:
    owner, _, rest = where.removeprefix(PREFIX).partition("/")
    name, _, file = rest.partition("/")
    name, at, revision = name.partition("@")
    if not owner or not name or (at and not revision):
        raise ValueError(
            f"{where} is no place on the hub; write hub:OWNER/REPO/FILE or hub:OWNER/REPO@REVISION/FILE."
        )
    return _Place(f"{owner}/{name}", revision or None, file)
