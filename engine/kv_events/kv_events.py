"""Connects a prefix cache with the publisher of its events."""

from typing import Any

import zmq

from loraplex.engine.kv_events.kv_event_publisher import KVEventPublisher
from loraplex.engine.kv_events.kv_event_recorder import KVEventRecorder
from loraplex.memory.accounting.kv_cache import KVCache


class KVEvents:
    """Publishes what happens in a prefix cache; call turn() after each turn of the scheduler.

    Attributes:
        socket: when it is readable, turn() has something to do; None: there is no such socket.
    """

    def __init__(self, cache: KVCache, publisher: KVEventPublisher) -> None:
        self._recorder = KVEventRecorder(cache.block_tokens)
        self._publisher = publisher
        self.socket: zmq.Socket[Any] | None = publisher.replay_socket
        cache.observer = self._recorder

    def turn(self) -> bool:
        """Publishes the turn's events and a part of replays; returns whether there is more."""
        self._publisher.publish(self._recorder.take())
        return self._publisher.serve_replays()
