"""Counts what the loop of a child does, for the watchdog of the supervisor."""

import sys
import threading

from loraplex.engine.ipc.messages.lifecycle import ChildBeat


class Activity:
    """Counts the work of one loop. The loop alone writes it; another thread may read it.

    A loop that waits for a message is idle, however long it waits. A loop between `begin` and `end`
    is busy, and so is a worker whose device has steps to finish.
    """

    __slots__ = ("_is_in_turn", "_num_marks", "_num_marks_in_step", "_num_open", "_num_steps")

    def __init__(self) -> None:
        self._is_in_turn = True  # a process that starts is busy
        self._num_marks = 0
        self._num_marks_in_step = 0
        self._num_open = 0
        self._num_steps = 0

    def begin(self) -> None:
        """Begin a turn of the loop."""
        self._is_in_turn = True
        self._num_marks += 1

    def mark(self) -> None:
        """Note that the turn goes on: a part of it is done."""
        self._num_marks += 1
        self._num_marks_in_step += 1

    def end(self) -> None:
        """End the turn: the loop waits for messages."""
        self._is_in_turn = False

    def begin_step(self) -> None:
        """Note that a step is about to be launched."""
        self._num_steps += 1
        self._num_open += 1
        self._num_marks_in_step = 0

    def end_step(self) -> None:
        """Note that the result of the oldest open step has come."""
        self._num_open -= 1
        self._num_marks += 1

    def beat(self) -> ChildBeat:
        """Returns the report to the supervisor."""
        return ChildBeat(
            num_marks=self._num_marks,
            is_busy=self._is_in_turn or self._num_open > 0,
            is_traced=is_traced(),
            num_steps=self._num_steps,
            num_marks_in_step=self._num_marks_in_step,
        )


def is_traced() -> bool:
    """Tells whether a Python debugger may stop this process's threads."""
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    return (
        sys.gettrace() is not None
        or threading.gettrace() is not None
        or (monitoring is not None and monitoring.get_tool(monitoring.DEBUGGER_ID) is not None)
    )
