"""Seconds of a piece of work: compiling apart, each clock for itself."""

import time

import jax

from qdiff_jax.runtime.seconds import Seconds, add_seconds, stopwatch

COMPILE = "/jax/core/compile/backend_compile_duration"


def work(seconds: float) -> None:
    """Keeps the processor busy for so long by its own clock."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_compiling_that_waits_for_the_core_takes_nothing_from_the_cpu_seconds_of_the_rest():
    with stopwatch() as read:
        work(0.05)
        jax.monitoring.record_scalar(COMPILE, 0.0)
        time.sleep(0.3)
        jax.monitoring.record_event_duration_secs(COMPILE, 0.3)
        spent = read()
    assert spent.compile_seconds >= 0.3
    assert spent.compile_cpu_seconds < 0.05 <= spent.cpu_seconds
    assert spent.seconds >= 0.05
    assert spent.compiles == 1


def test_what_is_not_known_of_a_part_is_not_known_of_the_whole():
    known, unknown = Seconds(1.0, 2.0, 3.0, 4.0, 5, 6), Seconds(1.0, 1.0, 1.0, None, 1, 1)
    assert add_seconds(known, known) == Seconds(2.0, 4.0, 6.0, 8.0, 10, 12)
    assert add_seconds(known, unknown) == Seconds(2.0, 3.0, 4.0, None, 6, 7)
