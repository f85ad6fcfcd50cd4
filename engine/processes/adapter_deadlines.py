"""Finds adapter commands that a worker rank, although it lives, does not answer."""

import math
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

from loraplex.scheduler.worker_protocol import (
    AdapterInspected,
    AdapterLoaded,
    InspectAdapter,
    LoadAdapter,
    StepPlan,
    StepResult,
)

LOOK_S = 1.0
"""Seconds between two looks."""

ANSWER_S = 120.0
"""How long a rank may take for a command once it has answered those before it."""


@dataclass(slots=True)
class OverdueAnswer:
    """A command that a rank has not answered in time.

    Attributes:
        text: the rank and what it has not done, for the clients that wait for the adapter.
        hang: how the rank hangs, if it is to be killed for that; else empty.
        is_new: no look has returned it before.
    """

    rank: int
    command: InspectAdapter | LoadAdapter
    text: str
    hang: str
    is_new: bool


class AdapterDeadlines:
    """Judges the ranks' answers by looks at equal intervals.

    A command is overdue if neither it nor one before it was answered for ANSWER_S. A rank hangs if
    it answers neither an overdue command nor one that came later for `hang_s`. Inspections and
    loads are judged apart, because different threads of the worker do them.

    A rank's clock counts looks, so that a pause of the scheduler's own process blames nobody. It
    stands still while a step runs: the rank's loop answers between steps.
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        hang_s: float = math.inf,
        answer_s: float = ANSWER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without `hang_s` no rank hangs, however long it is silent."""
        self._hang_s = hang_s
        self._answer_s = answer_s
        self._clock = clock
        self._ranks = [_Rank() for _ in range(num_ranks)]
        self._looked_at = clock()

    @property
    def due_s(self) -> float | None:
        """Seconds until look() must be called, None if all commands are answered."""
        if not any(queue for rank in self._ranks for queue in rank.queues.values()):
            return None
        return max(0.0, self._looked_at + LOOK_S - self._clock())

    def add(self, command: object) -> None:
        """Note a command that is sent to all ranks."""
        if isinstance(command, InspectAdapter | LoadAdapter) and self.due_s is None:
            self._looked_at = self._clock()
        for rank in self._ranks:
            if isinstance(command, StepPlan):
                rank.num_steps += 1
            elif isinstance(command, InspectAdapter | LoadAdapter):
                rank.queues[type(command)].add(command, rank.now)

    def on_answer(self, rank: int, answer: object) -> None:
        """Note a rank's message. Answers that no command asks for do no harm here."""
        one = self._ranks[rank]
        match answer:
            case StepResult():
                one.num_steps -= 1
                one.has_moved = True
            case AdapterInspected():
                one.queues[InspectAdapter].remove((answer.name, answer.path), one.now)
            case AdapterLoaded():
                one.queues[LoadAdapter].remove((answer.adapter_slot, answer.content_hash), one.now)

    def look(self) -> list[OverdueAnswer]:
        """Returns all overdue commands every LOOK_S seconds, nothing in between."""
        if self.due_s != 0:
            return []
        self._looked_at = self._clock()
        return [overdue for rank in range(len(self._ranks)) for overdue in self._overdue(rank)]

    def _overdue(self, number: int) -> Iterator[OverdueAnswer]:
        rank = self._ranks[number]
        if not rank.num_steps or rank.has_moved:
            rank.now += LOOK_S
        rank.has_moved = False
        for queue in rank.queues.values():
            fresh = queue.expire(rank.now, self._answer_s)
            hangs = queue.silent_s(rank.now) >= self._hang_s
            for command in queue.overdue():
                verb = "reading" if isinstance(command, InspectAdapter) else "loading"
                text = f"worker {number} has not finished {verb} it within {self._answer_s:g} s"
                hang = (
                    f"has not finished {verb} the adapter at {command.path} within "
                    f"{self._hang_s:g} s, nor any that came later"
                )
                yield OverdueAnswer(number, command, text, hang if hangs else "", command in fresh)


def _key(command: InspectAdapter | LoadAdapter) -> Hashable:
    if isinstance(command, InspectAdapter):
        return command.name, command.path
    return command.adapter_slot, command.content_hash


class _Unanswered:
    """Commands of one kind that a rank has not answered, in the order they were sent.

    The scheduler sends no command again before its answer.
    """

    def __init__(self) -> None:
        self._waiting: dict[Hashable, tuple[InspectAdapter | LoadAdapter, float]] = {}
        self._overdue: dict[Hashable, tuple[InspectAdapter | LoadAdapter, float]] = {}
        self._last_answer = 0.0
        self._first_since = 0.0  # the last answer to a command before the first that waits

    def __bool__(self) -> bool:
        return bool(self._waiting or self._overdue)

    def add(self, command: InspectAdapter | LoadAdapter, now: float) -> None:
        self._waiting[_key(command)] = command, now

    def remove(self, key: Hashable, now: float) -> None:
        self._last_answer = now
        if key == next(iter(self._waiting), None):
            self._first_since = now
        self._waiting.pop(key, None)
        self._overdue.pop(key, None)

    def expire(self, now: float, answer_s: float) -> list[InspectAdapter | LoadAdapter]:
        """Returns the commands that have become overdue. They do so in the order they were sent."""
        expired = []
        while self._waiting:
            key, (command, sent_at) = next(iter(self._waiting.items()))
            if now - max(sent_at, self._first_since) < answer_s:
                break
            self._overdue[key] = self._waiting.pop(key)
            self._first_since = self._last_answer
            expired.append(command)
        return expired

    def overdue(self) -> Iterator[InspectAdapter | LoadAdapter]:
        return (command for command, _ in self._overdue.values())

    def silent_s(self, now: float) -> float:
        """Returns how long an overdue command and all that came later have had no answer."""
        sent = [sent_at for _, sent_at in self._overdue.values() if sent_at >= self._last_answer]
        return now - min(sent, default=now)


class _Rank:
    """The commands that one rank has to answer, and its clock in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_steps = 0  # that it has not ended
        self.has_moved = False  # it has ended a step since the last look
        self.queues: dict[type, _Unanswered] = {
            InspectAdapter: _Unanswered(),
            LoadAdapter: _Unanswered(),
        }
