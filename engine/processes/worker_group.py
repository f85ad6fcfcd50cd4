"""All worker ranks of one engine, as the scheduler sees them: one worker."""

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any, Protocol, TypeVar, cast

from msgspec.structs import replace

from loraplex.engine.errors import ConfigError
from loraplex.engine.ipc import codec
from loraplex.engine.ipc.channel import RECEIVE_LIMIT, worker_identity
from loraplex.engine.processes.adapter_deadlines import AdapterDeadlines
from loraplex.scheduler.worker_protocol import (
    AdapterEvicted,
    AdapterInspected,
    AdapterLoaded,
    InspectAdapter,
    LoadAdapter,
    StepPlan,
    StepResult,
    UnloadAdapter,
    WorkerCommand,
    WorkerEvent,
    WorkerReady,
)

_SAME_ON_ALL_RANKS = ("num_layers", "vocab_size", "base_fingerprint", "eos_token_ids")

Answer = TypeVar("Answer", AdapterInspected, AdapterLoaded)


class WorkerChannel(Protocol):
    """The binding end of the edge to the workers."""

    def send_encoded(self, data: bytes, peer: bytes) -> None: ...

    def receive(self, limit: int = RECEIVE_LIMIT) -> list[tuple[bytes, Any]]: ...


class WorkerGroup:
    """Sends each command to all ranks and returns one event where each rank sends one.

    A command is encoded once. Its answer is returned when every rank has answered, and it is an
    error if any rank reports an error. Commands reach every rank in the same order.

    Attributes:
        ready: the handshake of each rank that has sent it.
        has_more: the last receive() stopped at its limit, so there may be more messages.
        deadlines: finds the adapter commands that a rank does not answer.
    """

    def __init__(
        self, channel: WorkerChannel, size: int, deadlines: AdapterDeadlines | None = None
    ) -> None:
        self._channel = channel
        self.deadlines = deadlines or AdapterDeadlines(size)
        self._rank_of = {worker_identity(rank): rank for rank in range(size)}
        self.ready: dict[int, WorkerReady] = {}
        self.has_more = False
        self._open = _OpenCommands(size)
        self._missing = _HostMisses(size)

    @property
    def is_ready(self) -> bool:
        return len(self.ready) == len(self._rank_of)

    def send(self, command: WorkerCommand) -> None:
        """Send a command to all ranks. Never waits; raises PeerGoneError for a rank that left."""
        data = codec.encode(command)
        for name in self._rank_of:
            self._channel.send_encoded(data, name)
        self.deadlines.add(command)
        if len(self._rank_of) > 1:
            self._open.add(command)

    def receive(self, limit: int = RECEIVE_LIMIT) -> list[WorkerEvent]:
        """Take at most `limit` messages. Returns the events that are complete; never waits.

        Raises:
            ValueError: a message comes from no rank, or a rank answers what was not asked or has
                left out a step.
        """
        events: list[WorkerEvent] = []
        messages = self._channel.receive(limit)
        self.has_more = len(messages) == limit
        for peer, message in messages:
            rank = self._rank_of.get(peer)
            if rank is None:
                raise ValueError(f"{peer!r} is no worker rank; it sent {type(message).__name__}")
            if isinstance(message, WorkerReady):
                self._on_ready(rank, message)
                continue
            self.deadlines.on_answer(rank, message)
            events += self._merge(rank, message) if len(self._rank_of) > 1 else [message]
        return events

    def _on_ready(self, rank: int, message: WorkerReady) -> None:
        if message.rank != rank or rank in self.ready:
            raise ValueError(f"worker {rank} sent the handshake of rank {message.rank}, or twice")
        self.ready[rank] = message

    def _merge(self, rank: int, message: WorkerEvent) -> list[WorkerEvent]:
        """Take a message of one rank. Returns the events that it completes."""
        if isinstance(message, AdapterEvicted):
            return [message] if self._missing.on_evicted(rank, message.content_hash) else []
        if isinstance(message, AdapterInspected | AdapterLoaded) and not message.error:
            self._missing.on_stored(rank, message.content_hash)
        answers = self._open.take(rank, message)
        if answers is None:
            return []
        if isinstance(message, StepResult):
            return [answers[0]]
        if isinstance(message, AdapterInspected):
            event: WorkerEvent = _merge_inspected(answers)
        else:
            event = _merge_loaded(answers)
            self._undo_partial_load(answers)
        content_hash = cast(AdapterInspected | AdapterLoaded, event).content_hash
        if content_hash and self._missing.has(content_hash):
            return [event, AdapterEvicted(content_hash)]  # a rank evicted it while others loaded
        return [event]

    def _undo_partial_load(self, answers: Sequence[AdapterLoaded]) -> None:
        """Unload the adapter from the ranks that have it, where a load failed on others.

        No later command names the slot yet: the scheduler learns of the load from this answer.
        """
        if any(answer.error for answer in answers):
            data = codec.encode(UnloadAdapter(answers[0].adapter_slot))
            for name, rank in self._rank_of.items():
                if not answers[rank].error:
                    self._channel.send_encoded(data, name)


