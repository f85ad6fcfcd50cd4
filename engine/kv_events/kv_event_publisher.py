"""Publishes batches of events on a ZeroMQ socket, in the frames of vLLM."""

import contextlib
import time
from collections import deque
from itertools import islice
from typing import Any

import msgspec
import zmq

from loraplex.engine.errors import ConfigError
from loraplex.engine.kv_events.events import EventBatch, KVEvent
from loraplex.engine.kv_events.kv_events_config import KVEventsConfig, binds

END = (-1).to_bytes(8, "big", signed=True)
"""The sequence number that ends a replay."""

REPLAYED_A_TURN = 64  # batches, so that planning never waits for a replay


class KVEventPublisher:
    """Sends (topic, sequence number, batch), and repeats batches to those who ask.

    A sequence number is 8 bytes, big-endian, from 0 on. Never waits: a subscriber that reads too
    slowly loses batches, sees a gap in the numbers, and may ask for them again: it sends a number
    from a REQ socket, or an empty frame and a number from a DEALER socket. The answers are the
    batches from that number on, as (number, batch), and (END, nothing).
    """

    def __init__(self, context: "zmq.Context[Any]", config: KVEventsConfig) -> None:
        """Binds or connects the sockets. Raises ConfigError if that is not possible."""
        self._topic = config.topic.encode()
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        self._num_sent = 0
        self._replays: deque[tuple[bytes, int]] = deque()  # who asks, next number
        self._pub = context.socket(zmq.PUB)
        self._pub.set_hwm(config.hwm)
        self.replay_socket: zmq.Socket[bytes] | None = None
        endpoint = config.endpoint
        try:
            (self._pub.bind if binds(endpoint) else self._pub.connect)(endpoint)
            if config.replay_endpoint:
                endpoint = config.replay_endpoint
                self.replay_socket = context.socket(zmq.ROUTER)
                self.replay_socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"kv_events_config: cannot use {endpoint}: {error}") from None

    def publish(self, events: list[KVEvent]) -> None:
        """Sends a batch, if there are events."""
        if not events:
            return
        data = self._encoder.encode(EventBatch(time.time(), events))
        number = self._num_sent.to_bytes(8, "big")
        self._num_sent += 1
        self._pub.send_multipart((self._topic, number, data))
        self._buffer.append((number, data))

    def serve_replays(self) -> bool:
        """Sends a part of what was asked for again; returns whether there is more to send."""
        if self.replay_socket is None:
            return False
        with contextlib.suppress(zmq.Again):
            while True:
                frames = self.replay_socket.recv_multipart(zmq.NOBLOCK)
                if len(frames) == 3 and len(frames[2]) == 8:
                    self._replays.append((frames[0], int.from_bytes(frames[2], "big")))
        if self._replays:
            self._replay(*self._replays.popleft())
        return bool(self._replays)

    def _replay(self, asker: bytes, number: int) -> None:
        first = self._num_sent - len(self._buffer)
        skipped = max(0, number - first)
        part = list(islice(self._buffer, skipped, skipped + REPLAYED_A_TURN))
        for frames in part:
            self._send(asker, *frames)
        if skipped + len(part) < len(self._buffer):
            self._replays.append((asker, max(number, first) + len(part)))
        else:
            self._send(asker, END, b"")

    def _send(self, asker: bytes, *frames: bytes) -> None:
        assert self.replay_socket is not None
        with contextlib.suppress(zmq.Again):  # it does not read
            self.replay_socket.send_multipart((asker, b"", *frames), zmq.NOBLOCK)
