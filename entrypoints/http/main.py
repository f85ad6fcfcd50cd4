"""Runs an HTTP frontend: ``python -m loraplex.entrypoints.http.main``."""

import asyncio
import contextlib
from collections.abc import Iterator

import uvicorn
import uvloop
import zmq

from loraplex.engine.frontend.inputs import load_text_codec
from loraplex.engine.ipc.channel import DealerChannel
from loraplex.engine.ipc.child import Child, run_child
from loraplex.engine.ipc.messages.frontend import FrontendHello
from loraplex.engine.processes.addresses.http_address import http_endpoint
from loraplex.engine.processes.addresses.shared_address import inherited_http_listener
from loraplex.engine.processes.frontend_main import (
    give_large_buffers_back,
    raise_descriptor_limit,
)
from loraplex.entrypoints.http.app import make_app
from loraplex.entrypoints.http.engine_link import TICK_S, EngineLink

KEEP_ALIVE_S = 75  # longer than clients keep idle connections, so that they close first
GRACE_S = 1  # for the last errors to reach the clients


class _Server(uvicorn.Server):
    """Leaves the signals to the engine's supervisor."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(child: Child) -> None:
    """Serves HTTP until the supervisor stops the process or the engine ends."""
    raise_descriptor_limit()
    give_large_buffers_back()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(child))


async def _run(child: Child) -> None:
    start = child.start
    config = start.config
    context = zmq.Context()
    name = f"{start.name} restart {start.incarnation}" if start.incarnation else start.name
    scheduler = DealerChannel(context, f"ipc://{start.run_dir}/frontends", name.encode())
    scheduler.send(FrontendHello(start.name))
    codec = load_text_codec(config.model)
    listener = inherited_http_listener(start.listener_fd)
    link = EngineLink(
        config,
        name=name,
        codec=codec,
        scheduler=scheduler,
        wakeup=child.wakeup,
        step_clock=f"{start.run_dir}/steps",
    )
    server = _Server(
        uvicorn.Config(
            make_app(link),
            http="httptools",
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
        ]
        await _run_until_stopped(child, link)
        for task in others:
            task.cancel()
        link.fail_all(child.dead_reason or "the engine was stopped")
        server.should_exit = True
        await serving
    link.close()
    context.destroy(linger=0)


async def _run_until_stopped(child: Child, link: EngineLink) -> None:
    woken = asyncio.Event()
    asyncio.get_running_loop().add_reader(child.wakeup.fileno(), woken.set)
    while not child.stopping:
        await woken.wait()
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


if __name__ == "__main__":
    run_child(run)
