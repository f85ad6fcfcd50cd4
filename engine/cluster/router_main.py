"""Runs a router: ``python -m loraplex.engine.cluster.router_main``."""

from functools import partial

import zmq

from loraplex.engine.cluster.engine_links import connect_engines
from loraplex.engine.frontend.client_socket import LINGER_MS, ClientSocket
from loraplex.engine.frontend.clients import ClientTable
from loraplex.engine.frontend.frontend import Frontend
from loraplex.engine.frontend.inputs import load_text_codec
from loraplex.engine.frontend.statistics.frontend_counts import FrontendCounts
from loraplex.engine.ipc.child import Child, run_child
from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.engine.processes.addresses.shared_address import inherited_zmq_listener
from loraplex.engine.processes.frontend_main import (
    give_large_buffers_back,
    raise_descriptor_limit,
    seed_salt,
    serve,
)


def run(child: Child) -> None:
    """Runs a router until the supervisor stops it."""
    raise_descriptor_limit()
    give_large_buffers_back()
    config = child.start.config
    context = zmq.Context()
    channel, links = connect_engines(child, context)
    codec = load_text_codec(config.model)  # a shared address must not listen before: others serve
    fd = child.start.listener_fd
    clients = ClientSocket(
        context,
        config.server,
        f"ipc://{child.start.run_dir}/clients",
        listener_fd=inherited_zmq_listener(fd) if fd >= 0 else fd,
    )
    poller = zmq.Poller()
    poller.register(child.wakeup.fileno(), zmq.POLLIN)
    info: EngineInfo | None = None
    while info is None and not child.stopping:
        poller.poll(int(1000 * links.follow(poller)) + 1)
        child.wakeup.clear()
        for _, message in channel.receive(1):
            info = message
    if info is not None:
        frontend = Frontend(
            config,
            name=seed_salt(child.start),
            info=info,
            codec=codec,
            scheduler=channel,
            clients_of=partial(
                ClientTable, clients.send, max_unread=config.server.max_client_backlog
            ),
            wakeup=child.wakeup,
            counts=FrontendCounts.in_run_dir(child.start.run_dir, child.start.name),
        )
        poller.register(clients.socket, zmq.POLLIN)
        child.activity.end()
        child.ready(endpoint=clients.endpoint)

        def before_wait() -> float:
            wait_s = links.follow(poller)
            return 0.0 if channel.has_answers else wait_s

        serve(child, frontend, channel, clients, poller, before_wait=before_wait)
    clients.close()
    context.destroy(linger=LINGER_MS)


if __name__ == "__main__":
    run_child(run)
