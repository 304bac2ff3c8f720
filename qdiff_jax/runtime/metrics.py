"""Metrics as one JSON object per line, safe to append to after a crash; TensorBoard on demand."""

import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping

import jax


def metrics_writer(workdir, *, tensorboard: bool = False) -> Callable[[int, Mapping], None]:
    """A function `write(step, values)` that appends to `workdir/metrics.jsonl`.

    Only process 0 writes; on others it does nothing. Values are scalars or strings; a non-finite
    number is written as a string, since JSON has none.

    Raises:
      ImportError: tensorboard is asked for and tensorboardX is not installed.
    """
    if jax.process_index() != 0:
        return lambda step, values: None
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    board = _tensorboard(folder) if tensorboard else None
    started = time.time()

    def write(step: int, values: Mapping) -> None:
        plain = {name: _plain(value) for name, value in values.items()}
        _append(path, {"step": int(step), "seconds": round(time.time() - started, 3), **plain})
        if board is not None:
            for name, value in plain.items():
                if isinstance(value, (int, float)):
                    board.add_scalar(name, value, step)
            board.flush()

    return write


def read_metrics(path) -> list[dict]:
    """The records of a metrics file (or its workdir), by step; a torn line is skipped.

    Where a resumed run wrote a step again, the later record's values win.
    """
    path = pathlib.Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    by_step: dict[int, dict] = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the process was killed while it wrote this line
        by_step.setdefault(record["step"], {}).update(record)
    return [by_step[step] for step in sorted(by_step)]


def _append(path: pathlib.Path, record: dict) -> None:
    # One write call on an O_APPEND descriptor: lines of two writers do not mix, and a killed
    # process leaves at most one torn line, which the leading newline below keeps apart from the
    # next.
    line = json.dumps(record).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def _plain(value):
    if isinstance(value, str):
        return value
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, float) and not math.isfinite(number):
        return str(number)
    return number


def _tensorboard(folder: pathlib.Path):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboardX is not installed; pip install -e '.[tensorboard]', or leave "
            "tensorboard off."
        ) from error
    return SummaryWriter(str(folder / "tensorboard"))
