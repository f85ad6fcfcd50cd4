"""Runs a frontend: ``python -m loraplex.engine.processes.frontend_main``."""

import ctypes
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import zmq

from loraplex.engine.errors import ConfigError
from loraplex.engine.frontend.client_socket import LINGER_MS, ClientSocket
from loraplex.engine.frontend.clients import ClientTable
from loraplex.engine.frontend.frontend import Frontend
from loraplex.engine.frontend.inputs import load_text_codec
from loraplex.engine.frontend.statistics.frontend_counts import FrontendCounts
from loraplex.engine.frontend.uploads.adapter_uploads import AdapterUploads
from loraplex.engine.ipc.channel import Channel, DealerChannel, frontend_identity
from loraplex.engine.ipc.child import Child, run_child
from loraplex.engine.ipc.descriptor_limit import raise_descriptor_limit
from loraplex.engine.ipc.messages.frontend import EngineInfo, FrontendHello
from loraplex.engine.ipc.messages.lifecycle import ChildStart
from loraplex.engine.ipc.step_clock import StepClock
from loraplex.engine.processes.addresses.shared_address import inherited_zmq_listener
from loraplex.engine.processes.draining.child_drain import ChildDrain

logger = logging.getLogger("loraplex.frontend")

TICK_S = 1.0
M_MMAP_THRESHOLD = -3  # of malloc.h


def give_large_buffers_back() -> None:
    """Makes glibc return freed buffers of a MiB and more to the system at once.

    By default it raises that limit to 32 MiB after the first such buffer, and keeps those of large
    messages in its heap.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries do not have it
        mallopt(M_MMAP_THRESHOLD, 1 << 20)


def run(child: Child) -> None:
    """Runs a frontend until the supervisor stops it or the engine ends."""
    raise_descriptor_limit()
    give_large_buffers_back()
    config, run_dir = child.start.config, child.start.run_dir
    if child.start.folder_server:  # its stores are the router's, on another machine
        config = replace(config, store=replace(config.store, adapter_stores=()))
    context = zmq.Context()
    identity = frontend_identity(child.start.index, child.start.incarnation)
    scheduler = DealerChannel(context, f"ipc://{run_dir}/frontends", identity)
    scheduler.send(FrontendHello(child.start.name))
    codec = load_text_codec(config.model)  # a shared address must not listen before: others serve
    fd = child.start.listener_fd
    clients = ClientSocket(
        context,
        config.server,
        f"ipc://{run_dir}/clients",
        listener_fd=inherited_zmq_listener(fd) if fd >= 0 else fd,
    )
    poller = zmq.Poller()
    poller.register(child.wakeup.fileno(), zmq.POLLIN)
    poller.register(scheduler.socket, zmq.POLLIN)
    info: EngineInfo | None = None
    while info is None and not child.stopping:
        poller.poll()
        child.wakeup.clear()
        for _, message in scheduler.receive():
            info = message
    if info is not None:
        frontend = Frontend(
            config,
            name=seed_salt(child.start),
            info=info,
            codec=codec,
            scheduler=scheduler,
            clients_of=partial(
                ClientTable, clients.send, max_unread=config.server.max_client_backlog
            ),
            wakeup=child.wakeup,
            counts=FrontendCounts.in_run_dir(child.start.run_dir, child.start.name),
        )
        frontend.tensor_loads.uploads = AdapterUploads(config, child.wakeup)
        frontend.step_clock = StepClock(f"{run_dir}/steps")
        poller.register(clients.socket, zmq.POLLIN)
        child.activity.end()
        child.ready(endpoint=clients.endpoint)
        serve(child, frontend, scheduler, clients, poller)
    clients.close()
    context.destroy(linger=LINGER_MS)


def serve(
    child: Child,
    frontend: Frontend,
    scheduler: Channel,
    clients: ClientSocket,
    poller: zmq.Poller,
    *,
    before_wait: Callable[[], float | None] = lambda: None,
) -> None:
    """Serve clients until the engine ends, then send the reason to every client that waits.

    `before_wait` is called in each turn; it returns the most seconds to wait, or None.
    """
    next_tick, tenants = time.monotonic(), child.tenants
    drain = ChildDrain(child)
    while not child.stopping:
        tick_s = max(0.0, next_tick - time.monotonic()) if frontend.needs_ticks else None
        waits = (tick_s, frontend.flush_due_s, before_wait(), drain.follow(frontend))
        wait_s = min((wait for wait in waits if wait is not None), default=None)
        poller.poll(None if wait_s is None else int(wait_s * 1000) + 1)
        child.activity.begin()
        child.wakeup.clear()
        if child.tenants is not tenants:
            tenants = child.tenants
            _read_client_keys(clients)
        for _, message in scheduler.receive():
            frontend.on_scheduler(message)
        clients.receive(frontend.on_frames)
        frontend.run_ready()
        if time.monotonic() >= next_tick:
            frontend.tick()
            next_tick = time.monotonic() + TICK_S
        child.activity.end()
    frontend.fail_all(child.stop_reason or "the engine was stopped")
    clients.receive(frontend.on_frames)
    deadline = time.monotonic() + LINGER_MS / 1000
    while frontend.flush_due_s is not None and time.monotonic() < deadline:
        time.sleep(frontend.flush_due_s)
        frontend.run_ready()
    frontend.close()


def _read_client_keys(clients: ClientSocket) -> None:
    """Follow the supervisor, who has found the files good; they may have changed since."""
    try:
        clients.read_keys()
    except ConfigError as error:
        logger.error("the former CurveZMQ keys stay: %s", error)


def seed_salt(start: ChildStart) -> str:
    """Returns a text that no other frontend has, so that seeds do not repeat after a restart."""
    return f"{start.name} restart {start.incarnation}" if start.incarnation else start.name


if __name__ == "__main__":
    run_child(run)
