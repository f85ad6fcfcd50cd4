"""Lets the requests of a server end before it stops."""

import time

from loraplex.engine.config import ServerConfig
from loraplex.engine.processes.draining.stop_signals import StopSignals
from loraplex.engine.processes.process_group import ProcessGroup

LOOK_S = 0.05
SILENT_S = 0.3  # for which nothing is said


def drain(group: ProcessGroup, config: ServerConfig, signals: StopSignals) -> str:
    """Wait until the clients have their answers, the time is over, or another signal comes.

    Returns the reason for the requests that have not ended; "" if there is none to give.
    """
    grace_s, timeout_s = config.drain_grace, config.drain_timeout
    if not grace_s + timeout_s:
        return ""
    num_signals, began = signals.count, time.monotonic()
    says_so = True
    group.begin_drain(grace_s)
    while signals.count == num_signals and not (group.is_drained or group.ended.is_set()):
        elapsed_s = time.monotonic() - began
        if elapsed_s >= grace_s + timeout_s:
            return f"the server stops, and this request did not end within {timeout_s:g} s more"
        if says_so and elapsed_s >= SILENT_S:
            says_so = False
            group.tell_status(
                f"stopping: requests are accepted until {grace_s:g} s after the signal, and may "
                f"run for another {timeout_s:g} s; a second signal ends them at once"
            )
        signals.wait(LOOK_S)
    return ""
