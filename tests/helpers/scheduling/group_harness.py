"""Runs a scheduler against a group of fake worker ranks that work and answer at different times."""

import math
from collections import deque
from collections.abc import Iterator
from typing import Any

from loraplex.engine.ipc import codec
from loraplex.engine.ipc.channel import worker_identity
from loraplex.engine.processes.adapter_deadlines import LOOK_S, AdapterDeadlines
from loraplex.engine.processes.worker_group import WorkerGroup
from loraplex.scheduler.worker_protocol import (
    AdapterEvicted,
    AdapterInspected,
    DropAdapter,
    InspectAdapter,
    LoadAdapter,
    StepPlan,
    StepResult,
    UnloadAdapter,
)

from helpers.fakes.fake_worker import FakeAdapter, FakeWorker
from helpers.scheduling.scheduler_harness import Harness


class FakeRank:
    """One worker rank. It executes its commands in order; its answers wait to be sent.

    Attributes:
        results: results of steps, which leave in order.
        answers: answers to adapter commands, and evictions.
        steps: all results so far, for comparison with other ranks.
    """

    def __init__(self, like: FakeWorker, max_host: int) -> None:
        self.worker = FakeWorker(
            num_pages=like.num_pages,
            block_tokens=like.block_tokens,
            max_num_seqs=like.max_num_seqs,
            max_num_batched_tokens=like.max_num_batched_tokens,
            max_adapter_slots=like.max_adapter_slots,
            files={},
            max_host=max_host,
        )
        self.commands: deque[Any] = deque()
        self.results: deque[StepResult] = deque()
        self.answers: list[Any] = []
        self.steps: list[StepResult] = []

    def work(self) -> None:
        """Execute the oldest command."""
        command = self.commands.popleft()
        match command:
            case StepPlan():
                self.results.append(self.worker.step(command))
                self.steps.append(self.results[-1])
            case InspectAdapter():
                self.answers.append(self.worker.inspect(command))
            case LoadAdapter():
                self.answers.append(self.worker.load(command))
            case UnloadAdapter():
                self.worker.unload(command)
            case DropAdapter():
                self.worker.drop(command)
        self.answers += self.worker.take_evicted()

    def sendable(self) -> Iterator[int]:
        """Yields the indices of the answers that may be sent next.

        An answer may overtake others, as with adapters of different sizes. It overtakes neither
        an eviction nor an answer about the same adapter.
        """
        before = set()
        for index, answer in enumerate(self.answers):
            keys = _keys(answer)
            if not keys & before:
                yield index
            before |= keys
            if isinstance(answer, AdapterEvicted):
                return


def _keys(answer: Any) -> set[Any]:
    keys = {answer.content_hash} - {""}
    return keys | {answer.name} if isinstance(answer, AdapterInspected) else keys


class GroupHarness(Harness):
    """A Harness whose worker is a group. A rank works and answers only when a test says so.

    `verify` runs after each operation. A rank may take `answer_s` for an adapter command.

    Attributes:
        hung: the ranks found to hang, and how.
    """

    def __init__(
        self,
        *,
        num_ranks: int = 2,
        max_host: int = 0,
        answer_s: float = math.inf,
        hang_s: float = math.inf,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.ranks = [FakeRank(self.worker, max_host) for _ in range(num_ranks)]
        self.hung: dict[int, str] = {}
        deadlines = AdapterDeadlines(
            num_ranks, answer_s=answer_s, hang_s=hang_s, clock=lambda: self.now
        )
        self.group = WorkerGroup(self, num_ranks, deadlines)
        self._inbox: list[tuple[bytes, Any]] = []

    # The channel of the group

    def send_encoded(self, data: bytes, peer: bytes) -> None:
        (rank,) = (r for i, r in enumerate(self.ranks) if worker_identity(i) == peer)
        rank.commands.append(codec.decode(data))

    def receive(self, limit: int = 1000) -> list[tuple[bytes, Any]]:
        taken, self._inbox = self._inbox[:limit], self._inbox[limit:]
        return taken

    # Files

    def file(self, path: str, content: str, num_pages: int = 1, error: str = "") -> None:
        """Every rank finds the same file; break_file() changes it for one of them."""
        super().file(path, content, num_pages, error)
        for rank in self.ranks:
            rank.worker.files[path] = FakeAdapter(content, num_pages, error)

    def break_file(self, path: str, rank: int, error: str) -> None:
        self.ranks[rank].worker.files[path].error = error

    # The engine

    def plan(self) -> StepPlan | None:
        plan = self.scheduler.plan()
        self.send_commands()
        self.take_updates()
        self.verify()
        if plan is not None:
            self.plans.append(plan)
            self.group.send(plan)
        return plan

    def send_commands(self) -> None:
        for command in self.scheduler.take_commands():
            self.group.send(command)

    def look(self, seconds: int = 1) -> None:
        """Let time pass, and fail what waits for answers that are overdue."""
        for _ in range(seconds):
            self.now += LOOK_S
            for overdue in self.group.deadlines.look():
                self.scheduler.fail_waiting(overdue.command, overdue.text)
                if overdue.hang:
                    self.hung[overdue.rank] = overdue.hang
        self.take_updates()
        self.verify()

    def plan_all(self) -> None:
        while self.plan() is not None:
            pass

    def answer(self, rank: int, index: int = 0) -> bool:
        """Have a rank send an answer, a step's result if it has none at `index`.

        Returns False if it has nothing to send.
        """
        sender = self.ranks[rank]
        if index < len(sender.answers):
            self.send(rank, sender.answers.pop(index))
        elif sender.results:
            self.send(rank, sender.results.popleft())
        else:
            return False
        return True

    def send(self, rank: int, message: Any) -> None:
        """Bring a message of a rank to the group, and what it completes to the scheduler."""
        self._inbox.append((worker_identity(rank), message))
        for event in self.group.receive():
            if isinstance(event, StepResult):
                self.results.append(event)
                self.commit()
            else:
                self.events.append(event)
                self.deliver_event()
        self.send_commands()

    def run_rank(self, rank: int) -> bool:
        """Let a rank do and send all it can. Returns False if there was nothing."""
        one, moved = self.ranks[rank], False
        while one.commands or one.answers or one.results:
            if one.commands:
                one.work()
            else:
                self.answer(rank)
            moved = True
        return moved

    def turn(self) -> bool:
        self.now += 1.0
        before = len(self.plans)
        self.plan_all()
        moved = [self.run_rank(rank) for rank in range(len(self.ranks))]
        return len(self.plans) > before or any(moved)

    def check_all_ended(self) -> None:
        """Also: all ranks ran the same steps and hold the adapters that the scheduler knows."""
        super().check_all_ended()
        resident = {
            info["adapter_slot"]: (info["content_hash"], info["num_pages"])
            for info in self.list_resident()
        }
        for rank in self.ranks:
            assert rank.steps == self.ranks[0].steps
            held = {slot: (name, len(ids)) for slot, (name, ids) in rank.worker.adapters.items()}
            assert held == resident
            for info in self.listed().values():
                if rank.worker.max_host and info["tier"] == "host":
                    assert info["content_hash"] in rank.worker.host
