"""Finds child processes that hang: stopped by a signal, or busy without any progress."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loraplex.engine.ipc.messages.lifecycle import ChildBeat
from loraplex.engine.ipc.process_state import ProcessState, process_state
from loraplex.engine.processes.process import Process

LOOK_S = 0.5
"""Seconds between two looks."""

STOPPED_S = 3.0
"""How long a process may be stopped by a signal."""


@dataclass(slots=True)
class _Seen:
    """Counts what the last looks saw of one process. Times are numbers of looks."""

    num_stopped: int = 0  # looks in a row that found it stopped
    num_still: int = 0  # looks in a row without a sign of progress
    beat: ChildBeat | None = None


class Watchdog:
    """Judges processes by looks at equal intervals.

    It counts looks, not seconds: if the supervisor itself was stopped or had no time, nothing was
    seen meanwhile, and nobody is blamed.

    A process hangs if a signal has stopped it for STOPPED_S. It also hangs if it is busy, or sends
    no beat, and its marks have not grown for `timeout_s`, or if another process has reported since
    the last look that it hangs. A process under a debugger never hangs.
    """

    def __init__(
        self, timeout_s: float, state_of: Callable[[int], ProcessState] = process_state
    ) -> None:
        self._timeout_s = timeout_s
        self._state_of = state_of
        self._seen: dict[int, _Seen] = {}  # by process id

    def look(self, processes: Sequence[Process], *, are_started: bool) -> list[tuple[Process, str]]:
        """Returns the processes that hang, each with a text that says how.

        Call it every LOOK_S seconds. Worker ranks wait for each other, so of several that are still
        only those are returned that have done least.

        Args:
            are_started: False while the engine starts, when only stopped processes count.
        """
        hung: list[tuple[Process, str]] = []
        still: list[tuple[Process, ChildBeat | None]] = []
        pids = {process.popen.pid for process in processes}
        self._seen = {pid: seen for pid, seen in self._seen.items() if pid in pids}
        for process in processes:
            seen = self._seen.setdefault(process.popen.pid, _Seen())
            reported, process.reported_hang = process.reported_hang, ""
            if process.exited.is_set() or self._is_traced(process):
                self._seen[process.popen.pid] = _Seen(beat=process.beat)
                continue
            self._update(seen, process)
            if seen.num_stopped * LOOK_S >= STOPPED_S:
                hung.append((process, f"was stopped by a signal for {STOPPED_S:g} s"))
            elif reported:
                hung.append((process, reported))
            elif are_started and seen.num_still * LOOK_S >= self._timeout_s:
                still.append((process, seen.beat))
            elif not are_started:
                seen.num_still = 0
        text = f"made no progress for {self._timeout_s:g} s (watchdog_timeout)"
        return hung or [(process, text) for process in _culprits(still)]

    def _is_traced(self, process: Process) -> bool:
        traced = process.beat is not None and process.beat.is_traced
        return traced or self._state_of(process.popen.pid).is_traced

    def _update(self, seen: _Seen, process: Process) -> None:
        is_stopped = self._state_of(process.popen.pid).is_stopped
        seen.num_stopped = seen.num_stopped + 1 if is_stopped else 0
        seen.num_still += 1
        beat, last = process.beat, seen.beat
        if beat is not None and beat is not last:
            if not beat.is_busy or last is None or beat.num_marks != last.num_marks:
                seen.num_still = 0
            seen.beat = beat


def _culprits(still: list[tuple[Process, ChildBeat | None]]) -> list[Process]:
    """Returns the processes that others do not wait for: of the workers, those that did least."""

    def done(beat: ChildBeat | None) -> tuple[int, int]:
        return (beat.num_steps, beat.num_marks_in_step) if beat is not None else (0, 0)

    least = min((done(beat) for p, beat in still if p.spec.kind == "worker"), default=(0, 0))
    return [p for p, beat in still if p.spec.kind != "worker" or done(beat) == least]
