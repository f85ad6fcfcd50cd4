"""A client that is dropped without close() disconnects, also after an error and in a cycle."""

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from loraplex.engine.errors import ClientError
from loraplex.entrypoints.client.async_client import AsyncClient
from loraplex.entrypoints.client.sync_client import Client

WITHIN_S = 60.0


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    """The address of a server that answers health and refuses everything else."""
    endpoint, stopping = f"ipc://{tmp_path}/s", threading.Event()

    def serve() -> None:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
            socket.linger = 0
            socket.bind(endpoint)
            while not stopping.is_set():
                if socket.poll(10):
                    client, data = socket.recv_multipart()
                    answer: dict[str, Any] = {"request_id": msgpack.unpackb(data).get("request_id")}
                    if b"health" in data:
                        answer |= {"type": "health", "max_message_bytes": 1 << 20}
                    else:
                        answer |= {"type": "error", "code": "bad_request", "message": "no"}
                    socket.send_multipart([client, msgpack.packb(answer)])

    thread = threading.Thread(target=serve)
    thread.start()
    yield endpoint
    stopping.set()
    thread.join(WITHIN_S)


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


IN_A_CYCLE = """
import gc, sys
from loraplex.entrypoints.client.sync_client import Client
cycle = [Client(sys.argv[1])]
cycle[0].cycle = cycle
del cycle
gc.collect()
print("collected", flush=True)
"""


def test_the_collector_does_not_hang_at_a_client_in_a_cycle(endpoint: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", IN_A_CYCLE, endpoint],
        capture_output=True, text=True, timeout=WITHIN_S, check=True,
    )  # fmt: skip
    assert done.stdout == "collected\n"


@pytest.mark.usefixtures("no_collector")
def test_an_error_leaves_no_cycle_that_holds_the_client(endpoint: str) -> None:
    client = Client(endpoint)
    with pytest.raises(ClientError):
        client.stats()
    with pytest.raises(ClientError):
        for _ in client.generate([1]):
            pass
    gone = weakref.ref(client)
    del client
    assert gone() is None


@pytest.mark.usefixtures("no_collector")
def test_an_error_leaves_no_cycle_that_holds_the_async_client(endpoint: str) -> None:
    async def use() -> "weakref.ref[AsyncClient]":
        async with AsyncClient(endpoint) as client:
            with pytest.raises(ClientError):
                await client.stats()
            with pytest.raises(ClientError):
                async for _ in client.generate([1]):
                    pass
            return weakref.ref(client)

    assert asyncio.run(use())() is None
