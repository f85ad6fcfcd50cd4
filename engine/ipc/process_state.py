"""The kernel's view of a process: whether it is stopped, and whether a debugger holds it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessState:
    """Tells whether a process may run.

    Attributes:
        is_stopped: a signal such as SIGSTOP has stopped it.
        is_traced: a debugger is attached to it.
    """

    is_stopped: bool = False
    is_traced: bool = False


def process_state(pid: int) -> ProcessState:
    """Returns the state of a process; neither stopped nor traced if it is gone or not visible."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
    except OSError:
        return ProcessState()
    state, tracer = fields.get("State", "").strip(), fields.get("TracerPid", "0").strip()
    return ProcessState(is_stopped=state.startswith("T"), is_traced=tracer != "0")
