"""Connects a router with the engines of the list."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq

from loraplex.engine.cluster.engine_list import EngineList, EngineListReader
from loraplex.engine.cluster.scale_signals import SIGNALS_S, ScaleSignals
from loraplex.engine.ipc.channel import DealerChannel
from loraplex.engine.ipc.child import Child
from loraplex.engine.router.adapter_log import AdapterLog
from loraplex.engine.router.cluster_channel import ClusterChannel
from loraplex.engine.router.router_counts import RouterCounts

LOOK_S = 0.1  # between looks at the list of engines
RETRY_S = 5.0  # between attempts to reach an engine that is listed and was given up
ADAPTER_LOG = "adapters.log"


class SocketRegistry(Protocol):
    """Waits for sockets, as zmq.Poller does."""

    def register(self, socket: Any, flags: int = ...) -> None: ...

    def unregister(self, socket: Any) -> None: ...


class EngineLinks:
    """Connects new engines, and leaves those that are gone or were given up."""

    def __init__(
        self, channel: ClusterChannel, *, identity: str, context: "zmq.Context[Any]", folder: Path
    ) -> None:
        """`identity` begins the names by which engines know this process; no other had it."""
        self._channel = channel
        self._identity = identity
        self._context = context
        self._folder = folder
        self._reader = EngineListReader(folder)
        self._listed = EngineList("")
        self._links: dict[str, DealerChannel] = {}
        self._num_links = 0
        self._look_at = self._retry_at = self._signal_at = 0.0

    def follow(self, sockets: SocketRegistry) -> float:
        """Reads the list if it is time; returns the seconds until the next call."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            listed = self._reader.read()
            if listed is not None or now >= self._retry_at:
                self._retry_at = now + RETRY_S
                self._listed = listed or self._listed
                self._take(self._listed, sockets)
            self._forget_lost(sockets)
            self._channel.adapters.sync()
            if self._listed.scale is not None and now >= self._signal_at:
                self._signal_at = now + SIGNALS_S
                self._tell_load(now)
        return max(0.0, self._look_at - now)

    def _take(self, listed: EngineList, sockets: SocketRegistry) -> None:
        if listed.scale is not None:
            self._channel.scale = msgspec.structs.asdict(listed.scale)
        engines = {engine.engine_id: engine for engine in listed.engines}
        for engine_id in self._links.keys() - engines.keys():
            self._channel.lose_engine(engine_id, "it has ended")
        for engine_id, engine in engines.items():
            if engine_id not in self._links:
                self._num_links += 1
                identity = f"{self._identity}.{self._num_links}".encode()
                link = DealerChannel(self._context, engine.endpoint, identity, reconnects=False)
                self._links[engine_id] = link
                sockets.register(link.socket, zmq.POLLIN)
                self._channel.add_engine(engine_id, link)
            if engine.draining and engine_id in self._channel.engine_ids:
                self._channel.drain_engine(engine_id)

    def _tell_load(self, now: float) -> None:
        channel = self._channel
        channel.attainment.forget(now)
        signals = ScaleSignals(
            engines=[replace(engine, load_seconds={}) for engine in channel.summaries()],
            num_queued=channel.book.num_waiting,
            num_first_tokens=len(channel.attainment),
            num_in_time=channel.attainment.num_in_time,
        )
        signals.write(self._folder, self._identity)

    def _forget_lost(self, sockets: SocketRegistry) -> None:
        for engine_id in self._links.keys() - set(self._channel.engine_ids):
            link = self._links.pop(engine_id)
            sockets.unregister(link.socket)
            link.close()


def connect_engines(
    child: Child, context: "zmq.Context[Any]"
) -> tuple[ClusterChannel, EngineLinks]:
    """Returns the channel of a router process; its links connect the engines once followed."""
    config, folder = child.start.config, Path(child.start.run_dir)
    reader = EngineListReader(folder)
    while (listed := reader.read()) is None:
        time.sleep(LOOK_S / 10)  # the supervisor writes it once the folder is there
    channel = ClusterChannel(
        child.start.name,
        placement=listed.placement,
        block_tokens=config.memory.block_tokens,
        scheduler=config.scheduler,
        adapter_log=AdapterLog(folder / ADAPTER_LOG),
        counts=RouterCounts.in_run_dir(child.start.run_dir, child.start.name),
    )
    identity = f"{child.start.name}.{child.start.incarnation}"
    return channel, EngineLinks(channel, identity=identity, context=context, folder=folder)
