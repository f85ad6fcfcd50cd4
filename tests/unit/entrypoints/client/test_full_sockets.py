"""Clients of a server that does not read: an event loop goes on, and closing waits for nothing."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgpack
import pytest
import zmq

from loraplex.entrypoints.client import async_client, transport
from loraplex.entrypoints.client.async_client import AsyncClient
from loraplex.entrypoints.client.sync_client import Client
from loraplex.entrypoints.client.transport import SocketTransport

WITHIN_S = 120.0  # only a test that hangs gets there
LONG = "x" * (1 << 20)  # more than the buffers of the kernel take
NUM_REQUESTS = 12


class SleepingServer:
    """Answers `health`. Reads nothing else until it is woken, and refuses it then."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.awake, self.stopping = threading.Event(), threading.Event()
        self.seen: list[str] = []
        self._is_greeted = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self.stopping.set()
        self._thread.join(WITHIN_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
            socket.linger, socket.rcvhwm = 0, 1
            socket.bind(self.endpoint)
            while not self.stopping.wait(0.005):
                while (self.awake.is_set() or not self._is_greeted) and socket.poll(1):
                    client, data = socket.recv_multipart()
                    message = msgpack.unpackb(data)
                    self.seen.append(message["type"])
                    reply = {"type": "error", "code": "bad_request", "message": "refused"}
                    if message["type"] == "health":
                        reply = {"type": "health", "max_message_bytes": 1 << 30}
                        self._is_greeted = True
                    reply["request_id"] = message.get("request_id", "")
                    socket.send_multipart([client, msgpack.packb(reply)])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SleepingServer]:
    monkeypatch.setattr(transport, "CLIENT_HWM", 1)
    server = SleepingServer(f"ipc://{tmp_path}/s")
    yield server
    server.stop()


@asynccontextmanager
async def ticking() -> AsyncIterator[list[int]]:
    """Yields a list that grows with each turn of the event loop."""
    ticks: list[int] = []

    async def tick() -> None:
        while True:
            ticks.append(len(ticks))
            await asyncio.sleep(0)

    task = asyncio.create_task(tick())
    try:
        yield ticks
    finally:
        task.cancel()


async def ask(client: AsyncClient) -> str:
    """Returns the text of the error that a long prompt ends with."""
    try:
        async for _ in client.generate(LONG):
            pass
    except Exception as error:
        return str(error)
    return ""


async def blocked(client: AsyncClient) -> list["asyncio.Task[str]"]:
    """Asks for more than fits the sockets."""
    await client.__aenter__()
    tasks = [asyncio.create_task(ask(client)) for _ in range(NUM_REQUESTS)]
    await asyncio.sleep(0.05)
    return tasks


def test_other_tasks_go_on_until_there_is_room(server: SleepingServer) -> None:
    async def main() -> None:
        client = AsyncClient(server.endpoint)
        tasks = await blocked(client)
        async with ticking() as ticks:
            while len(ticks) < 1000:
                await asyncio.sleep(0.001)
        assert not any(task.done() for task in tasks)
        assert server.seen == ["health"]
        server.awake.set()
        errors = await asyncio.wait_for(asyncio.gather(*tasks), WITHIN_S)
        assert errors == ["refused"] * NUM_REQUESTS
        await client.close()

    asyncio.run(main())


def test_no_room_until_the_deadline_is_a_clear_error(
    server: SleepingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_client, "SEND_TIMEOUT_MS", 100)

    async def main() -> None:
        client = AsyncClient(server.endpoint)
        tasks = await blocked(client)
        done, waiting = await asyncio.wait(
            tasks, timeout=WITHIN_S, return_when=asyncio.FIRST_COMPLETED
        )
        assert {await task for task in done} == {f"{server.endpoint} has stopped reading messages"}
        await client.close()
        for task in waiting:
            text = await task
            assert any(word in text for word in ("closed", "lost", "stopped reading"))

    asyncio.run(main())


def test_closing_does_not_wait_for_room(server: SleepingServer) -> None:
    async def main() -> None:
        client = AsyncClient(server.endpoint)
        tasks = await blocked(client)
        async with ticking() as ticks:
            num_before = len(ticks)
            await client.close()
            assert len(ticks) > num_before
        for text in await asyncio.wait_for(asyncio.gather(*tasks), WITHIN_S):
            assert "was closed" in text or "was lost" in text

    asyncio.run(main())


def test_closing_a_client_waits_for_no_room(
    server: SleepingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "SEND_TIMEOUT_MS", -1)  # a send that waits would wait for ever
    connection = SocketTransport(server.endpoint)
    client = Client(connection)
    client.health()
    ping = connection.encode({"type": "ping", "text": LONG})
    num_refused = 0
    while num_refused < 20:  # the kernel's buffers take some more in between
        num_refused = 0 if connection.try_send(ping) else num_refused + 1
        time.sleep(0.01)
    closing = threading.Thread(target=client.close, daemon=True)
    closing.start()
    closing.join(WITHIN_S / 4)
    assert not closing.is_alive()
