"""How far a long loop is: a bar on a terminal, a log line every so many seconds elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import jax
from absl import logging


@contextlib.contextmanager
def progress(
    what: str,
    total: int,
    *,
    start: int = 0,
    every_seconds: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable]:
    """Yields `update(done, **shown)`, to be called with the number of steps done so far.

    Args:
      what: named in every line.
      total: number of steps in all.
      start: steps already done before (a resumed run); the rate counts from here.
      every_seconds: least time between two log lines; a terminal gets a bar instead.
      clock: seconds, monotonic.
    """
    if jax.process_index() != 0:
        yield lambda done, **shown: None
    elif sys.stderr.isatty():
        yield from _bar(what, total, start)
    else:
        yield from _lines(what, total, start, every_seconds, clock)


def _bar(what, total, start):
    from tqdm import tqdm

    with tqdm(total=total, initial=start, desc=what, dynamic_ncols=True) as bar:

        def update(done, **shown):
            if shown:
                bar.set_postfix(shown, refresh=False)
            bar.update(done - bar.n)

        yield update


def _lines(what, total, start, every_seconds, clock):
    began = last = clock()

    def update(done, **shown):
        nonlocal last
        now = clock()
        if now - last < every_seconds and done < total:
            return
        last = now
        rate = (done - start) / max(now - began, 1e-9)
        left = format_seconds((total - done) / rate) if rate > 0 else "unknown time"
        values = "".join(f", {name} {value}" for name, value in shown.items())
        logging.info("%s: %d/%d, %.2f/s, %s left%s", what, done, total, rate, left, values)

    yield update


def log_progress() -> None:
    """Let progress lines through to the log, without Orbax's dozen lines for every checkpoint."""
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(
        lambda record: record.levelno >= 30 or "orbax" not in record.pathname
    )


def format_seconds(seconds: float) -> str:
    """75 -> '1m15s', 7384 -> '2h03m'."""
    whole = int(round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
