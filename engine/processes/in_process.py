"""The engine in the caller's thread: the same frontend, scheduler and worker, no sockets.

For tests and debugging. The engine runs only while the caller waits in receive().
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgpack
import zmq

from loraplex.engine.adapters.tensors.kept_tensors import KeptTensors
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError, EngineDeadError
from loraplex.engine.frontend.clients import ClientTable
from loraplex.engine.frontend.frontend import Frontend
from loraplex.engine.frontend.inputs import load_text_codec
from loraplex.engine.frontend.mixing.named_mixes import check_adapter_config
from loraplex.engine.frontend.uploads.adapter_uploads import AdapterUploads
from loraplex.engine.ipc.activity import Activity
from loraplex.engine.ipc.channel import (
    RECEIVE_LIMIT,
    InprocChannel,
    Wakeup,
    frontend_identity,
    worker_identity,
)
from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.engine.ipc.step_clock import StepClock
from loraplex.engine.processes.scheduler_loop import SchedulerLoop
from loraplex.engine.processes.scheduler_main import engine_info, make_grammar_queue, make_scheduler
from loraplex.engine.processes.worker_group import WorkerGroup
from loraplex.engine.processes.worker_main import WorkerLike, send_events
from loraplex.engine.stores.open_stores import check_stores

CLIENT = b"client"
TICK_S = 1.0


class InProcessEngine:
    """Takes and returns the maps of docs/reference/protocol.md; Client wraps it for users.

    An error in any part is raised to the caller as it is, with its traceback.
    """

    info: EngineInfo
    is_local = True
    max_message_bytes = 0  # frames are of any size

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_progress: Callable[[str], None] | None = None,
        worker: Callable[..., WorkerLike] | None = None,
    ) -> None:
        """Load the model; ConfigError as from Engine.start(). `worker` replaces Worker."""
        check_adapter_config(config.adapter)
        check_stores(config)
        if config.parallel.tensor_parallel_size > 1:
            raise ConfigError("tensor_parallel_size must be 1 for an engine in this process")
        self._wakeup = Wakeup()
        self._worker = (worker or _worker_class())(
            config, 0, wakeup=self._wakeup.set, progress=on_progress or _ignore
        )
        self.info = engine_info(config, [self._worker.ready])
        frontends, scheduler_end = InprocChannel.pair(frontend_identity(0))
        workers, self._worker_end = InprocChannel.pair(worker_identity(0))
        self.scheduler = make_scheduler(config, self.info)
        self._grammars = make_grammar_queue(config, self.info, self._wakeup.set)
        step_clock = StepClock()
        self._loop = SchedulerLoop(
            self.scheduler,
            info=self.info,
            step_clock=step_clock,
            frontends=frontends,
            workers=WorkerGroup(workers, 1),
            grammars=self._grammars,
            messages_per_turn=RECEIVE_LIMIT,  # the worker runs in this thread: no plan can be late
        )
        self._loop.tensors = KeptTensors(config.memory.adapter_host_bytes)
        self._replies: deque[dict[str, Any]] = deque()
        self._scheduler_end = scheduler_end
        self._frontend = Frontend(
            config,
            name="frontend 0",
            info=self.info,
            codec=load_text_codec(config.model),
            scheduler=scheduler_end,
            clients_of=partial(
                ClientTable, self._take_reply, max_unread=config.server.max_client_backlog
            ),
            wakeup=self._wakeup,
        )
        self._frontend.tensor_loads.uploads = AdapterUploads(config, self._wakeup)
        self._frontend.step_clock = step_clock
        self._poller = zmq.Poller()
        self._poller.register(self._wakeup.fileno(), zmq.POLLIN)
        self._activity = Activity()
        self._next_tick = 0.0
        self._closed = False

    def send(self, message: dict[str, Any], frames: Sequence[memoryview] = ()) -> None:
        self._check_open()
        self._frontend.on_message(CLIENT, message, frames=frames)

    def receive(self, timeout_s: float | None) -> list[dict[str, Any]]:
        """Run the engine until there are replies, or for `timeout_s`; [] then."""
        self._check_open()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._replies:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left < 0:
                break
            if not self.step() and not self._replies:  # an error may be a reply without a step
                waits = [wait for wait in (left, self._loop.due_s) if wait is not None]
                self._poller.poll(int(min(waits) * 1000) + 1 if waits else None)
                self._wakeup.clear()
        replies = list(self._replies)
        self._replies.clear()
        return replies

    def _take_reply(self, client: bytes, data: bytes) -> None:
        reply = msgpack.unpackb(data, strict_map_key=False)
        if reply["type"] != "ping":  # this client does not leave unseen
            self._replies.append(reply)

    def is_lost(self) -> bool:
        return self._closed

    def step(self) -> bool:
        """Run one turn of every part; False if there was nothing to do."""
        self._frontend.run_ready()
        if time.monotonic() >= self._next_tick:
            self._frontend.tick()
            self._next_tick = time.monotonic() + TICK_S
        busy = self._loop.turn()
        for _, command in self._worker_end.receive():
            self._worker.handle(command)
            send_events(self._worker, self._worker_end, self._activity)
            busy = True
        for event in self._worker.events(0.0):
            self._worker_end.send(event)
            busy = True
        for _, message in self._scheduler_end.receive():
            self._frontend.on_scheduler(message)
            busy = True
        return busy

    def close(self) -> None:
        """Idempotent."""
        if not self._closed:
            self._closed = True
            self._frontend.close()
            self._worker.close()
            if self._grammars is not None:
                self._grammars.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineDeadError("the engine was closed")


def _ignore(text: str) -> None:
    """The default of `on_progress`."""


def _worker_class() -> Callable[..., WorkerLike]:
    from loraplex.engine.worker.worker import Worker  # loads torch

    return Worker
