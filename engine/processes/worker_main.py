"""Runs a worker, which owns one GPU: ``python -m loraplex.engine.processes.worker_main``."""

import gc
import sys
from typing import Protocol

import zmq

from loraplex.backends.collective.errors import RankLostError
from loraplex.engine.ipc.activity import Activity
from loraplex.engine.ipc.channel import (
    Channel,
    DealerChannel,
    PeerGoneError,
    worker_identity,
)
from loraplex.engine.ipc.child import Child, run_child
from loraplex.scheduler.worker_protocol import (
    StepPlan,
    StepResult,
    WorkerCommand,
    WorkerEvent,
    WorkerReady,
)


class WorkerLike(Protocol):
    """The interface of a worker. It calls `wakeup` when an event comes without a command."""

    ready: WorkerReady

    def handle(self, command: WorkerCommand) -> None: ...

    def events(self, timeout_s: float = 0.0) -> list[WorkerEvent]: ...

    def close(self) -> None: ...


SWITCH_INTERVAL_S = 0.0005
"""Longest time that another thread keeps the interpreter while the loop waits for it."""


def run(child: Child) -> None:
    gc.disable()  # what imports make stays; collections would take a seventh of their time
    from loraplex.engine.worker.worker import Worker

    gc.freeze()
    gc.enable()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        worker = Worker(
            child.start.config,
            child.start.index,
            wakeup=child.wakeup.set,
            progress=child.progress,
            store=f"{child.start.run_dir}/ranks",
            on_layer=child.activity.mark,
            folder_server=child.start.folder_server,
        )
        gc.collect()
        gc.freeze()  # objects made at start stay; later collections skip them
        serve(child, worker)
        worker.close_profile()
    except RankLostError as error:  # the other rank's own end says more
        raise PeerGoneError(str(error)) from error


def serve(child: Child, worker: WorkerLike) -> None:
    """Execute commands in order and send back the events, until the supervisor stops the child."""
    context = zmq.Context()
    identity = worker_identity(child.start.index)
    scheduler = DealerChannel(context, f"ipc://{child.start.run_dir}/workers", identity)
    scheduler.send(worker.ready)
    activity = child.activity
    activity.end()
    child.ready()
    poller = zmq.Poller()
    poller.register(child.wakeup.fileno(), zmq.POLLIN)
    poller.register(scheduler.socket, zmq.POLLIN)
    while not child.stopping:
        poller.poll()
        activity.begin()
        child.wakeup.clear()
        for _, command in scheduler.receive():
            if isinstance(command, StepPlan):
                activity.begin_step()
            worker.handle(command)
            send_events(worker, scheduler, activity)  # a CPU's result must not wait for a plan
        send_events(worker, scheduler, activity)
        activity.end()
    context.destroy(linger=0)


def send_events(worker: WorkerLike, scheduler: Channel, activity: Activity) -> None:
    """Send the events that there are, and note in `activity` which of them end a step."""
    for event in worker.events(0.0):
        if isinstance(event, StepResult):
            activity.end_step()
        scheduler.send(event)


if __name__ == "__main__":
    run_child(run)
