"""The sockets of KV events: frames, replays, and the checks of the option."""

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq

from loraplex.engine.config import ServerConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.kv_events.events import BlockRemoved
from loraplex.engine.kv_events.kv_event_publisher import END, REPLAYED_A_TURN, KVEventPublisher
from loraplex.engine.kv_events.kv_events_config import (
    KVEventsConfig,
    check_shared_kv_events,
    kv_events_config,
)

TIMEOUT_MS = 60_000


@pytest.fixture
def context() -> Iterator["zmq.Context[Any]"]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def subscriber(context: "zmq.Context[Any]", endpoint: str, topic: bytes = b"") -> Any:
    socket = context.socket(zmq.SUB)
    socket.setsockopt(zmq.RCVTIMEO, TIMEOUT_MS)
    socket.setsockopt(zmq.SUBSCRIBE, topic)
    socket.connect(endpoint)
    return socket


def test_batches_are_numbered_and_can_be_read_again(context: "zmq.Context[Any]") -> None:
    num_batches, kept = 3 * REPLAYED_A_TURN, 2 * REPLAYED_A_TURN
    config = KVEventsConfig(
        True, endpoint="inproc://events", replay_endpoint="inproc://again", topic="kv",
        buffer_steps=kept,
    )  # fmt: skip
    publisher = KVEventPublisher(context, config)
    socket = subscriber(context, "inproc://events", b"kv")
    publisher.publish([])  # nothing is sent
    for number in range(num_batches):
        publisher.publish([BlockRemoved([b"%d" % number], "GPU")])
    batches = []
    for number in range(num_batches):
        topic, count, data = socket.recv_multipart()
        assert (topic, int.from_bytes(count, "big")) == (b"kv", number)
        batches.append(data)
    assert msgspec.msgpack.decode(batches[7])[1][0]["block_hashes"] == [b"7"]
    asker = context.socket(zmq.DEALER)
    asker.setsockopt(zmq.RCVTIMEO, TIMEOUT_MS)
    asker.connect("inproc://again")
    for first in (0, num_batches - 3, num_batches + 9):
        asker.send_multipart((b"", first.to_bytes(8, "big")))
        while publisher.serve_replays():
            pass
        again: list[tuple[int, bytes]] = []
        while (frames := asker.recv_multipart())[1] != END:
            again.append((int.from_bytes(frames[1], "big"), frames[2]))
        start = min(max(first, num_batches - kept), num_batches)
        assert again == list(enumerate(batches))[start:]


def test_a_publisher_connects_to_a_subscriber_that_has_bound_its_address(
    context: "zmq.Context[Any]",
) -> None:
    socket = context.socket(zmq.SUB)
    socket.setsockopt(zmq.RCVTIMEO, TIMEOUT_MS)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    publisher = KVEventPublisher(context, KVEventsConfig(True, endpoint=f"tcp://127.0.0.1:{port}"))
    socket.setsockopt(zmq.RCVTIMEO, 200)
    for _ in range(300):  # until the connection is there
        publisher.publish([BlockRemoved([b"h"], "GPU")])
        try:
            assert len(socket.recv_multipart()) == 3
            return
        except zmq.Again:
            pass
    raise AssertionError("nothing came")


def option(**values: Any) -> ServerConfig:
    return ServerConfig(kv_events_config=json.dumps(values))


def test_the_option_has_vllms_names_and_is_off_by_default() -> None:
    assert not kv_events_config(ServerConfig()).is_enabled
    assert not kv_events_config(option(publisher="zmq", topic="kv")).is_enabled
    assert not kv_events_config(option(enable_kv_cache_events=True, publisher="null")).is_enabled
    on = option(enable_kv_cache_events=True, publisher="zmq", endpoint="tcp://127.0.0.1:5557")
    assert kv_events_config(on).is_enabled


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"enable_kv_cache_events": True}, "other machines without encryption"),
        ({"enable_kv_cache_events": True, "endpoint": "ipc:///x", "replay_endpoint": "tcp://*:1"},
         "other machines without encryption"),
        ({"enable_kv_events": True}, "enable_kv_events"),
        ({"publisher": "kafka"}, "kafka"),
        ({"hwm": -1}, "negative"),
    ],
)  # fmt: skip
def test_a_bad_option_is_refused_with_the_reason(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        kv_events_config(option(**values))


def test_engines_of_a_cluster_do_not_take_each_others_address() -> None:
    check_shared_kv_events(ServerConfig())
    to_subscriber = {"enable_kv_cache_events": True, "endpoint": "tcp://127.0.0.1:5557"}
    check_shared_kv_events(option(**to_subscriber))
    for values in (
        {"enable_kv_cache_events": True, "endpoint": "ipc:///x"},
        {**to_subscriber, "replay_endpoint": "ipc:///x"},
    ):
        with pytest.raises(ConfigError, match="cannot all bind one address"):
            check_shared_kv_events(option(**values))


def test_an_address_that_cannot_be_used_is_named(context: "zmq.Context[Any]") -> None:
    with pytest.raises(ConfigError, match="/nowhere/x"):
        KVEventPublisher(context, KVEventsConfig(True, endpoint="ipc:///nowhere/x"))
