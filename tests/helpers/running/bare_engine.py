"""An engine without frontend in the test's thread: the real scheduler and loop, any worker."""

import time
from array import array
from collections.abc import Callable
from typing import Any

from loraplex.engine.config import EngineConfig
from loraplex.engine.ipc.channel import (
    RECEIVE_LIMIT,
    InprocChannel,
    frontend_identity,
    worker_identity,
)
from loraplex.engine.processes.scheduler_loop import SchedulerLoop
from loraplex.engine.processes.scheduler_main import engine_info, make_scheduler
from loraplex.engine.processes.worker_group import WorkerGroup
from loraplex.scheduler.frontend_protocol import AddRequest, SequenceOutput, StepOutputs


class BareEngine:
    """`channel` is the end that a frontend or a router holds."""

    def __init__(
        self,
        config: EngineConfig,
        make_worker: Callable[..., Any],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.worker = make_worker(config, 0, wakeup=lambda: None)
        self.info = engine_info(config, [self.worker.ready])
        self.scheduler = make_scheduler(config, self.info, clock)
        frontends, self.channel = InprocChannel.pair(frontend_identity(0))
        workers, self._worker_end = InprocChannel.pair(worker_identity(0))
        self.loop = SchedulerLoop(
            self.scheduler,
            info=self.info,
            frontends=frontends,
            workers=WorkerGroup(workers, 1),
            messages_per_turn=RECEIVE_LIMIT,
        )

    def turn(self) -> None:
        """Run one turn of the scheduler and all that it asks of the worker."""
        self.loop.turn()
        for _, command in self._worker_end.receive():
            self.worker.handle(command)
        for event in self.worker.events(0.0):
            self._worker_end.send(event)

    def serve(self, requests: list[AddRequest]) -> dict[int, list[SequenceOutput]]:
        """Serve requests to their ends; returns the outputs of each."""
        outputs: dict[int, list[SequenceOutput]] = {r.request_id: [] for r in requests}
        for request in requests:
            self.channel.send(request)
        unfinished = set(outputs)
        while unfinished:
            self.turn()
            for _, message in self.channel.receive():
                assert isinstance(message, StepOutputs)
                for output in message:
                    outputs[output.request_id].append(output)
                    if output.finish_reason:
                        unfinished.discard(output.request_id)
        return outputs


def token_ids(outputs: list[SequenceOutput]) -> "array[int]":
    """Returns all tokens of one sequence."""
    return array("i", [token for output in outputs for token in output.token_ids])
