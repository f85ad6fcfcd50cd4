"""A router's channel over engines in the test's thread, which may die, hang and come back."""

from array import array
from random import Random
from typing import Any

from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.engine.router.cluster_channel import ClusterChannel
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.frontend_protocol import AddRequest, SequenceOutput, StepOutputs

from helpers.fakes.fake_engine import BLOCK_TOKENS, FakeEngineWorker, fake_config
from helpers.running.bare_engine import BareEngine


class RoutedEngines:
    """Keeps what the frontend would get, by request. Time moves only when told."""

    def __init__(self, num_engines: int, *, placement: str = "affinity", seed: int = 0) -> None:
        self.now = 0.0
        self.channel = ClusterChannel(
            "router 0",
            placement=placement,
            block_tokens=BLOCK_TOKENS,
            scheduler=SchedulerConfig(max_queue_len=1000),
            clock=lambda: self.now,
            random=Random(seed),
        )
        self.engines: dict[str, BareEngine] = {}
        self.hung: set[str] = set()
        self.outputs: dict[int, list[SequenceOutput]] = {}
        self.replies: list[Any] = []  # that are no outputs
        self._num_started = 0
        for _ in range(num_engines):
            self.start_engine()

    def start_engine(self) -> str:
        engine_id = f"engine-{self._num_started}"
        self._num_started += 1
        self.engines[engine_id] = engine = BareEngine(
            fake_config(), FakeEngineWorker, clock=lambda: self.now
        )
        self.channel.add_engine(engine_id, engine.channel)
        return engine_id

    def kill(self, engine_id: str) -> None:
        """The engine is gone at once, with all that it has not sent."""
        self.engines.pop(engine_id)
        self.hung.discard(engine_id)
        self.channel.lose_engine(engine_id, "the test killed it")

    def add(self, request: AddRequest) -> None:
        self.outputs[request.request_id] = []
        self.channel.send(request)

    def turn(self, seconds: float = 0.05) -> None:
        """Let every engine that does not hang work, and hear what came of it."""
        self.now += seconds
        for engine_id in self.channel.engine_ids:
            engine = self.engines.get(engine_id)  # None: one that the test plays
            if engine is not None and engine_id not in self.hung:
                engine.turn()
        self.hear()

    def hear(self) -> None:
        for _, message in self.channel.receive():
            if isinstance(message, EngineInfo):
                continue
            if not isinstance(message, StepOutputs):
                self.replies.append(message)
                continue
            for output in message:
                taken = self.outputs[output.request_id]
                assert not taken or not taken[-1].finish_reason, "an output after the end"
                taken.append(output)
        self.channel.book.check_integrity()

    def tokens(self, request_id: int) -> "array[int]":
        return array("i", [t for o in self.outputs[request_id] for t in o.token_ids])

    def finish(self, max_turns: int = 2000) -> None:
        for _ in range(max_turns):
            if not len(self.channel.book):
                return
            self.turn()
        raise AssertionError(f"{len(self.channel.book)} requests did not end")