class _OpenCommands:
    """Commands that not all ranks have answered, by what their answers repeat of them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._answers: dict[Hashable, deque[list[Any]]] = {}  # None: the rank has not answered
        self._steps: dict[Hashable, None] = {}  # the open steps, in order

    def add(self, command: WorkerCommand) -> None:
        match command:
            case StepPlan():
                key: Hashable = command.step_id
                self._steps[key] = None
            case InspectAdapter():
                key = (command.name, command.path)
            case LoadAdapter():
                key = (command.adapter_slot, command.content_hash)
            case _:
                return  # no answer comes
        self._answers.setdefault(key, deque()).append([None] * self._size)

    def take(self, rank: int, answer: object) -> list[Any] | None:
        """Take one rank's answer. Returns the answers of all ranks once the last one is in.

        Equal commands may be open at a time. A rank answers them in the order they were sent.
        """
        match answer:
            case StepResult():
                key: Hashable = answer.step_id
            case AdapterInspected():
                key = (answer.name, answer.path)
            case AdapterLoaded():
                key = (answer.adapter_slot, answer.content_hash)
            case _:
                raise ValueError(f"worker {rank} sent {type(answer).__name__}")
        waiting = self._answers.get(key, ())
        answers = next((answers for answers in waiting if answers[rank] is None), None)
        if answers is not None and isinstance(answer, StepResult):
            self._check_order(rank, answer.step_id)
        if answers is None:
            raise ValueError(
                f"worker {rank} sent {type(answer).__name__} for {key!r:.200}, which no command "
                "asks for or which it has answered"
            )
        answers[rank] = answer
        if any(one is None for one in answers):
            return None
        self._answers[key].popleft()
        if not self._answers[key]:
            del self._answers[key]
            self._steps.pop(key, None)
        return answers

    def _check_order(self, rank: int, step_id: int) -> None:
        """A rank answers steps in order. One that leaves out a step would never end it."""
        for open_id in self._steps:
            if open_id == step_id:
                return
            if self._answers[open_id][0][rank] is None:
                raise ValueError(
                    f"worker {rank} sent the result of step {step_id} before that of step {open_id}"
                )


class _HostMisses:
    """The ranks whose host store lacks an adapter that others may have.

    For the scheduler, an adapter is in host memory only while all ranks have it.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._ranks: dict[str, set[int]] = {}

    def has(self, content_hash: str) -> bool:
        return content_hash in self._ranks

    def on_stored(self, rank: int, content_hash: str) -> None:
        ranks = self._ranks.get(content_hash)
        if ranks is not None:
            ranks.discard(rank)
            if not ranks:
                del self._ranks[content_hash]

    def on_evicted(self, rank: int, content_hash: str) -> bool:
        """Returns True for the first rank that evicts it."""
        ranks = self._ranks.setdefault(content_hash, set())
        ranks.add(rank)
        is_first = len(ranks) == 1
        if len(ranks) == self._size:
            del self._ranks[content_hash]
        return is_first


def merge_ready(workers: Sequence[WorkerReady]) -> WorkerReady:
    """Returns the handshake of the group: the least pages and context.

    Raises:
        ConfigError: the ranks do not run the same model.
    """
    first = workers[0]
    for worker in workers:
        for name in _SAME_ON_ALL_RANKS:
            mine, other = getattr(first, name), getattr(worker, name)
            if mine != other:
                raise ConfigError(
                    f"worker {first.rank} and worker {worker.rank} do not run the same model: "
                    f"{name} is {mine!r:.80} and {other!r:.80}; give all ranks the same files"
                )
    return replace(
        first,
        num_pages=min(worker.num_pages for worker in workers),
        max_model_len=min(worker.max_model_len for worker in workers),
        load_seconds=max(worker.load_seconds for worker in workers),
    )


def _merge_inspected(answers: Sequence[AdapterInspected]) -> AdapterInspected:
    failed = _first_failed(answers)
    if failed is not None:
        return failed
    first = answers[0]
    for name in AdapterInspected.__struct_fields__:
        if name in ("num_pages", "num_bytes"):
            continue
        values = [getattr(answer, name) for answer in answers]
        if any(value != values[0] for value in values):
            text = f"adapter {first.name!r}: the worker ranks read different files at {first.path}"
            return AdapterInspected(first.name, first.path, error=f"{text} ({name})")
    return replace(
        first,
        num_pages=max(answer.num_pages for answer in answers),
        num_bytes=sum(answer.num_bytes for answer in answers),
    )


def _merge_loaded(answers: Sequence[AdapterLoaded]) -> AdapterLoaded:
    merged = _first_failed(answers) or answers[0]
    return replace(
        merged,
        load_us=max(answer.load_us for answer in answers),
        from_host=all(answer.from_host for answer in answers),
    )


def _first_failed(answers: Sequence[Answer]) -> Answer | None:
    """Returns the first error among the answers, with the rank in its text; transient ones last."""
    failed = [(rank, answer) for rank, answer in enumerate(answers) if answer.error]
    if not failed:
        return None
    rank, answer = min(failed, key=lambda item: item[1].is_transient)
    return replace(answer, error=f"worker {rank}: {answer.error}")
