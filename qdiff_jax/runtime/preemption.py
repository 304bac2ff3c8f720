"""Noticing that the machine is about to be taken away (SIGTERM), between two steps."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def preemption_notice() -> Iterator[Callable[[int], bool]]:
    """Yields `asked(step)`: whether this run should save and stop now.

    In one process SIGTERM and SIGINT set it (a second one acts as usual). With several, they must
    agree on the step at which they stop: JAX's coordination service tells all of them, and every
    process has to call `asked` with the same steps.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # only the main thread may handle signals
        return
    received = []
    previous = {}

    def note(number, frame):
        received.append(number)
        signal.signal(number, previous[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, note)
    try:
        yield lambda step: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
