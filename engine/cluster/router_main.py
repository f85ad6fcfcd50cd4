"""Runs a router: ``python -m loraplex.engine.cluster.router_main``."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import zmq

from loraplex.engine.cluster.engine_list import EngineList, EngineListReader
from loraplex.engine.frontend.client_socket import LINGER_MS, ClientSocket
from loraplex.engine.frontend.clients import ClientTable
from loraplex.engine.frontend.frontend import Frontend
from loraplex.engine.frontend.inputs import load_text_codec
from loraplex.engine.ipc.channel import DealerChannel
from loraplex.engine.ipc.child import Child, run_child
from loraplex.engine.processes.frontend_main import (
    give_large_buffers_back,
    raise_descriptor_limit,
    seed_salt,
    serve,
)
from loraplex.engine.router.cluster_channel import ClusterChannel

LOOK_S = 0.1  # between looks at the list of engines
RETRY_S = 5.0  # between attempts to reach an engine that is listed and was given up


class EngineLinks:
    """Connects the router's channel with the engines of the list."""

    def __init__(
        self, channel: ClusterChannel, *, identity: str, context: "zmq.Context[Any]", folder: Path
    ) -> None:
        """`identity` begins the names by which engines know this process; no other had it."""
        self._channel = channel
        self._identity = identity
        self._context = context
        self._reader = EngineListReader(folder)
        self._listed = EngineList("")
        self._links: dict[str, DealerChannel] = {}
        self._num_links = 0
        self._look_at = self._retry_at = 0.0

    def follow(self, poller: zmq.Poller) -> float:
        """Connects new engines and leaves those that are gone; returns the seconds to wait."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            listed = self._reader.read()
            if listed is not None or now >= self._retry_at:
                self._retry_at = now + RETRY_S
                self._listed = listed or self._listed
                self._take(self._listed, poller)
            self._forget_lost(poller)
        return max(0.0, self._look_at - now)

    def _take(self, listed: EngineList, poller: zmq.Poller) -> None:
        engines = {engine.engine_id: engine for engine in listed.engines}
        for engine_id in self._links.keys() - engines.keys():
            self._channel.lose_engine(engine_id, "it has ended")
        for engine_id, engine in engines.items():
            if engine_id not in self._links:
                self._num_links += 1
                identity = f"{self._identity}.{self._num_links}".encode()
                link = DealerChannel(self._context, engine.endpoint, identity)
                self._links[engine_id] = link
                poller.register(link.socket, zmq.POLLIN)
                self._channel.add_engine(engine_id, link)
            if engine.draining and engine_id in self._channel.engine_ids:
                self._channel.drain_engine(engine_id)

    def _forget_lost(self, poller: zmq.Poller) -> None:
        """Close the links of engines that are gone or were given up."""
        for engine_id in self._links.keys() - set(self._channel.engine_ids):
            link = self._links.pop(engine_id)
            poller.unregister(link.socket)
            link.close()


def run(child: Child) -> None:
    """Runs a router until the supervisor stops it."""
    raise_descriptor_limit()
    give_large_buffers_back()
    config, folder = child.start.config, Path(child.start.run_dir)
    reader = EngineListReader(folder)
    while (listed := reader.read()) is None:
        time.sleep(LOOK_S / 10)  # the supervisor writes it once the folder is there
    context = zmq.Context()
    channel = ClusterChannel(
        child.start.name,
        placement=listed.placement,
        block_tokens=config.memory.block_tokens,
        max_queue_len=config.scheduler.max_queue_len,
        objective_s=config.scheduler.ttft_slo_s,
    )
    identity = f"{child.start.name}.{child.start.incarnation}"
    links = EngineLinks(channel, identity=identity, context=context, folder=folder)
    clients = ClientSocket(context, config.server, f"ipc://{folder}/clients")
    codec = load_text_codec(config.model)
    poller = zmq.Poller()
    poller.register(child.wakeup.fileno(), zmq.POLLIN)
    while channel.info is None and not child.stopping:
        poller.poll(int(1000 * links.follow(poller)) + 1)
        child.wakeup.clear()
        channel.receive()
    if channel.info is not None:
        frontend = Frontend(
            config,
            name=seed_salt(child.start),
            info=channel.info,
            codec=codec,
            scheduler=channel,
            clients_of=partial(
                ClientTable, clients.send, max_unread=config.server.max_client_backlog
            ),
            wakeup=child.wakeup,
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
