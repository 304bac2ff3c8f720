"""Results appear whole or not at all: a reader or a restarted job never meets half a file."""

import os
import pathlib
import tempfile


def write_atomic(path: str | os.PathLike, data: bytes | str) -> pathlib.Path:
    """Writes `data` beside `path` and renames it into place; text is UTF-8.

    The folder is made if need be. An earlier file at `path` is replaced. Returns `path`.
    Raises OSError, with what to do, if it cannot be written (disk full); nothing is left behind.
    """
    path = pathlib.Path(path)
    payload = data.encode("utf-8") if isinstance(data, str) else data
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, since a rename is atomic only inside a file system.
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the result from other readers
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error}); free some space and run the same command again."
        ) from error
    finally:
        if temporary is not None:
            os.unlink(temporary)
    return path
