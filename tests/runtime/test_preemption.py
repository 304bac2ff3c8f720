"""One signal asks to stop; a second one acts as it would have without us."""

import os
import signal
import threading

import pytest

from qdiff_jax.runtime.preemption import preemption_notice


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also where the shell started the tests with it ignored."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


@pytest.mark.usefixtures("interruptible")
def test_the_first_signal_is_noted_the_second_acts():
    before = signal.getsignal(signal.SIGINT)
    with preemption_notice() as asked:
        assert not asked(0)
        os.kill(os.getpid(), signal.SIGINT)
        assert asked(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_nothing_is_installed():
    answers = []

    def run():
        with preemption_notice() as asked:
            answers.append((asked(0), signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert answers == [(False, before)]
