"""What a piece of work takes: wall and CPU seconds, those of compiling apart.

On a core that others use too, compiling takes more seconds of the wall than of the processor, and where the
compiler has several threads, fewer. The one must not be taken from the other: both clocks are read where
compiling begins and ends.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from qdiff_jax.runtime.cache import compile_account


class Seconds(NamedTuple):
    """seconds: of the wall; cpu_seconds: of all threads of the process; both without compiling.

    compile_seconds, compile_cpu_seconds: of the two clocks while something was traced, lowered, compiled or
    read from the disk cache; computations still underway meanwhile count there. compile_cpu_seconds is None
    where it cannot be told (`runtime.cache`): cpu_seconds then includes it. compiles: programs asked for;
    cache_hits: those of them found on disk.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    compile_seconds: float = 0.0
    compile_cpu_seconds: float | None = 0.0
    compiles: int = 0
    cache_hits: int = 0


@contextlib.contextmanager
def stopwatch() -> Iterator[Callable[[], Seconds]]:
    """Yields `read()`: what was spent since; to be called inside the block."""
    with compile_account() as account:
        began, cpu_began = time.monotonic(), time.process_time()

        def read() -> Seconds:
            return Seconds(
                time.monotonic() - began - account.seconds,
                time.process_time() - cpu_began - (account.cpu_seconds or 0.0),
                account.seconds,
                account.cpu_seconds,
                account.backend_compiles,
                account.cache_hits,
            )

        yield read


def add_seconds(first: Seconds, second: Seconds) -> Seconds:
    """Of both together. What is not known of one of them is not known of their sum."""
    return Seconds(*(None if None in pair else sum(pair) for pair in zip(first, second)))
