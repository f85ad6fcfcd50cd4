"""Runs an HTTP frontend: ``python -m loraplex.entrypoints.http.main``."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn
import uvloop
import zmq

from loraplex.engine.frontend.inputs import load_text_codec
from loraplex.engine.ipc.channel import Channel, DealerChannel
from loraplex.engine.ipc.child import Child, run_child
from loraplex.engine.ipc.messages.frontend import FrontendHello
from loraplex.engine.processes.addresses.http_address import http_endpoint
from loraplex.engine.processes.addresses.shared_address import inherited_http_listener
from loraplex.engine.processes.draining.child_drain import ChildDrain
from loraplex.engine.processes.frontend_main import (
    give_large_buffers_back,
    raise_descriptor_limit,
    seed_salt,
)
from loraplex.entrypoints.http.app import make_app
from loraplex.entrypoints.http.bounded_protocol import BoundedProtocol
from loraplex.entrypoints.http.engine_link import TICK_S, EngineLink
from loraplex.entrypoints.http.socket_watch import SocketWatch

KEEP_ALIVE_S = 75  # longer than clients keep idle connections, so that they close first
GRACE_S = 1  # for the last errors to reach the clients
DRAIN_LOOK_S = 0.1


class _Server(uvicorn.Server):
    """Leaves the signals to the engine's supervisor."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(frozen=True, slots=True)
class EngineSide:
    """The part below the HTTP server's frontend: one engine's scheduler, or a cluster's router.

    Attributes:
        has_answers: tells whether the channel has something to receive.
        follow: is called now and then; returns the seconds until the next call.
        step_clock: file of the scheduler's StepClock, "" if there are many.
    """

    channel: Channel
    has_answers: Callable[[], bool]
    follow: Callable[[], float] = lambda: TICK_S
    step_clock: str = ""


Connect = Callable[[Child, "zmq.Context[Any]", SocketWatch], EngineSide]


def connect_scheduler(
    child: Child, context: "zmq.Context[Any]", sockets: SocketWatch
) -> EngineSide:
    """Connects this process with the scheduler of its engine."""
    run_dir = child.start.run_dir
    channel = DealerChannel(context, f"ipc://{run_dir}/frontends", seed_salt(child.start).encode())
    channel.send(FrontendHello(child.start.name))
    sockets.register(channel.socket)
    return EngineSide(channel, lambda: sockets.has_messages, step_clock=f"{run_dir}/steps")


def run(child: Child, *, connect: Connect = connect_scheduler) -> None:
    """Serves HTTP until the supervisor stops the process or the engine ends."""
    raise_descriptor_limit()
    give_large_buffers_back()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(child, connect))


async def _run(child: Child, connect: Connect) -> None:
    start = child.start
    config = start.config
    context = zmq.Context()
    sockets = SocketWatch()
    side = connect(child, context, sockets)
    codec = load_text_codec(config.model)
    listener = inherited_http_listener(start.listener_fd)
    link = EngineLink(
        start,
        codec=codec,
        scheduler=side.channel,
        has_answers=side.has_answers,
        wakeup=child.wakeup,
        step_clock=side.step_clock,
    )
    sockets.on_ready = link.receive
    link.receive()
    server = _Server(
        uvicorn.Config(
            make_app(link, lambda: child.tenants),
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=GRACE_S,
        )
    )
    async with asyncio.TaskGroup() as tasks:  # the failure of one ends the process
        serving = tasks.create_task(server.serve(sockets=[listener]))
        others = [
            tasks.create_task(link.wait_for_failure()),
            tasks.create_task(_report_ready(child, link, http_endpoint(listener))),
            tasks.create_task(_tick(child, link)),
            tasks.create_task(_follow(side, link)),
        ]
        await _run_until_stopped(child, link)
        for task in others:
            task.cancel()
        link.fail_all(child.stop_reason or "the engine was stopped")
        server.should_exit = True
        await serving
    link.close()
    sockets.close()
    context.destroy(linger=0)


async def _run_until_stopped(child: Child, link: EngineLink) -> None:
    woken = asyncio.Event()
    asyncio.get_running_loop().add_reader(child.wakeup.fileno(), woken.set)
    drain = ChildDrain(child)
    while not child.stopping:
        if link.info is not None:
            drain.follow(link.frontend)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(woken.wait(), None if child.drain is None else DRAIN_LOOK_S)
        woken.clear()
        child.wakeup.clear()
        link.run_ready()


async def _report_ready(child: Child, link: EngineLink, endpoint: str) -> None:
    await link.wait_for_info()
    child.ready(endpoint=endpoint)


async def _tick(child: Child, link: EngineLink) -> None:
    """Ticks, and shows the watchdog that the event loop turns."""
    while True:
        await asyncio.sleep(TICK_S)
        child.activity.mark()
        link.tick()


async def _follow(side: EngineSide, link: EngineLink) -> None:
    while True:
        await asyncio.sleep(side.follow())
        link.receive()


if __name__ == "__main__":
    run_child(run)
