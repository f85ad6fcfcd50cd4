"""The process of one worker, which owns one GPU."""

import gc
import sys
from typing import Protocol

import zmq

from loraplex.engine.ipc.channel import Channel, DealerChannel, worker_identity
from loraplex.engine.ipc.child import Child, run_child
from loraplex.scheduler.worker_protocol import WorkerCommand, WorkerEvent, WorkerReady


class WorkerLike(Protocol):
    """What the loop needs of a worker. It calls `wakeup` when an event comes by itself."""

    ready: WorkerReady

    def handle(self, command: WorkerCommand) -> None: ...

    def events(self, timeout_s: float = 0.0) -> list[WorkerEvent]: ...

    def close(self) -> None: ...


SWITCH_INTERVAL_S = 0.0005
"""After so long a thread that packs an adapter lets the loop have the interpreter."""


def run(child: Child) -> None:
    from loraplex.engine.worker.worker import Worker

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    worker = Worker(
        child.start.config, child.start.index, wakeup=child.wakeup.set, progress=child.progress
    )
    gc.collect()
    gc.freeze()  # what start-up made stays: later collections pass it over
    serve(child, worker)


def serve(child: Child, worker: WorkerLike) -> None:
    """Execute commands in order and send back what comes of them, until told to stop."""
    context = zmq.Context()
    identity = worker_identity(child.start.index)
    scheduler = DealerChannel(context, f"ipc://{child.start.run_dir}/workers", identity)
    scheduler.send(worker.ready)
    child.ready()
    poller = zmq.Poller()
    poller.register(child.wakeup.fileno(), zmq.POLLIN)
    poller.register(scheduler.socket, zmq.POLLIN)
    while not child.stopping:
        poller.poll()
        child.wakeup.clear()
        for _, command in scheduler.receive():
            worker.handle(command)
            send_events(worker, scheduler)  # a CPU's result must not wait for the next plan
        send_events(worker, scheduler)
    context.destroy(linger=0)


def send_events(worker: WorkerLike, scheduler: Channel) -> None:
    for event in worker.events(0.0):
        scheduler.send(event)


if __name__ == "__main__":
    run_child(run)
