"""Signals that ask a server to stop are counted, and wake it."""

import os
import signal

from loraplex.engine.processes.draining.stop_signals import StopSignals


def test_signals_are_counted_and_end_the_wait() -> None:
    former = signal.getsignal(signal.SIGTERM)
    counts: list[int] = []
    with StopSignals(counts.append) as signals:
        signals.wait(0.0)
        assert signals.count == 0
        os.kill(os.getpid(), signal.SIGTERM)
        signals.wait(600.0)
        os.kill(os.getpid(), signal.SIGINT)
        signals.wait(600.0)
        assert signals.count == 2 and counts == [1, 2]
        signals.wait(0.0)  # both have been seen
    assert signal.getsignal(signal.SIGTERM) is former
