"""The events of a running engine's prefix cache, on their socket."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from loraplex import Client, SamplingParams
from loraplex.engine.config import ServerConfig
from loraplex.engine.kv_events.events import BlockStored, EventBatch
from loraplex.engine.kv_events.kv_event_publisher import END

from helpers.fakes.fake_engine import BLOCK_TOKENS, fake_config
from helpers.running.processes import GUARD_S, running_engine

pytestmark = pytest.mark.e2e


def socket_at(context: "zmq.Context[Any]", kind: int, endpoint: str) -> Any:
    socket = context.socket(kind)
    socket.setsockopt(zmq.RCVTIMEO, int(1000 * GUARD_S))
    if kind == zmq.SUB:
        socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.connect(endpoint)
    return socket


def test_a_subscriber_hears_of_cached_prompts_and_can_ask_again(tmp_path: Path) -> None:
    option = {
        "enable_kv_cache_events": True, "publisher": "zmq", "topic": "kv-events",
        "endpoint": f"ipc://{tmp_path}/events", "replay_endpoint": f"ipc://{tmp_path}/again",
    }  # fmt: skip
    server = ServerConfig(endpoint="", kv_events_config=json.dumps(option))
    prompt = list(range(1, 2 * BLOCK_TOKENS + 4))
    context = zmq.Context()
    with running_engine(replace(fake_config(), server=server)) as engine:
        events = socket_at(context, zmq.SUB, str(option["endpoint"]))
        with Client(engine.endpoint) as client:
            *_, last = client.generate(prompt, SamplingParams(max_tokens=2))
            assert last.finished
            again = socket_at(context, zmq.DEALER, str(option["replay_endpoint"]))
            again.send_multipart((b"", (0).to_bytes(8, "big")))
            _, number, data = again.recv_multipart()
            assert again.recv_multipart()[1] == END
            client.reset_prefix_cache()
            while True:  # the subscription may have come after the first batch
                topic, count, cleared = events.recv_multipart()
                if int.from_bytes(count, "big") == 1:
                    break
    context.destroy(linger=0)
    assert (topic, number) == (b"kv-events", bytes(8))
    (stored,) = msgspec.msgpack.decode(data, type=EventBatch).events
    assert isinstance(stored, BlockStored)
    assert stored.token_ids == prompt[: 2 * BLOCK_TOKENS]
    assert len(stored.block_hashes) == 2
    assert msgspec.msgpack.decode(cleared)[1] == [{"type": "AllBlocksCleared"}]
