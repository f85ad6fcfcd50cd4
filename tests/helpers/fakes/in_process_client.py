"""Makes clients over a whole engine in one thread: real frontend and scheduler, fake worker."""

from collections.abc import Iterator
from typing import Any

from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.engine.processes.in_process import InProcessEngine
from loraplex.entrypoints.client.outputs import RequestOutput
from loraplex.entrypoints.client.sync_client import Client

from helpers.fakes.fake_engine import FakeEngineWorker, fake_config

TEN = SamplingParams(max_tokens=10, temperature=0.0)


class RecordingEngine(InProcessEngine):
    """Keeps the replies that it gives out in `replies`."""

    def __init__(self, **parts: Any) -> None:
        self.replies: list[dict[str, Any]] = []
        super().__init__(fake_config(**parts), worker=FakeEngineWorker)

    def receive(self, timeout_s: float | None) -> list[dict[str, Any]]:
        replies = super().receive(timeout_s)
        self.replies += replies
        return replies


class InProcessClient(Client):
    """A client that keeps its engine at hand."""

    def __init__(self, **parts: Any) -> None:
        self.engine = RecordingEngine(**parts)
        super().__init__(self.engine)


def last(outputs: Iterator[RequestOutput]) -> RequestOutput:
    return list(outputs)[-1]
